"""The chain on a tiny random teacher, made by the command line: what each stage publishes, links, refuses and finds up to date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flashgen.artifact.store import Artifact, open_artifact, versions
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.flow.grid import shifted_grid
from flashgen.models.pipeline import load_pipeline
from flashgen.quant.pack import QuantizedLinear, dequantize
from tests import runs
from tests.cli.command import flashgen
from tests.stages.chain import TRANSFORMER, Chain, digests, linked, micro
from tests.stages.test_damaged import reseal


def test_every_stage_publishes_a_whole_version_of_its_kind(chain: Chain) -> None:
    facts = {name: (a.manifest.kind, a.manifest.stage, [p.role for p in a.manifest.parents]) for name, a in chain.items()}
    assert facts == {
        "teacher": ("teacher", "teacher", []),
        "student": ("student", "distill", ["teacher"]),
        "finetuned": ("student", "finetune", ["student", "teacher"]),
        "zeros": ("student", "restructure-encoder", ["student"]),
        "prune": ("student", "restructure-encoder", ["student"]),
        "int4": ("quantized", "quantize", ["student"]),
        "device": ("device", "export", ["student"]),
    }
    for name, artifact in chain.items():
        assert (artifact.manifest.family, artifact.manifest.world) == ("sd3", "shapes")
        assert open_artifact(artifact.path, verify=True).manifest == artifact.manifest
        assert [v.name for v in versions(artifact.path.parent)] == ["v0001"]
        assert {p.name for p in (artifact.path.parent / ".work").glob("*")} <= {"cache"}  # nothing is left to resume
        texts = [path for pattern in ("*.json", "*.jsonl", "*.md") for path in artifact.path.rglob(pattern) if path.name != "manifest.json"]
        assert texts and not [path for path in texts if str(artifact.path.parents[1]) in path.read_text()]  # no path of this machine
        if name in ("teacher", "device"):
            continue
        assert (artifact.path / "samples" / "validation.png").is_file()
        assert 0 <= artifact.manifest.metrics["composition"]["overall"] <= 1
    assert chain.finetuned.manifest.parents[0].digest == chain.student.manifest.digest


def test_every_stage_states_how_to_sample_it(chain: Chain) -> None:
    samplers = {name: a.manifest.sampler for name, a in chain.items()}
    for name, sampler in samplers.items():
        assert sampler is not None and sampler.prediction == "velocity" and sampler.shift == 3.0 and sampler.size_px == (64, 64)
        if name == "teacher":
            assert sampler.sigmas == shifted_grid(28, 3.0) and sampler.guidance == 4.5 and sampler.trained_steps == []
        else:
            assert sampler.sigmas == shifted_grid(4, 3.0) and sampler.guidance == 1.0 and sampler.trained_steps == [4]
    text = {name: (s.encoder, s.tokens["clip"], s.tokens["t5"]) for name, s in samplers.items() if s}
    assert text["teacher"] == text["student"] == text["finetuned"] == ("full", 16, 16)
    assert text["zeros"] == ("zeros", 16, 16) and text["prune"] == text["int4"] == text["device"] == ("prune", 16, 0)


def test_unchanged_components_are_the_same_files_on_disk(chain: Chain) -> None:
    clips = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    assert linked(chain.teacher, chain.student) == clips - {"scheduler"} | {"text_encoder_3", "tokenizer_3"}
    assert linked(chain.student, chain.finetuned) == clips | {"text_encoder_3", "tokenizer_3"}
    assert linked(chain.finetuned, chain.zeros) == clips | {"transformer"}
    assert linked(chain.finetuned, chain.prune) == clips
    assert linked(chain.prune, chain.int4) == clips
    for artifact in (chain.zeros, chain.prune):
        assert not (artifact.path / "text_encoder_3").exists() and not (artifact.path / "tokenizer_3").exists()
    saved = sum(f.size for f in chain.finetuned.manifest.files if f.path.startswith("text_encoder_3/"))
    assert chain.prune.manifest.metrics["bytes_saved"] == saved > 0
    assert chain.prune.manifest.metrics["text_tokens"] == {"before": 32, "after": 16}


def test_every_stage_changes_the_transformer_it_trains(chain: Chain) -> None:
    found = {name: digests(a)[TRANSFORMER] for name, a in chain.items() if name != "device"}
    assert len({found[name] for name in ("teacher", "student", "finetuned", "prune", "int4")}) == 5
    assert found["zeros"] == found["finetuned"]
    logs = {name: (getattr(chain, name).path / "stats.jsonl").read_text() for name in ("student", "finetuned", "prune")}
    phases = {name: [json.loads(line)["phase"] for line in log.splitlines()] for name, log in logs.items()}
    assert phases == {"student": ["trajectory", "matching"], "finetuned": ["high", "low"], "prune": ["recovery"]}


def test_the_same_command_again_returns_the_version_that_is_there(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Made by the command line, found up to date by the same stages called as functions, from other spellings of their inputs."""
    before, recipe, out = dict(chain.items()), micro(), chain.out
    capsys.readouterr()
    again = {
        "teacher": runs.random("tiny", out / "teacher"),
        "student": runs.distill(str(out / "teacher"), out / "student", recipe),
        "finetuned": runs.finetune(str(out / "student@v0001"), out / "finetuned", recipe),
        "zeros": runs.restructure(str(out / "finetuned"), out / "zeros", recipe, mode="zeros"),
        "prune": runs.restructure(str(out / "finetuned" / "latest"), out / "prune", recipe, mode="prune"),
        "int4": runs.quantize(str(out / "prune"), out / "int4", recipe),
        "device": runs.export(str(out / "int4"), out / "device", recipe),
    }
    assert {name: a.path for name, a in again.items()} == {name: a.path for name, a in before.items()}
    assert capsys.readouterr().err.count("is up to date") == 7


