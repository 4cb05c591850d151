"""Networks without weights: what does not fit is said before anything is read, and layers read from disk compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgen.errors import ArtifactError
from flashgen.families.base import velocity
from flashgen.families.sd3 import random_weights
from flashgen.families.sd3.random_weights import write_random
from flashgen.families.sd3.specs import SPECS
from flashgen.models import pipeline
from flashgen.models.networks import check_networks
from flashgen.models.pipeline import Pipeline, load_pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.pixels import Size
from tests.conftest import tiny_sampler

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = ["a red circle", "two blue squares on a white background", ""]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 20_000)  # several shards
    write_random(SPECS["tiny"], tmp_path, 0)
    return tmp_path


def test_every_network_is_there_without_weights(folder: Path) -> None:
    family, networks = check_networks(folder)
    assert family.name == "sd3"
    assert sorted(networks) == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    assert all(p.is_meta for network in networks.values() for p in network.parameters())
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert "text_encoder_3" not in check_networks(folder)[1]


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
        (lambda f: (f / "vae" / "config.json").unlink(), "vae/config.json cannot be read"),
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
    whole, sampler = load_pipeline(folder), tiny_sampler()
    want = encode_prompts(whole, PROMPTS, sampler)
    text = load_pipeline(folder, weights="text")
    assert all(p.is_meta for p in (*text.transformer.parameters(), *text.vae.parameters())) and not text.encodes_in_bf16()
    found = encode_prompts(text, PROMPTS, sampler)
    assert all(torch.equal(found.tensors[name], want.tensors[name]) for name in want.tensors)
    disk = load_pipeline(folder, weights="disk")
    found, x = encode_prompts(disk, PROMPTS, sampler), torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.tensors["embeds"], want.tensors["embeds"])
    with torch.no_grad():
        ours, theirs = (velocity(p.transformer, x, torch.full((3,), 0.5), want) for p in (disk, whole))
        assert torch.equal(ours, theirs) and torch.equal(disk.vae.decode(x).sample, whole.vae.decode(x).sample)
    assert all(p.is_meta for p in disk.transformer.parameters())  # dropped again
    monkeypatch.setattr(pipeline, "is_large", lambda _: True)
    large = load_pipeline(folder, torch.bfloat16, weights="text")
    assert large.encodes_in_bf16()
    close = encode_prompts(large, PROMPTS, sampler).tensors["embeds"]
    assert close.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(close.flatten(), want.tensors["embeds"].flatten(), 0) > 0.999
    assert load_pipeline(folder, torch.bfloat16).transformer.dtype == torch.bfloat16


def test_large_text_encoders_leave_an_accelerators_memory_to_a_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "is_large", lambda path: path.name != "text_encoder")
    monkeypatch.setattr(pipeline, "free_bytes", lambda _: 1 << 40)  # they would fit
    drawing, training = load_pipeline(folder), load_pipeline(folder, weights="training")
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
    assert not any(p.is_meta for name in names for p in drawing[name].parameters())
    streamed = {name for name in names if any(p.is_meta for p in training[name].parameters())}
    assert streamed == {"text_encoder_2", "text_encoder_3"}
    found, want = (encode_prompts(pipe, PROMPTS, tiny_sampler()).tensors["embeds"] for pipe in (training, drawing))
    assert torch.equal(found, want)


def test_velocity_is_the_transformers_output_at_a_thousand_sigma(folder: Path) -> None:
    """SD3's convention, written out: v = dx/dsigma, timestep 1000 sigma. Latents and conditioning come in any floating type."""
    whole, sampler = load_pipeline(folder), tiny_sampler()
    cond, x = encode_prompts(whole, PROMPTS, sampler), torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.5, 0.02])
    with torch.no_grad():
        ours = velocity(whole.transformer, x, sigma, cond)
        theirs = whole.transformer(x, cond.tensors["embeds"], cond.tensors["pooled"], 1000 * sigma).sample
        assert torch.equal(ours, theirs) and ours.shape == x.shape
        in_double = velocity(whole.transformer.double(), x.double(), sigma.double(), cond)
    assert in_double.dtype == torch.float64 and torch.allclose(in_double.float(), ours, atol=1e-4)


def test_latents_and_images_are_diffusers_scaling(pipe: Pipeline) -> None:
    pipe.vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    family, images = pipe.family, 2 * torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        latents = family.to_latents(pipe.vae, images)
        assert torch.allclose(latents, (pipe.vae.encode(images).latent_dist.mode() - 0.1) * 1.3)
        assert torch.equal(family.from_latents(pipe.vae, latents), pipe.vae.decode(latents / 1.3 + 0.1).sample)
    assert latents.shape == (2, *family.latent_shape(pipe.configs, Size(64, 96))) and family.vae_factor(pipe.configs) == 8


def test_a_folder_of_no_known_family_names_the_pipelines_that_are_taken(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ArtifactError, match=r"is a FluxPipeline; flashgen takes StableDiffusion3Pipeline \(Stable Diffusion 3 and 3\.5\)"):
        load_pipeline(folder)
