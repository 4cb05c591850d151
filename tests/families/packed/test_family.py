"""The family of this folder keeps the promises of `flashgen.families.base`, alone: no stage runs here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from flashgen import families
from flashgen.artifact.manifest import Sampler
from flashgen.families.base import Family, velocity
from flashgen.families.conditioning import Conditioning, concatenate
from flashgen.flow.ode import euler, guide
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.models.sample import sample, sample_latents
from flashgen.noise import latents
from flashgen.pixels import Size

PROMPTS = ["a red circle", "two birds in the blue sky", ""]
SIZES = [Size(64, 64), Size(64, 96), Size(40, 24)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def sampler(packed: Family) -> Sampler:
    made: Sampler = import_module("flashgen_packed.sampling").teacher_sampler()
    return made


@pytest.fixture(scope="module")
def pipe(packed: Family) -> Pipeline:
    made: Pipeline = import_module("flashgen_packed.build").build_pipeline(packed, 0)
    return made


@pytest.fixture(scope="module")
def cond(pipe: Pipeline, sampler: Sampler) -> Conditioning:
    return encode_prompts(pipe, PROMPTS, sampler)


@pytest.fixture(scope="module")
def packing(packed: Family) -> Any:
    return import_module("flashgen_packed.packing")


def by_hand(pipe: Pipeline, cond: Conditioning, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """v [B, C, h, w] from the transformer itself, token by token."""
    count, channels, height, width = x.shape
    places = list(itertools.product(range(height // 2), range(width // 2)))
    tokens = torch.stack([x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r, c in places], 1)
    ids, times = torch.tensor(places).expand(count, -1, -1), torch.full((count,), 1 - sigma)
    states, mask = cond.tensors["states"], cond.tensors["mask"].float()
    output = pipe.transformer(tokens, states, mask, times, ids, return_dict=False)[0]
    v = torch.empty_like(x)
    for token, (r, c) in enumerate(places):
        v[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = -output[:, token].reshape(count, channels, 2, 2)
    return v


def test_packed_is_known_by_its_entry_point_and_brings_a_family(packed: Family) -> None:
    assert "packed" in families.names()
    assert families.of_pipeline("PackedPipeline") is packed
    assert packed.networks == ("transformer", "vae", "language_model")


# ---- packing


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), channels=st.integers(1, 4), patch=st.integers(1, 3))
def test_unpack_inverts_pack_for_any_grid(packing: Any, rows: int, columns: int, channels: int, patch: int) -> None:
    x = torch.arange(2 * channels * rows * columns * patch**2).reshape(2, channels, rows * patch, columns * patch)
    tokens = packing.pack(x, patch)
    assert tokens.shape == (2, rows * columns, channels * patch**2)
    assert torch.equal(packing.unpack(tokens, patch, rows * patch, columns * patch), x)


def test_tokens_are_in_the_order_of_the_description(packing: Any) -> None:
    x = torch.arange(4 * 6 * 10).reshape(1, 4, 6, 10)
    tokens = packing.pack(x, 2)
    for row, column, channel, down, across in itertools.product(range(3), range(5), range(4), range(2), range(2)):
        place = tokens[0, row * 5 + column, channel * 4 + down * 2 + across]
        assert place == x[0, channel, 2 * row + down, 2 * column + across]


def test_places_say_row_and_column_of_each_token(packing: Any) -> None:
    x = torch.arange(3 * 5).reshape(1, 1, 3, 5)
    ids = packing.grid(1, 3, 5, torch.device("cpu"))
    assert torch.equal(x[0, 0][tuple(ids[0].T)], packing.pack(x, 1)[0, :, 0])


# ---- prompts


def test_encode_is_bert_on_padded_ids_with_their_mask(pipe: Pipeline, sampler: Sampler, cond: Conditioning) -> None:
    for row, prompt in enumerate(PROMPTS):
        words = pipe["tokenizer"].convert_tokens_to_ids(["[CLS]", *pipe["tokenizer"].tokenize(prompt), "[SEP]"])
        with torch.no_grad():
            alone = pipe["language_model"](torch.tensor([words])).last_hidden_state[0]
        torch.testing.assert_close(cond.tensors["states"][row, : len(words)], alone)
        assert cond.tensors["mask"][row].tolist() == [1] * len(words) + [0] * (sampler.tokens["bert"] - len(words))


def test_conditioning_casts_floats_and_leaves_the_mask_whole_numbers(cond: Conditioning) -> None:
    half = cond.to(torch.bfloat16)
    assert (half.tensors["states"].dtype, half.tensors["mask"].dtype) == (torch.bfloat16, torch.int64)
    assert len(concatenate([cond[:1], half[1:].to(torch.float32)])) == len(PROMPTS)


def test_numbers_of_a_prompts_conditioning_are_counted(pipe: Pipeline, sampler: Sampler, cond: Conditioning) -> None:
    numbers = sum(tensor[0].numel() for tensor in cond.tensors.values())
    assert pipe.family.conditioning_numbers(pipe.configs, sampler.tokens) == numbers


@torch.no_grad()
def test_text_behind_the_mask_changes_nothing_and_text_before_it_does(pipe: Pipeline, cond: Conditioning) -> None:
    x, sigma, mask = torch.randn(3, 4, 16, 16), torch.full((3,), 0.7), cond.tensors["mask"]
    v = velocity(pipe.transformer, x, sigma, cond)
    noise = torch.randn_like(cond.tensors["states"])
    behind = replace(cond, tensors={**cond.tensors, "states": torch.where(mask[..., None] == 1, cond.tensors["states"], noise)})
    assert torch.equal(velocity(pipe.transformer, x, sigma, behind), v)
    before = replace(cond, tensors={**cond.tensors, "states": torch.where(mask[..., None] == 0, cond.tensors["states"], noise)})
    assert (velocity(pipe.transformer, x, sigma, before) - v).flatten(1).norm(dim=1).min() > 0.1
    unmasked = replace(cond, tensors={**cond.tensors, "mask": torch.ones_like(mask)})
    assert (velocity(pipe.transformer, x, sigma, unmasked) - v)[mask.sum(1) < mask.shape[1]].flatten(1).norm(dim=1).min() > 0.1


# ---- sampling


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_euler_with_velocity_is_a_hand_written_loop(pipe: Pipeline, sampler: Sampler, cond: Conditioning, size: Size) -> None:
    shape = pipe.family.latent_shape(pipe.configs, size)
    assert shape == (4, size.height // 4, size.width // 4)
    noise = torch.from_numpy(latents(shape, [5, 6, 7]))
    sigmas = sampler.sigmas
    z = euler(noise, lambda x, sigma, _: velocity(pipe.transformer, x, torch.full((3,), sigma), cond), sigmas)
    x = noise
    for sigma, after in itertools.pairwise(sigmas):
        x = x + (after - sigma) * by_hand(pipe, cond, x, sigma)
    torch.testing.assert_close(z, x)


@torch.no_grad()
def test_sample_guides_away_from_the_empty_prompt(pipe: Pipeline, sampler: Sampler, cond: Conditioning) -> None:
    empty, x = cond[2:], torch.from_numpy(latents((4, 16, 24), [3]))
    for sigma, after in itertools.pairwise(sampler.sigmas):
        x = x + (after - sigma) * guide(by_hand(pipe, empty, x, sigma), by_hand(pipe, cond[:1], x, sigma), sampler.guidance)
    z = sample_latents(pipe, sampler, PROMPTS[:1], [3], size_px=Size(64, 96))
    torch.testing.assert_close(z, x)
    pictures = sample(pipe, sampler, PROMPTS[:2], [3, 3], size_px=Size(64, 96))
    assert pictures.shape == (2, 64, 96, 3)
    assert pictures[0].std() > 5 and np.abs(pictures[0].astype(int) - pictures[1]).mean() > 0.5


@torch.no_grad()
def test_latents_are_normalised_both_ways(pipe: Pipeline) -> None:
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    z = pipe.family.to_latents(pipe.vae, images)
    assert z.shape == (1, 4, 16, 24)
    torch.testing.assert_close(z, (pipe.vae.encode(images).latent_dist.mode() - 0.2) * 0.7)
    torch.testing.assert_close(pipe.family.from_latents(pipe.vae, z), pipe.vae.decode(z / 0.7 + 0.2).sample)


# ---- training


def test_gradient_reaches_every_weight_and_the_latents(pipe: Pipeline, cond: Conditioning) -> None:
    x = torch.randn(3, 4, 16, 16, requires_grad=True)
    pipe.transformer.requires_grad_(True)
    velocity(pipe.transformer, x, torch.full((3,), 0.7), cond).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.any() for p in pipe.transformer.parameters())
    pipe.transformer.zero_grad()
    pipe.transformer.requires_grad_(False)


def test_an_adapter_sits_on_every_target_and_checkpointing_changes_no_gradient(packed: Family, cond: Conditioning) -> None:
    pipe = import_module("flashgen_packed.build").build_pipeline(packed, 1)
    network: Any = pipe.transformer
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=packed.lora_targets, init_lora_weights=False), adapter_name="student")
    names = {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A" in name}
    assert names == {f"layers.{i}.{part}" for i in range(3) for part in ("to_q", "to_k", "to_v", "to_out", "mlp.up", "mlp.down")}
    x, gradients = torch.randn(3, 4, 16, 16), []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        velocity(network, x, torch.full((3,), 0.7), cond).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for n, p in network.named_parameters() if ".lora_" in n])
        network.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_block_features_are_the_image_tokens_where_they_lie(pipe: Pipeline, cond: Conditioning, size: Size) -> None:
    x = torch.randn(3, *pipe.family.latent_shape(pipe.configs, size))
    seen: list[Any] = []
    blocks = pipe.family.blocks(pipe.transformer)
    assert len(blocks) == pipe.family.num_blocks(pipe.configs) == 3
    handle = blocks[1].register_forward_hook(lambda *call: seen.append(call[2]))
    velocity(pipe.transformer, x, torch.full((3,), 0.7), cond)
    handle.remove()
    features = pipe.family.block_features(seen[0], x)
    assert features.shape == (3, pipe.family.width(pipe.transformer), size.height // 8, size.width // 8)
    assert torch.equal(features[:, :, 2, 1], seen[0][:, 2 * (size.width // 8) + 1])


def test_every_linear_is_protected_or_in_a_class_of_its_block(packed: Family, pipe: Pipeline) -> None:
    linears = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    for name in linears:
        block, kind = packed.layer_group(name)
        assert (kind is None) == name.startswith(packed.protect)
        assert block == (name if kind is None else ".".join(name.split(".")[:2]))
    assert packed.modulation is not None
    found = [name for name in linears if packed.modulation.search(name)]
    assert found == [f"layers.{i}.ada.linear" for i in range(3)]
    assert packed.layer_group(f"{found[0]}.up") == packed.layer_group(found[0])


# ---- export


def test_text_and_transformer_are_the_same_in_onnxruntime_on_a_wide_picture(pipe: Pipeline, sampler: Sampler, tmp_path: Path) -> None:
    sampler = sampler.model_copy(update={"size_px": Size(64, 96)})
    described = pipe.family.description(pipe.configs, sampler, {"tokenizer": 0})
    assert described["latent_shape"] == [4, 16, 24]
    seen = {}
    for part in itertools.islice(pipe.family.export_components(pipe, sampler), 2):  # the decoder is diffusers' own
        inputs = {name: value[:2] for name, value in part.inputs.items()}
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} | {a: torch.export.Dim(n) for a, n in part.dynamic.get(name, {}).items()} for name in inputs)
        program = torch.onnx.export(
            part.module.eval(), tuple(inputs.values()), dynamo=True, optimize=False, verbose=False, input_names=list(inputs),
            output_names=list(part.outputs), dynamic_shapes=(shapes,),
        )  # fmt: skip
        assert program is not None
        program.save(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        assert [put.name for put in session.get_inputs()] == list(inputs)
        for feeds in (part.inputs, *part.checks):
            outputs = session.run(list(part.outputs), {name: value.numpy() for name, value in feeds.items()})
            for got, wanted in zip(outputs, part.reference(feeds), strict=True):
                torch.testing.assert_close(torch.from_numpy(np.asarray(got)), wanted, rtol=1e-4, atol=1e-4)
        seen[part.name] = set(inputs)
    assert list(seen) == ["language_model", "transformer"]
    conditioning, names = described["conditioning"], described["transformer"]
    assert seen["transformer"] == {*conditioning, names["latents"], names["timestep"]}
    assert seen["language_model"] == {described["encoders"][0]["ids"], described["encoders"][0]["mask"]}
