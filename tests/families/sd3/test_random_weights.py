"""Fabricated pipelines: loadable, repeatable, sharded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from flashgen.errors import UsageError
from flashgen.families.sd3 import random_weights
from flashgen.families.sd3.random_weights import write_random
from flashgen.families.sd3.specs import SPECS, spec
from flashgen.models.pipeline import load_pipeline
from tests.peers import in_diffusers

TINY = SPECS["tiny"]


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_written_pipeline_loads_whole_and_draws(tmp_path: Path) -> None:
    write_random(TINY, tmp_path / "a", 0)
    pipe, info = load_pipeline(tmp_path / "a"), {}
    _, info = SD3Transformer2DModel.from_pretrained(tmp_path / "a" / "transformer", output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or mismatched keys
    built = SD3Transformer2DModel(**TINY.transformer)
    assert {k: v.shape for k, v in pipe.transformer.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    table = pipe.transformer.pos_embed.pos_embed
    assert torch.allclose(table, built.pos_embed.pos_embed, atol=4e-3)  # bf16
    for network in pipe.networks():
        assert all(torch.isfinite(p).all() and not p.is_meta for p in network.parameters())
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1) and not pipe.transformer.transformer_blocks[0].attn.to_q.bias.any()
    t5 = pipe["text_encoder_3"]
    assert t5.shared.weight.data_ptr() == t5.encoder.embed_tokens.weight.data_ptr()  # tied, stored once
    draw = in_diffusers(pipe)
    image = draw("a circle", num_inference_steps=1, height=64, width=64, max_sequence_length=16, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random(TINY, tmp_path / name, seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    a, c = digests(tmp_path / "a"), digests(tmp_path / "c")
    weights = [name for name in a if name.endswith(".safetensors")]
    assert len(weights) == 5 and all(a[n] != c[n] for n in weights) and all(a[n] == c[n] for n in a if n not in weights)


def test_networks_of_one_shape_differ(tmp_path: Path) -> None:
    write_random(dataclasses.replace(TINY, clip_g=TINY.clip_l), tmp_path / "a", 0)
    a = digests(tmp_path / "a")
    assert a["text_encoder/model.safetensors"] != a["text_encoder_2/model.safetensors"]


def test_shards_are_indexed_small_and_hold_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random(TINY, tmp_path / "whole", 0)
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 20_000)
    write_random(TINY, tmp_path / "shards", 0)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder_3", "model")):
        folder = tmp_path / "shards" / part
        index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        assert files == [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 2
        shards = {name: load_file(folder / name) for name in files}
        assert index["weight_map"] == {key: name for name, tensors in shards.items() for key in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())
        assert all(sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1 for tensors in shards.values())
        whole = load_file(tmp_path / "whole" / part / f"{stem}.safetensors")
        joined = {key: t for tensors in shards.values() for key, t in tensors.items()}
        assert joined.keys() == whole.keys() and all(torch.equal(joined[k], whole[k]) for k in whole)
    a, b = (load_pipeline(tmp_path / name).transformer.state_dict() for name in ("whole", "shards"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path / "shards").rglob("part*"))


def test_spec_refuses_unknown_names() -> None:
    assert spec("tiny") is TINY
    with pytest.raises(UsageError, match=r"--like 'sd9'.*shapes, tiny, sd35-medium"):
        spec("sd9")


def test_sd35_medium_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        network = SD3Transformer2DModel(**SPECS["sd35-medium"].transformer)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(2.242e9, rel=1e-3)  # method.md 1.3
