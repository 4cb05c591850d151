from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashgen import families
from flashgen.artifact.store import Artifact
from flashgen.errors import NumericsError
from flashgen.families.sd3 import LAYER_CLASSES
from flashgen.models.networks import linears_of
from flashgen.models.pipeline import load_pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.quant.activations import BINS, best_input_scale, rounded
from flashgen.quant.pack import InputScale, QuantizedLinear, dequantize
from flashgen.quant.rounding import quantize_groups
from flashgen.training.calibration import (
    Calibration,
    input_scales,
    layer_blocks,
    layer_groups,
    observed,
    static_candidates,
    with_rounded_inputs,
    with_weights,
)

NODES = [1.0, 0.75, 0.0]
SD3 = families.get("sd3")


@pytest.fixture(scope="module")
def calibrated(tiny_student: Artifact) -> Calibration:
    """Three prompts at two nodes, pictures of 96 x 64."""
    pipe, sampler = load_pipeline(tiny_student.path), tiny_student.manifest.sampler
    assert sampler is not None
    noise = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    cond = encode_prompts(pipe, ["a red circle", "two blue squares", ""], sampler)
    return Calibration(pipe.transformer, cond, noise, NODES)


def test_groups_hold_every_layer_once_and_know_all_classes(calibrated: Calibration) -> None:
    groups = layer_groups(calibrated.layers, SD3)
    assert sorted(name for names in groups.values() for name in names) == sorted(calibrated.layers)
    assert {group.split(" ", 1)[1] for group in groups if " " in group} == set(LAYER_CLASSES.values())
    assert groups["proj_out"] == ["proj_out"]
    first = groups["transformer_blocks.0 attention in"]
    inputs = ["to_q", "to_k", "to_v"]
    both = [f"attn.{n}" for n in (*inputs, "add_k_proj", "add_v_proj", "add_q_proj")] + [f"attn2.{n}" for n in inputs]
    assert sorted(first) == sorted(f"transformer_blocks.0.{name}" for name in both)


def test_blocks_hold_every_layer_once_in_the_order_of_the_network(calibrated: Calibration) -> None:
    blocks = layer_blocks(calibrated.layers, SD3)
    assert [name for names in blocks for name in names] == list(calibrated.layers)
    several = [names for names in blocks if len(names) > 1]
    assert [{name.split(".")[1] for name in names} for names in several] == [{"0"}, {"1"}]


def test_error_is_zero_for_the_unchanged_student_and_sensitivity_restores_it(calibrated: Calibration, tmp_path: Path) -> None:
    before = {name: layer.weight.clone() for name, layer in calibrated.layers.items()}
    groups = dict(list(layer_groups(calibrated.layers, SD3).items())[:3])
    path = tmp_path / "errors.json"

    def nearest(names: Sequence[str], bits: int) -> AbstractContextManager[None]:
        layers = [calibrated.layers[name] for name in names]
        return with_weights(layers, lambda layer: dequantize(quantize_groups(layer.weight, bits, 16, False)))

    def refuse(names: Sequence[str], bits: int) -> AbstractContextManager[None]:
        raise AssertionError(f"{names} are measured again")

    errors = calibrated.sensitivity(groups, [2, 8], nearest, path)
    assert errors.keys() == groups.keys() and all(0 < row[8] < row[2] for row in errors.values())
    assert calibrated.latent_error() == 0
    assert all(torch.equal(layer.weight, before[name]) for name, layer in calibrated.layers.items())
    assert calibrated.sensitivity(groups, [2, 8], refuse, path) == errors  # read, not measured again


def test_error_is_a_ratio_of_squares_of_the_final_latents(calibrated: Calibration) -> None:
    latents = calibrated.states[-1]
    layer = calibrated.layers["proj_out"]
    with torch.no_grad():
        layer.bias.add_(0.1)
        changed = calibrated.rollouts()[-1]
        error = calibrated.latent_error(slice(1, 3))
        layer.bias.sub_(0.1)
    expected = ((changed - latents)[1:].square().sum() / latents[1:].square().sum()).item()
    assert error == pytest.approx(expected, rel=1e-6) and error > 0


def test_moments_are_those_of_the_inputs_at_every_node(calibrated: Calibration) -> None:
    """adaLN reads one vector per picture, silu(time + text), so its moments are those of 3 prompts x 2 nodes vectors."""
    name = "transformer_blocks.1.norm1.linear"
    seen: list[Tensor] = []
    with observed({name: calibrated.layers[name]}, lambda _, x: seen.append(x.clone())):
        moments = calibrated.moments([name])
    x = torch.cat(seen)
    assert x.shape == (3 * 2, calibrated.layers[name].in_features)
    assert torch.allclose(moments[name], x.T @ x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrated.inputs(name, slice(1, 2)), x.reshape(2, 3, -1)[:, 1])
    assert not calibrated.layers[name]._forward_pre_hooks


