from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from flashgen.errors import ArtifactError, UsageError
from flashgen.judges.clip import ClipJudge
from flashgen.judges.weights import PROCESSORS, find_weights


def test_files_are_those_that_are_read(clip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip, tmp_path / "other name")
    (copy / "README.md").write_text("read by people")
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    first, second = (find_weights(str(path), PROCESSORS) for path in (clip, copy))
    assert {path.name for path in second.files} >= {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
    assert first.digest == second.digest, "the digest is of contents, not of names"
    assert not {path.name for path in second.files} & {"README.md", "pytorch_model.bin"}


def test_digest_changes_when_a_tensor_does(clip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    save_file(state | {"logit_scale": state["logit_scale"] + 1}, copy / "model.safetensors")
    assert find_weights(str(clip)).digest != find_weights(str(copy)).digest


def test_hub_is_asked_only_for_hf_and_said_so(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(clip)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ArtifactError, match="no folder of weights openai/clip; for a repository on the hub write hf:openai/clip"):
        find_weights("openai/clip")
    assert not calls and not capsys.readouterr().err
    weights = find_weights("hf:openai/clip@refs/pr/8", PROCESSORS)
    assert weights.digest == find_weights(str(clip), PROCESSORS).digest
    [(name, revision, patterns)] = calls
    assert (name, revision) == ("openai/clip", "refs/pr/8") and "tokenizer.json" in patterns
    assert not any("bin" in pattern or pattern.startswith("*") for pattern in patterns)
    assert "fetching the weights of openai/clip from the hub" in capsys.readouterr().err


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise ConnectionError("long words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ArtifactError, match=r"openai/clip could not be fetched from the hub \(ConnectionError\); give a local folder"):
        find_weights("hf:openai/clip")
    with pytest.raises(UsageError, match="hf:nobody is no hub id"):
        find_weights("hf:nobody")


def test_pickled_weights_are_refused(clip: Path, tmp_path: Path) -> None:
    shutil.copy(clip / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors, and pickled weights, which can run code, are not read"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": "CLIPModel"}'])
def test_broken_config_is_refused(text: str, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json (cannot be read|is no configuration)"):
        find_weights(str(tmp_path))


def test_missing_tensors_are_refused_instead_of_drawn_at_random(clip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks 1 tensors of a CLIPModel, visual_projection\.weight among them"):
        find_weights(str(copy)).load("CLIPModel", "cpu")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"projection_dim": 12}))
    with pytest.raises(ArtifactError, match="cannot be read as a CLIPModel"):
        find_weights(str(copy)).load("CLIPModel", "cpu")
    (copy / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="cannot be read as a CLIPModel"):
        find_weights(str(copy)).load("CLIPModel", "cpu")


def test_clip_needs_a_clip_model_with_its_tokenizer(clip: Path, dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has Dinov2Model \(dinov2\), and prompts are judged by a CLIPModel"):
        ClipJudge(str(dinov2))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(clip / name, tmp_path)
    with pytest.raises(ArtifactError, match=r"lacks preprocessor_config\.json or the tokenizer's files"):
        ClipJudge(str(tmp_path))
