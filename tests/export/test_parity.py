"""PSNR with a floor, over the examples and every further input set."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flashgen.errors import NumericsError
from flashgen.export.parity import Reference, check, largest_output, psnr_db, reference, require_half_range, why_no_half
from flashgen.export.write import write_graph
from flashgen.families.graphs import Call, Component
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.specs import SPECS
from flashgen.flow.grid import shifted_grid
from tests.conftest import tiny_sampler


def test_psnr_is_range_over_rms_error() -> None:
    expected = np.array([0.0, 10.0], np.float32)
    assert psnr_db(expected, expected + np.float32(0.01)) == pytest.approx(60, abs=0.01)
    assert psnr_db(expected, expected) == 200
    assert np.isnan(psnr_db(expected, np.array([np.nan, 0], np.float32)))


def test_parity_fails_when_only_a_further_input_set_differs(tmp_path: Path) -> None:
    """torch clips at 1, the graph does not: the examples are below, one check is above."""

    def clipped(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = net(x)
        return y if torch.compiler.is_exporting() else y.clamp(max=1)

    network = nn.Linear(2, 2)
    network.weight.data, network.bias.data = torch.eye(2), torch.zeros(2)
    low, high = {"x": torch.rand(3, 2) / 2}, {"x": torch.full((1, 2), 2.0)}
    component = Component("net", Call(network, clipped), low, ("y",), checks=(low, high))
    for checks, differs in (((low,), False), ((low, high), True), ((high, low), True)):
        part = replace(component, checks=checks, module=Call(nn.Linear(2, 2), clipped))
        part.module.net.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        expected = reference(part)
        assert len(expected.outputs) == 1 + len(checks)
        model = write_graph(part, {}, tmp_path)
        if differs:
            with pytest.raises(NumericsError, match=r"net: output y is at .* on input set [23] of 3"):
                check(part, expected, model, 60)
        else:
            assert check(part, expected, model, 60) > 100


@pytest.mark.parametrize(("size", "steps", "examples", "checks"), [(64, 4, 3, 1), (64, 2, 3, 0), (512, 4, 1, 3), (512, 28, 1, 7)])
def test_transformer_is_compared_at_every_node_or_at_eight(size: int, steps: int, examples: int, checks: int) -> None:
    spec = replace(SPECS["tiny"], transformer=SPECS["tiny"].transformer | {"pos_embed_max_size": 32})
    sampler = tiny_sampler(size_px=size, sigmas=shifted_grid(steps, 3.0))
    pipe = build_pipeline(spec, 0)
    part = next(p for p in pipe.family.export_components(pipe, sampler) if p.name == "transformer")
    assert (len(part.inputs["timestep"]), len(part.checks)) == (examples, checks)
    seen = torch.cat([part.inputs["timestep"], *(inputs["timestep"] for inputs in part.checks)]) / 1000
    nodes = torch.tensor(sampler.sigmas[:-1])
    assert torch.isin(nodes[-1], seen) and torch.isin(nodes[0], seen) and bool(torch.isin(seen, nodes).all())
    assert steps > 8 or bool(torch.isin(nodes, seen).all())
    assert all(len(value) == 1 for inputs in part.checks for value in inputs.values())


def test_layer_that_fp16_cannot_hold_ends_the_export_in_fp16() -> None:
    require_half_range("transformer", Reference([], ("a", 65503.0)))
    for value in (65504.0, np.inf):
        with pytest.raises(NumericsError, match=re.escape(f"transformer: its layer a puts out {value:.4g}, and fp16 ends at 65504;")):
            require_half_range("transformer", Reference([], ("a", value)))


def test_layer_that_leaves_fp16_is_named() -> None:
    loud = nn.Linear(2, 2)
    loud.weight.data.fill_(1e6)
    network = nn.Sequential(nn.Linear(2, 2), loud)
    with largest_output(network) as largest, torch.no_grad():
        network(torch.ones(1, 2))
        network(torch.full((1, 2), torch.nan))
    assert largest == {"0": np.inf, "1": np.inf}  # NaN counts as too large, and stays
    with largest_output(network) as largest, torch.no_grad():
        network(torch.ones(1, 2))
    assert largest["0"] < 10 and largest["1"] > 65504
    network(torch.full((1, 2), 1e9))
    assert largest["1"] < 1e9, "outputs outside of the context are not recorded"
    assert why_no_half({"vae_decoder": ("a", 7.0), "transformer": ("1", largest["1"])}).startswith(
        "no fp16 graph: transformer's 1 puts out"
    )
    assert "its range would do: vae_decoder's a puts out 7 on" in why_no_half({"vae_decoder": ("a", 7.0), "transformer": ("1", 2.0)})
