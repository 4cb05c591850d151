from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flashgen.artifact.store import Artifact
from flashgen.models.networks import linears_of
from flashgen.models.sample import load_pipeline
from flashgen.quant.pack import QuantizedLinear
from flashgen.quant.rounding import quantize_groups
from flashgen.training.calibration import CLASSES, Calibration, groups_of
from flashgen.training.prompts import prompt_pool

NODES = [1.0, 0.75, 0.0]


@pytest.fixture(scope="module")
def calibrated(tiny_student: Artifact) -> Calibration:
    pipe = load_pipeline(tiny_student.path)
    noise = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return Calibration(pipe.transformer, prompt_pool(pipe, 3, 0, 16).cond, noise, NODES)


def test_groups_hold_every_layer_once_and_know_all_classes(calibrated: Calibration) -> None:
    groups = groups_of(list(calibrated.layers))
    assert sorted(name for names in groups.values() for name in names) == sorted(calibrated.layers)
    assert {group.split(" ", 1)[1] for group in groups if " " in group} == set(CLASSES.values())
    assert groups["proj_out"] == ["proj_out"]
    first = groups["transformer_blocks.0 attention in"]
    own = ["to_q", "to_k", "to_v"]
    both = [f"attn.{n}" for n in (*own, "add_k_proj", "add_v_proj", "add_q_proj")] + [f"attn2.{n}" for n in own]
    assert sorted(first) == sorted(f"transformer_blocks.0.{name}" for name in both)


def test_damage_is_zero_for_the_student_as_it_is_and_sensitivity_leaves_it_so(calibrated: Calibration, tmp_path: Path) -> None:
    before = {name: layer.weight.clone() for name, layer in calibrated.layers.items()}
    groups = dict(list(groups_of(list(calibrated.layers)).items())[:3])
    path = tmp_path / "found.json"

    def nearest(name: str, layer: nn.Linear, bits: int) -> QuantizedLinear:
        return quantize_groups(layer.weight, bits, 16, False)

    def refuse(name: str, layer: nn.Linear, bits: int) -> QuantizedLinear:
        raise AssertionError(f"{name} is measured again")

    found = calibrated.sensitivity(groups, [2, 8], nearest, path)
    assert found.keys() == groups.keys() and all(0 < row[8] < row[2] for row in found.values())
    assert calibrated.damage() == 0
    assert all(torch.equal(layer.weight, before[name]) for name, layer in calibrated.layers.items())
    assert calibrated.sensitivity(groups, [2, 8], refuse, path) == found  # read, not measured again


def test_moments_are_of_the_inputs_at_every_node(calibrated: Calibration) -> None:
    """adaLN's input is one token a picture: silu(time + text), so its moments are those of 3 prompts x 2 nodes vectors."""
    name = "transformer_blocks.1.norm1.linear"
    seen: list[torch.Tensor] = []
    handle = calibrated.layers[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    moments = calibrated.moments([name])
    handle.remove()
    x = torch.cat(seen)
    assert x.shape == (3 * 2, calibrated.layers[name].in_features)
    assert torch.allclose(moments[name], x.T @ x, rtol=1e-4, atol=1e-5)
    assert not calibrated.layers[name]._forward_pre_hooks


def test_repair_undoes_what_two_scalars_a_step_can(calibrated: Calibration) -> None:
    """A student whose velocities are all 0.8 of what they were: the steps get 1.25, and nothing is left of the damage."""
    output = calibrated.layers["proj_out"]
    whole = output.weight.data.clone(), output.bias.data.clone()
    try:
        output.weight.data *= 0.8
        output.bias.data *= 0.8
        scales, before, after = calibrated.repair()
    finally:
        output.weight.data, output.bias.data = whole
    np.testing.assert_allclose(scales, [(1, 1.25)] * 2, atol=1e-4)
    assert before > 1e-4 and after < 1e-9
    np.testing.assert_allclose(calibrated.repair()[0], [(1, 1)] * 2, atol=1e-4)


def test_linears_are_in_the_order_of_the_network(calibrated: Calibration) -> None:
    blocks = [int(name.split(".")[1]) for name in linears_of(calibrated.student) if name.startswith("transformer_blocks")]
    assert blocks == sorted(blocks) and len(set(blocks)) > 1
