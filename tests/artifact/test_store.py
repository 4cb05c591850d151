from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact import manifest
from flashgen.artifact.draft import check_out
from flashgen.artifact.manifest import Manifest
from flashgen.artifact.store import open_artifact, resolve
from flashgen.errors import ArtifactError, UsageError
from tests.artifact.making import publish


def rewrite(version: Path, **changes: Any) -> None:
    """Put a consistently sealed but changed manifest in place."""
    raw = json.loads((version / "manifest.json").read_text()) | changes
    (version / "manifest.json").write_text(Manifest.model_validate(raw).sealed().model_dump_json())


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


@pytest.mark.parametrize("kind", ["pipe", "sparse", "folder"])
def test_a_latest_that_is_no_line_of_text_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    latest = tmp_path / "latest"
    publish(tmp_path)
    latest.unlink()
    if kind == "pipe":
        os.mkfifo(latest)
    elif kind == "folder":
        latest.mkdir()
    else:
        latest.touch()
        os.truncate(latest, 6 << 30)
    with pytest.raises(ArtifactError, match=r"latest (is neither a link nor|points at)"):
        resolve(tmp_path)
    if kind != "sparse":  # a file would be replaced
        with pytest.raises(UsageError, match="latest is neither a link nor a file"):
            check_out(tmp_path)


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