def test_blocks_are_calibrated_behind_quantized_ones(tiny_student: Artifact, calibrated: Calibration, tmp_path: Path) -> None:
    own = Calibration(load_pipeline(tiny_student.path).transformer, calibrated.cond, calibrated.noise, NODES)
    original = own.moments(list(own.layers))
    given: dict[str, Tensor] = {}

    def quantize(name: str, layer: nn.Linear, moments: Tensor | None) -> QuantizedLinear:
        assert moments is not None
        given[name] = moments
        return quantize_groups(layer.weight, 2, 16, False)

    codes = own.quantize_in_order(quantize, tmp_path)
    assert list(codes) == list(own.layers)
    assert all(torch.equal(layer.weight, dequantize(codes[name])) for name, layer in own.layers.items())
    first, last = layer_blocks(own.layers, SD3)[0][0], layer_blocks(own.layers, SD3)[-1][0]
    assert torch.equal(given[first], original[first]) and not torch.allclose(given[last], original[last], rtol=1e-2)
    given.clear()
    again = own.quantize_in_order(quantize, tmp_path)
    assert not given and all(torch.equal(again[name].codes, q.codes) for name, q in codes.items())


def test_input_scales_cover_every_node_and_prompt_of_their_half(calibrated: Calibration) -> None:
    name = "transformer_blocks.1.ff.net.0.proj"
    x = calibrated.inputs(name, slice(0, 2))
    (scale,) = calibrated.input_scales([name], slice(0, 2)).values()
    ends = -scale.scale * scale.zero, scale.scale * (255 - scale.zero)
    assert 0.5 * x.min() > ends[0] > 1.02 * x.min() and 0.5 * x.max() < ends[1] < 1.02 * x.max()
    first = calibrated.inputs(name, slice(0, 1))
    assert (rounded(x[None], scale) - x).norm() <= (rounded(x[None], best_of(first)) - x).norm()


def best_of(x: Tensor) -> InputScale:
    return best_input_scale(torch.histc(x, BINS, float(x.min()), float(x.max())), float(x.min()), float(x.max()))


def test_rounded_inputs_cause_an_error_that_ends_with_them(calibrated: Calibration) -> None:
    layers, names = calibrated.layers, [name for name in calibrated.layers if "ff" in name]
    scales = calibrated.input_scales(names, slice(0, 2))
    with with_rounded_inputs(layers, scales):
        fine = calibrated.latent_error()
    with with_rounded_inputs(layers, {name: InputScale(16 * scale.scale, scale.zero) for name, scale in scales.items()}):
        coarse = calibrated.latent_error()
    assert 0 < fine < coarse / 4 and calibrated.latent_error() < fine / 1e6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unseen", "proj_out ran in 2 of 4 passes"),
        ("nan", "an input of proj_out is not finite"),
        ("zero", "the inputs of proj_out are all 0"),
    ],
)
def test_calibration_that_gives_no_scale_names_the_layer(calibrated: Calibration, fault: str, message: str) -> None:
    layer = calibrated.layers["proj_out"]
    factor = {"unseen": 1.0, "nan": torch.nan, "zero": 0.0}[fault]
    handle = layer.register_forward_pre_hook(lambda _, x: (factor * x[0],))
    try:
        with pytest.raises(NumericsError, match=rf"{message}.*quantize\.protect"):
            input_scales({"proj_out": layer}, calibrated.rollouts, 4 if fault == "unseen" else 2)
    finally:
        handle.remove()


def test_adaln_and_protected_layers_stay_dynamic(calibrated: Calibration) -> None:
    names = static_candidates(calibrated.layers, SD3, SD3.protect)
    assert {SD3.layer_group(name)[1] for name in names} == {"attention in", "attention out", "feed-forward up", "feed-forward down"}
    assert set(static_candidates(calibrated.layers, SD3, ())) - set(names) >= {"proj_out", "context_embedder"}


def test_step_scales_undo_a_change_of_scale(calibrated: Calibration) -> None:
    """A student whose velocities are all 0.8 of what they were: the steps get 1.25, and no error is left."""
    output = calibrated.layers["proj_out"]
    weight, bias = output.weight.data.clone(), output.bias.data.clone()
    try:
        output.weight.data *= 0.8
        output.bias.data *= 0.8
        scales, before, after = calibrated.fit_step_scales()
    finally:
        output.weight.data, output.bias.data = weight, bias
    np.testing.assert_allclose(scales, [(1, 1.25)] * 2, atol=1e-4)
    assert before > 1e-4 and after < 1e-9
    np.testing.assert_allclose(calibrated.fit_step_scales()[0], [(1, 1)] * 2, atol=1e-4)


def test_linears_are_in_the_order_of_the_network(calibrated: Calibration) -> None:
    blocks = [int(name.split(".")[1]) for name in linears_of(calibrated.student) if name.startswith("transformer_blocks")]
    assert blocks == sorted(blocks) and len(set(blocks)) > 1
