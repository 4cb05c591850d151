from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact import files, manifest, store
from flashgen.artifact.manifest import Manifest, Parent
from flashgen.artifact.store import Artifact, Draft, begin, check_disk, open_artifact, read_latest, resolve
from flashgen.errors import ArtifactError, MachineError, UsageError


def start(out: Path, **changes: Any) -> Draft | Artifact:
    inputs: dict[str, Any] = {"kind": "student", "stage": "distill", "recipe": {"steps": 4}, "seed": 0, "parents": []}
    return begin(out, **(inputs | changes))


def draft_of(out: Path, **changes: Any) -> Draft:
    draft = start(out, **changes)
    assert isinstance(draft, Draft)
    return draft


def publish(out: Path, text: str = "weights", **changes: Any) -> Artifact:
    draft = draft_of(out, **changes)
    (draft.path / "vae").mkdir()
    (draft.path / "vae" / "w.safetensors").write_text(text)
    (draft.path / "model_index.json").write_text("{}")
    return draft.publish(metrics={"loss": 0.5})


def rewrite(version: Path, **changes: Any) -> None:
    """Put a consistently sealed but changed manifest in place."""
    raw = json.loads((version / "manifest.json").read_text()) | changes
    (version / "manifest.json").write_text(Manifest.model_validate(raw).sealed().model_dump_json())


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
    draft.link(source, "w.safetensors")
    artifact = draft.publish()
    assert (tmp_path / "s" / "latest").read_text() == "v0001\n"
    assert open_artifact(tmp_path / "s", verify=True) == artifact
    assert (artifact.path / "w.safetensors").stat().st_ino != source.stat().st_ino


def test_what_a_check_raises_leaves_nothing_and_is_not_asked_when_nothing_is_to_be_done(tmp_path: Path) -> None:
    """`check` sees the folder of the resume state, with what an earlier run left in it."""
    seen: list[bool] = []

    def refuse(work: Path) -> None:
        seen.append((work / "cache").exists())
        raise MachineError("too small")

    with pytest.raises(MachineError, match="too small"):
        start(tmp_path / "new", check=refuse)
    assert seen == [False] and not (tmp_path / "new").exists()
    draft = draft_of(tmp_path / "old")
    (draft.work / "cache").write_text("trajectories")
    with pytest.raises(MachineError, match="too small"):
        start(tmp_path / "old", check=refuse)
    assert seen == [False, True] and (draft.work / "cache").exists()
    publish(tmp_path / "old")
    assert isinstance(start(tmp_path / "old", check=refuse), Artifact) and len(seen) == 2


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


