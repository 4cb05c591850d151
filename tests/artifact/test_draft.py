"""Publishing: all at once or not at all, resumable, and without touching what is published."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact import draft as drafts
from flashgen.artifact.draft import cache_folder, check_out, up_to_date, work_folder
from flashgen.artifact.files import link
from flashgen.artifact.manifest import Parent
from flashgen.artifact.store import open_artifact, read_latest
from flashgen.errors import ArtifactError, UsageError
from tests.artifact.making import draft_of, origin, publish

# publishing


def test_publish_makes_a_version_that_lists_every_file_and_verifies(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "s")
    assert artifact.path == tmp_path / "s" / "v0001"
    assert [f.path for f in artifact.manifest.files] == ["model_index.json", "vae/w.safetensors"]
    assert open_artifact(tmp_path / "s", ("student",), verify=True) == artifact
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["latest", "v0001"]
    assert os.readlink(tmp_path / "s" / "latest") == "v0001"


def test_publish_keeps_old_versions_and_moves_latest(tmp_path: Path) -> None:
    first, second = publish(tmp_path, "one"), publish(tmp_path, "two", seed=1)
    assert second.manifest.version == "v0002"
    assert read_latest(tmp_path) == second.path
    assert open_artifact(first.path, verify=True) == first


def test_publish_writes_a_one_line_file_when_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "source"
    source.write_text("weights")
    draft = draft_of(tmp_path / "s")
    link(source, draft.path / "w.safetensors")
    artifact = draft.publish()
    assert (tmp_path / "s" / "latest").read_text() == "v0001\n"
    assert open_artifact(tmp_path / "s", verify=True) == artifact
    assert (artifact.path / "w.safetensors").stat().st_ino != source.stat().st_ino


def test_publish_accepts_numpy_metrics_and_writes_nan_as_null(tmp_path: Path) -> None:
    import numpy as np

    draft = draft_of(tmp_path)
    draft.publish(metrics={"a": np.float32(0.5), "b": {"c": np.int64(3)}, "d": float("nan")}, extra={"note": "x"})
    opened = open_artifact(tmp_path).manifest
    assert opened.metrics == {"a": 0.5, "b": {"c": 3}, "d": None}
    assert opened.extra["note"] == "x"


def test_publish_refuses_when_a_link_or_a_pickle_was_staged(tmp_path: Path) -> None:
    draft = draft_of(tmp_path)
    (draft.path / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="passwd is a link"):
        draft.publish()
    draft = draft_of(tmp_path)
    (draft.path / "optimizer.pt").write_text("x")
    with pytest.raises(ArtifactError, match="pickled"):
        draft.publish()
    assert read_latest(tmp_path) is None


class Crash(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("step", ["walk", "digest", "Manifest", "fsync", "point_latest"])
def test_publish_leaves_the_previous_version_whole_when_it_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    previous = publish(tmp_path, "old")

    def crash(*_: object, **__: object) -> None:
        raise Crash

    draft = draft_of(tmp_path, seed=1)
    (draft.work / "checkpoint").write_text("step 7")
    (draft.path / "a.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(drafts, step, crash)
        with pytest.raises(Crash):
            draft.publish()
    assert open_artifact(tmp_path, verify=True) == previous
    again = draft_of(tmp_path, seed=1)
    assert (again.work / "checkpoint").read_text() == "step 7"
    assert list(again.path.iterdir()) == [], "stale staging must go"
    (again.path / "a.json").write_text("{}")
    assert open_artifact(tmp_path, verify=True) == previous
    latest = again.publish()
    assert open_artifact(tmp_path, verify=True) == latest
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize("call", ["pathlib.Path.symlink_to", "os.replace"])
def test_latest_stays_readable_when_flip_crashes_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    previous = publish(tmp_path)

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(call, crash)
        with pytest.raises(Crash):
            publish(tmp_path, seed=1)
    assert open_artifact(tmp_path) == previous
    assert publish(tmp_path, seed=1).path == read_latest(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from flashgen.artifact import draft as drafts
from tests.artifact.making import draft_of
draft = draft_of(Path(sys.argv[1]), seed=1)
(draft.work / "checkpoint").write_text("step 7")
(draft.path / "a.json").write_text("{}")
drafts.point_latest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
draft.publish()
"""