def test_wrong_kinds_and_modes_are_refused_before_anything_is_written(chain: Chain, tmp_path: Path) -> None:
    recipe, out = micro(), tmp_path / "out"
    top, student, int4, zeros = (str(a.path) for a in (chain.teacher, chain.student, chain.int4, chain.zeros))
    wrong: list[tuple[str, Callable[[], Artifact]]] = [
        ("is a student, this needs a teacher", lambda: runs.distill(student, out, recipe)),
        ("is a teacher, this needs a student", lambda: runs.finetune(top, out, recipe)),
        ("is a quantized, this needs a student", lambda: runs.finetune(int4, out, recipe)),
        ("is a teacher, this needs a student", lambda: runs.restructure(top, out, recipe, mode="zeros")),
        ("is a quantized, this needs a student", lambda: runs.quantize(int4, out, recipe)),
    ]
    for message, call in wrong:
        with pytest.raises(ArtifactError, match=message):
            call()
    usage: list[tuple[str, Callable[[], Artifact]]] = [
        ("is restructured already", lambda: runs.restructure(zeros, out, recipe, mode="prune")),
    ]
    for message, call in usage:
        with pytest.raises(UsageError, match=message):
            call()
    unfit = [
        ("no multiple of distill.steps=3", "distill.steps=3"),
        ("multiples of 16 px", "distill.size_px=72"),
        ("blocks are 0 to", "distill.matching.adversarial.blocks=[30]"),
    ]
    for message, setting in unfit:
        with pytest.raises(UsageError, match=message):
            runs.distill(top, out, micro(setting))
        with pytest.raises(UsageError, match=message):
            runs.plan("distill", {"teacher": top}, out, micro(setting))
    assert not out.exists()


def test_quantized_folder_holds_the_codes_of_its_own_weights(chain: Chain) -> None:
    layers = json.loads((chain.int4.path / "quantized" / "layers.json").read_text())
    tensors = load_file(chain.int4.path / "quantized" / "transformer.safetensors")
    state = load_file(chain.int4.path / TRANSFORMER)
    before = load_pipeline(chain.prune.path).transformer
    linears = {name for name, module in before.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(layers) == linears and any(".norm1.linear" in name for name in linears)  # adaLN too
    for name, layer in layers.items():
        protected = name.startswith(("proj_out", "pos_embed", "norm_out", "context_embedder", "time_text_embed"))
        assert layer == {"bits": 8 if protected else 4, "group": 32, "symmetric": False}
        k = before.get_submodule(name).in_features
        codes, scales, zeros = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
        q = QuantizedLinear(codes, scales.float(), zeros, layer["bits"], 32, k)
        assert torch.equal(state[f"{name}.weight"], dequantize(q).half())
    packed = sum(t.nbytes for t in tensors.values())
    assert chain.int4.manifest.metrics["packed_bytes"] == packed
    assert 0 < chain.int4.manifest.metrics["weight_error_max"] < 0.2
    untouched = {name for name in state if name.endswith(".bias")}
    source = load_file(chain.prune.path / TRANSFORMER)
    assert untouched and all(torch.equal(state[name], source[name]) for name in untouched)


def test_quantize_refuses_weights_that_are_not_finite(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.prune.path, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / TRANSFORMER)
    weights["transformer_blocks.0.attn.to_q.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / TRANSFORMER, metadata={"format": "pt"})
    reseal(tmp_path / "broken")
    with pytest.raises(NumericsError, match="finite"):
        runs.quantize(str(tmp_path / "broken"), tmp_path / "out", micro())
    assert versions(tmp_path / "out") == []


def test_an_old_broken_version_does_not_stop_a_budget(chain: Chain, tmp_path: Path) -> None:
    out, student = tmp_path / "int4", str(chain.prune.path)
    first = runs.quantize(student, out, micro("quantize.budget=5", "quantize.prompts=2"))
    (first.path / "model_index.json").unlink()
    second = runs.quantize(student, out, micro("quantize.budget=4.5", "quantize.prompts=2"))
    assert second.path.name == "v0002" and open_artifact(second.path, verify=True).manifest.metrics["mean_bits"] <= 4.5


def test_every_artifact_of_the_chain_draws(chain: Chain, tmp_path: Path) -> None:
    for name, artifact in chain.items():
        options = ("--steps", "4") if name == "teacher" else ()
        picture = tmp_path / f"{name}.png"
        result = flashgen("generate", artifact.path, "a red circle", "-o", picture, "--seed", "3", *options)
        assert (result.exit_code, result.stdout) == (0, f"{picture}\n"), result.stderr
        with Image.open(picture) as image:
            assert image.size == (64, 64) and image.info["artifact"] == artifact.manifest.digest
