"""Networks without weights: what does not fit is said before anything is read, and layers read from disk compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgen.errors import ArtifactError
from flashgen.models import random_weights, sample
from flashgen.models.networks import check_networks
from flashgen.models.random_weights import write_random
from flashgen.models.sample import load_pipeline
from flashgen.models.specs import SPECS
from flashgen.models.text import encode_prompts, stays_on_disk

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = ["a red circle", "two blue squares on a white background", ""]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 20_000)  # several shards
    write_random(SPECS["tiny"], tmp_path, 0)
    return tmp_path


def test_every_network_is_there_without_weights(folder: Path) -> None:
    networks = check_networks(folder)
    assert sorted(networks) == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    assert all(p.is_meta for network in networks.values() for p in network.parameters())
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert "text_encoder_3" not in check_networks(folder)


def unshard(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """The transformer as one file, changed."""
    part = folder / "transformer"
    tensors = {name: t for path in part.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in (*part.glob("*.safetensors"), *part.glob("*.index.json")):
        path.unlink()
    save_file(change(tensors), part / WEIGHTS, metadata={"format": "pt"})


def as_gguf(part: Path) -> None:
    for path in (*part.glob("*.safetensors"), *part.glob("*.index.json")):
        path.unlink()
    (part / "q4.gguf").write_bytes(b"GGUF")


NAME = "transformer_blocks.0.attn.to_q.weight"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: sorted((f / "transformer").glob("*.safetensors"))[1].unlink(), r"lacks .*-00002-of-.*one of the \d+ shards"),
        (lambda f: unshard(f, lambda t: t | {NAME: torch.zeros(8, 32)}), rf"{NAME} is \[8, 32\], its config asks for \[32, 32\]"),
        (lambda f: unshard(f, lambda t: {n: v for n, v in t.items() if n != NAME}), f"has no tensor {NAME}"),
        (lambda f: unshard(f, lambda t: t | {NAME: t[NAME].to(torch.float8_e4m3fn)}), "F8_E4M3"),
        (lambda f: as_gguf(f / "transformer"), "holds q4.gguf"),
        (lambda f: (f / "vae" / "config.json").unlink(), "vae.*makes no AutoencoderKL"),
        (lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}"), "no index of shards"),
    ],
    ids=["shard", "shape", "tensor", "fp8", "gguf", "config", "index"],
)
def test_what_does_not_fit_is_one_clear_sentence(spoil: Callable[[Path], object], told: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ArtifactError, match=told):
        load_pipeline(folder)


def test_a_variant_beside_the_plain_weights_is_not_read(folder: Path) -> None:
    unshard(folder, lambda t: t)
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"broken")
    assert load_pipeline(folder).transformer.dtype == torch.float32


def test_text_alone_and_networks_on_disk_give_what_memory_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_pipeline(folder)
    want = encode_prompts(whole, PROMPTS, 16)
    text = load_pipeline(folder, weights="text")
    assert all(p.is_meta for p in (*text.transformer.parameters(), *text.vae.parameters())) and not stays_on_disk(text)
    found = encode_prompts(text, PROMPTS, 16)
    assert torch.equal(found.embeds, want.embeds) and torch.equal(found.pooled, want.pooled)
    disk = load_pipeline(folder, weights="disk")
    found, x = encode_prompts(disk, PROMPTS, 16), torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.embeds, want.embeds)
    with torch.no_grad():
        ours, theirs = (p.transformer(x, want.embeds, want.pooled, torch.full((3,), 500.0), return_dict=False)[0] for p in (disk, whole))
        assert torch.equal(ours, theirs) and torch.equal(disk.vae.decode(x).sample, whole.vae.decode(x).sample)
    assert all(p.is_meta for p in disk.transformer.parameters())  # dropped again
    monkeypatch.setattr(sample, "is_large", lambda _: True)
    large = load_pipeline(folder, torch.bfloat16, weights="text")
    assert stays_on_disk(large)
    close = encode_prompts(large, PROMPTS, 16)
    assert close.embeds.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(close.embeds.flatten(), want.embeds.flatten(), 0) > 0.999
    assert load_pipeline(folder, torch.bfloat16).transformer.dtype == torch.bfloat16