@pytest.mark.parametrize("step", ["walk", "sha256", "Manifest", "fsync", "flip"])
def test_publish_leaves_the_previous_version_whole_when_it_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    previous = publish(tmp_path, "old")

    def crash(*_: object, **__: object) -> None:
        raise Crash

    draft = draft_of(tmp_path, seed=1)
    (draft.work / "checkpoint").write_text("step 7")
    (draft.path / "a.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(store, step, crash)
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
from flashgen.artifact import store
out = Path(sys.argv[1])
draft = store.begin(out, kind="student", stage="distill", recipe={"steps": 4}, seed=1, parents=[])
(draft.work / "checkpoint").write_text("step 7")
(draft.path / "a.json").write_text("{}")
print("begun", flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
store.flip = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
draft.publish()
"""


def test_kill_between_rename_and_flip_leaves_latest_and_resume_state(tmp_path: Path) -> None:
    previous = publish(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, "publish"], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert open_artifact(tmp_path, verify=True) == previous
    again = draft_of(tmp_path, seed=1)
    assert (again.work / "checkpoint").read_text() == "step 7"
    assert again.publish().manifest.version == "v0003"  # v0002 is whole but was never announced


def test_begin_refuses_while_another_process_writes_and_works_after_its_kill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        with pytest.raises(MachineError, match="another process is writing"):
            start(tmp_path)
        process.kill()
    assert (draft_of(tmp_path, seed=1).work / "checkpoint").read_text() == "step 7"


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
    draft.link(tmp_path / "new", "vae/w.safetensors")
    assert (draft.path / "vae/w.safetensors").read_text() == "changed"
    assert open_artifact(parent.path, verify=True) == parent


def test_link_follows_a_hub_caches_link_to_its_blob(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot").symlink_to("blob")
    draft = draft_of(tmp_path / "s")
    draft.link(tmp_path / "snapshot", "w.safetensors")
    assert not (draft.path / "w.safetensors").is_symlink()
    assert draft.publish().manifest.files[0].size == 7


def test_link_tree_names_the_folder_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="vae is missing"):
        draft_of(tmp_path / "s").link_tree(tmp_path / "vae", "vae")


# up to date


def test_begin_returns_the_latest_when_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = publish(tmp_path)
    assert start(tmp_path) == done
    assert "up to date" in capsys.readouterr().err
    assert not (tmp_path / ".work").exists()


PARENT = Parent(role="teacher", path="/t", digest="b" * 64)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"recipe": {"steps": 2}}, {"stage": "finetune"}, {"kind": "teacher"}, {"parents": [PARENT]}, {"force": True}],
)
def test_begin_starts_a_new_version_when_an_input_changed(tmp_path: Path, change: dict[str, Any]) -> None:
    publish(tmp_path)
    assert isinstance(start(tmp_path, **change), Draft)


def test_begin_ignores_where_a_parent_lies(tmp_path: Path) -> None:
    done = publish(tmp_path, parents=[PARENT])
    assert start(tmp_path, parents=[PARENT.model_copy(update={"path": "/elsewhere"})]) == done


def test_begin_starts_a_new_version_when_flashgen_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path)
    monkeypatch.setattr(store, "__version__", "9.9.9")
    assert isinstance(start(tmp_path), Draft)


def test_begin_makes_a_new_version_when_the_latest_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (publish(tmp_path).path / "model_index.json").unlink()
    assert publish(tmp_path).manifest.version == "v0002"
    assert "model_index.json is missing" in capsys.readouterr().err


def test_begin_keeps_the_resume_state_of_other_runs(tmp_path: Path) -> None:
    (draft_of(tmp_path, seed=1).work / "checkpoint").write_text("x")
    publish(tmp_path, seed=2)
    assert (draft_of(tmp_path, seed=1).work / "checkpoint").exists()


def test_begin_refuses_when_out_is_a_file_or_a_version(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        start(tmp_path / "file")
    with pytest.raises(UsageError, match="published version"):
        start(publish(tmp_path / "s").path)


# resolving


def test_resolve_knows_every_spelling_of_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = publish(tmp_path / "s"), publish(tmp_path / "s", seed=1)
    monkeypatch.chdir(tmp_path)
    assert resolve("s") == Path("s/v0002")
    assert resolve("s/") == Path("s/v0002")
    assert resolve(tmp_path / "s@v0001") == first.path
    assert resolve("s@v0001") == Path("s/v0001")
    assert resolve("s/v0001") == Path("s/v0001")
    assert resolve("s/latest") == second.path.resolve()


def test_resolve_prefers_an_existing_folder_with_an_at_sign(tmp_path: Path) -> None:
    assert resolve(publish(tmp_path / "s@v0001").path.parent) == tmp_path / "s@v0001" / "v0001"


def test_resolve_takes_shapes_for_the_embedded_teacher_only_where_one_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    assert resolve("shapes", ("teacher",)) == resolve("shapes") == store.EMBEDDED_TEACHER
    assert resolve("shapes", ("student",)) == resolve("./shapes", ("teacher",)) == Path("shapes/v0001")


@pytest.mark.parametrize("ref", ["none", "none@v0001", "s@v0009", "s@latest", "empty", "s@../s/v0001"])
def test_resolve_ends_in_an_artifact_error_when_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str) -> None:
    publish(tmp_path / "s")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError):
        resolve(ref)


def test_resolve_points_to_import_when_given_a_plain_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"flashgen teacher import .* --out DIR$"):
        resolve(tmp_path)


@pytest.mark.parametrize("target", ["/etc", "../s", "v0009", "v0001/../v0001", ".", "v0002"])
def test_latest_is_refused_when_it_names_no_version_beside_it(tmp_path: Path, target: str) -> None:
    publish(tmp_path / "s")
    (tmp_path / "s" / "v0002").symlink_to(tmp_path)  # a version that is a link itself
    (tmp_path / "s" / "latest").unlink()
    (tmp_path / "s" / "latest").symlink_to(target)
    with pytest.raises(ArtifactError, match="no version"):
        resolve(tmp_path / "s")
    (tmp_path / "s" / "latest").unlink()
    (tmp_path / "s" / "latest").write_text(target)
    with pytest.raises(ArtifactError, match="no version"):
        resolve(tmp_path / "s")


# opening with distrust


def test_open_names_both_kinds_when_the_kind_is_wrong(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(ArtifactError, match="is a student, this needs a teacher or quantized"):
        open_artifact(tmp_path, ("teacher", "quantized"))


def test_open_names_the_file_when_it_is_missing_or_has_another_size(tmp_path: Path) -> None:
    file = publish(tmp_path).path / "vae/w.safetensors"
    file.write_text("longer weights")
    with pytest.raises(ArtifactError, match=r"vae/w.safetensors has 14 bytes instead of 7"):
        open_artifact(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"vae/w.safetensors is missing"):
        open_artifact(tmp_path)


def test_verify_finds_what_the_cheap_check_cannot(tmp_path: Path) -> None:
    version = publish(tmp_path).path
    (version / "vae/w.safetensors").write_text("WEIGHTS")
    open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"vae/w.safetensors was altered"):
        open_artifact(tmp_path, verify=True)
    (version / "vae/w.safetensors").write_text("weights")
    (version / "extra.txt").write_text("")
    open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"extra.txt is not in the manifest"):
        open_artifact(tmp_path, verify=True)


def test_open_refuses_links_anywhere_in_a_version(tmp_path: Path) -> None:
    version = publish(tmp_path).path
    outside = tmp_path / "outside"
    shutil.move(version / "vae", outside)
    (version / "vae").symlink_to(outside)  # every listed file is still found behind it, with the right bytes
    with pytest.raises(ArtifactError, match="vae is a link"):
        open_artifact(tmp_path)
    (version / "vae").unlink()
    (version / "vae").mkdir()
    (version / "vae/w.safetensors").symlink_to(outside / "w.safetensors")
    with pytest.raises(ArtifactError, match=r"w.safetensors is a link"):
        open_artifact(tmp_path)


def test_open_refuses_special_files_and_unlisted_pickles(tmp_path: Path) -> None:
    version = publish(tmp_path).path
    (version / "diffusion_pytorch_model.bin").write_text("x")
    with pytest.raises(ArtifactError, match="pickled"):
        open_artifact(tmp_path)
    (version / "diffusion_pytorch_model.bin").unlink()
    os.mkfifo(version / "pipe")
    with pytest.raises(ArtifactError, match="special file"):
        open_artifact(tmp_path)


def test_open_refuses_a_manifest_that_is_huge_or_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = publish(tmp_path).path
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(ArtifactError, match="the limit is 100"):
        open_artifact(tmp_path)
    monkeypatch.undo()
    (version / "manifest.json").rename(tmp_path / "m.json")
    (version / "manifest.json").symlink_to(tmp_path / "m.json")
    with pytest.raises(ArtifactError, match="not a plain file"):
        open_artifact(tmp_path)


def test_open_refuses_a_file_list_that_leaves_the_version(tmp_path: Path) -> None:
    version = publish(tmp_path).path
    raw = json.loads((version / "manifest.json").read_text())
    raw["files"][0]["path"] = "../secret"
    (version / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="not a plain relative path"):
        open_artifact(tmp_path)


def test_open_reports_a_listed_folder_as_missing(tmp_path: Path) -> None:
    version = publish(tmp_path).path
    (version / "model_index.json").unlink()
    (version / "model_index.json").mkdir()
    with pytest.raises(ArtifactError, match=r"model_index.json is missing"):
        open_artifact(tmp_path)


def test_open_keeps_what_a_consistent_manifest_says(tmp_path: Path) -> None:
    version = publish(tmp_path).path
    rewrite(version, seed=42)
    assert open_artifact(tmp_path, verify=True).manifest.seed == 42


# disk


def test_check_disk_raises_when_the_disk_is_too_small(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(MachineError, match="MiB of disk"):
        check_disk(tmp_path / "not" / "there", 1 << 60)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert files.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_unfinished_runs_of_other_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (draft_of(tmp_path).work / "cache").write_text("trajectories")
    draft_of(tmp_path, seed=1)
    assert f"{tmp_path}/.work keeps 1 unfinished runs with other settings, 0 MiB" in capsys.readouterr().err