def test_kill_between_rename_and_latest_leaves_latest_and_resume_state(tmp_path: Path) -> None:
    previous = publish(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert open_artifact(tmp_path, verify=True) == previous
    again = draft_of(tmp_path, seed=1)
    assert (again.work / "checkpoint").read_text() == "step 7"
    assert again.publish().manifest.version == "v0003"  # v0002 is complete but was never announced


def test_a_kill_while_the_resume_state_is_removed_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = draft_of(tmp_path)
    (draft.work / "checkpoint").write_text("step 7")
    (draft.path / "model_index.json").write_text("{}")

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        draft.publish()
    monkeypatch.undo()
    assert open_artifact(tmp_path, verify=True).path.name == "v0001" and not draft.work.exists()
    assert [path.name for path in draft_of(tmp_path).path.iterdir()] == []  # what is left is no part of the next version


def test_publish_needs_no_parent_any_more(tmp_path: Path) -> None:
    parents = [publish(tmp_path / name, name).as_parent(name) for name in ("gone", "broken", "file")]
    drafts_ = [draft_of(tmp_path / "s", parents=parents) for _ in range(2)]
    for draft in drafts_[1:]:
        draft.link_tree(Path(parents[2].path) / "vae", "vae")
    shutil.rmtree(tmp_path / "gone")
    (Path(parents[1].path) / "manifest.json").write_text("{")
    (Path(parents[2].path) / "model_index.json").unlink()
    artifact = drafts_[1].publish()
    assert open_artifact(tmp_path / "s", verify=True) == artifact
    assert artifact.manifest.parents == parents


# linking


def test_link_tree_shares_the_files_of_the_parent(tmp_path: Path) -> None:
    parent = publish(tmp_path / "a")
    draft = draft_of(tmp_path / "b")
    draft.link_tree(parent.path / "vae", "vae")
    child = draft.publish()
    assert (child.path / "vae/w.safetensors").stat().st_ino == (parent.path / "vae/w.safetensors").stat().st_ino


def test_linking_a_whole_version_does_not_write_into_the_parents_manifest(tmp_path: Path) -> None:
    parent = publish(tmp_path / "a")
    draft = draft_of(tmp_path / "b", seed=5)
    draft.link_tree(parent.path, ".")
    child = draft.publish()
    assert open_artifact(parent.path, verify=True) == parent
    assert child.manifest.seed == 5
    assert child.manifest.files == parent.manifest.files


def test_linking_over_a_linked_file_leaves_the_parents_bytes_alone(tmp_path: Path) -> None:
    parent = publish(tmp_path / "a")
    (tmp_path / "new").write_text("changed")
    draft = draft_of(tmp_path / "b")
    draft.link_tree(parent.path / "vae", "vae")
    link(tmp_path / "new", draft.path / "vae/w.safetensors")
    assert (draft.path / "vae/w.safetensors").read_text() == "changed"
    assert open_artifact(parent.path, verify=True) == parent


def test_link_follows_a_hub_caches_link_to_its_blob(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot").symlink_to("blob")
    draft = draft_of(tmp_path / "s")
    link(tmp_path / "snapshot", draft.path / "w.safetensors")
    assert not (draft.path / "w.safetensors").is_symlink()
    assert draft.publish().manifest.files[0].size == 7


def test_link_tree_names_the_folder_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="vae is missing"):
        draft_of(tmp_path / "s").link_tree(tmp_path / "vae", "vae")


# up to date


def test_the_latest_is_up_to_date_when_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = publish(tmp_path)
    assert up_to_date(tmp_path, origin()) == done
    assert "up to date" in capsys.readouterr().err
    assert not (tmp_path / ".work").exists()


PARENT = Parent(role="teacher", path="/t", digest="b" * 64)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"settings": {"steps": 2}}, {"stage": "finetune"}, {"kind": "teacher"}, {"parents": [PARENT]}],
)
def test_nothing_is_up_to_date_when_an_input_changed(tmp_path: Path, change: dict[str, Any]) -> None:
    publish(tmp_path)
    assert up_to_date(tmp_path, origin(**change)) is None
    assert work_folder(tmp_path, origin(**change)) != work_folder(tmp_path, origin())


def test_where_a_parent_lies_changes_nothing_but_its_role_does(tmp_path: Path) -> None:
    done = publish(tmp_path, parents=[PARENT])
    assert up_to_date(tmp_path, origin(parents=[PARENT.model_copy(update={"path": "/elsewhere"})])) == done
    assert up_to_date(tmp_path, origin(parents=[PARENT.model_copy(update={"role": "start"})])) is None


@pytest.mark.parametrize(("version", "same"), [("9.9.9", False), ("{major}.{minor}.99", True)], ids=["another release", "a patch"])
def test_a_patch_release_keeps_resume_state_and_versions(version: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path)
    (draft_of(tmp_path, seed=1).work / "checkpoint").write_text("step 7")
    major, minor = vars(drafts)["__version__"].split(".")[:2]
    monkeypatch.setattr(drafts, "__version__", version.format(major=major, minor=minor))
    assert (up_to_date(tmp_path, origin()) is not None) == same
    assert (draft_of(tmp_path, seed=1).work / "checkpoint").exists() == same


def test_a_damaged_latest_is_not_up_to_date_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (publish(tmp_path).path / "model_index.json").unlink()
    assert up_to_date(tmp_path, origin()) is None
    assert "model_index.json is missing" in capsys.readouterr().err
    assert publish(tmp_path).manifest.version == "v0002"


def test_begin_keeps_the_resume_state_of_other_runs(tmp_path: Path) -> None:
    (draft_of(tmp_path, seed=1).work / "checkpoint").write_text("x")
    publish(tmp_path, seed=2)
    assert (draft_of(tmp_path, seed=1).work / "checkpoint").exists()


def test_unfinished_runs_of_other_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (draft_of(tmp_path).work / "cache").write_text("trajectories")
    draft_of(tmp_path, seed=1)
    assert f"{tmp_path}/.work keeps 1 unfinished runs with other settings, 0 MiB" in capsys.readouterr().err


def test_a_file_and_a_version_cannot_hold_versions(tmp_path: Path) -> None:
    check_out(tmp_path / "new")
    check_out(publish(tmp_path / "s").path.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_out(tmp_path / "file")
    with pytest.raises(UsageError, match="published version"):
        check_out(tmp_path / "s" / "v0001")


def test_the_cache_outlives_a_published_version_and_is_no_unfinished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = draft_of(tmp_path)
    assert draft.cache == cache_folder(tmp_path) == tmp_path / ".work" / "cache"
    (draft.cache / "prompts-0123").mkdir(parents=True)
    (draft.path / "weights").write_text("x")
    draft.publish()
    assert [p.name for p in (tmp_path / ".work").iterdir()] == ["cache"] and (draft.cache / "prompts-0123").is_dir()
    draft_of(tmp_path, seed=1)
    assert "unfinished" not in capsys.readouterr().err
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "shared"))
    assert draft.cache == tmp_path / "shared"


def test_published_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    first = draft_of(tmp_path / "a")
    (first.path / "w.safetensors").touch(mode=0o600)  # as safetensors writes them
    published = first.publish()
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in published.path.iterdir()} == {mode}
