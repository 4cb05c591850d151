"""The ruler of the benchmark pages: its intervals and its count of forwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.scores import Bar, Meter, half_interval, interval, ratio_interval, ratio_of_distances


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=10)
    without = [float(np.delete(values, i).mean()) for i in range(10)]
    run: dict[str, Any] = {"fd": float(values.mean()), "without": {"fd": without}}
    assert half_interval([run], "fd") == pytest.approx(1.96 * values.std(ddof=1) / 10**0.5)
    same_prompts = [run | {"fd": run["fd"] + shift} for shift in (-1.0, 0.0, 1.0)]
    assert half_interval(same_prompts, "fd") == pytest.approx(1.96 * (values.var(ddof=1) / 10 + 1 / 3) ** 0.5)


def test_interval_holds_the_mean_and_widens_with_disagreeing_runs() -> None:
    agreeing = np.tile(np.arange(200) % 2, (3, 1)).astype(float)
    value, low, high = interval(agreeing)
    assert value == 0.5 and 0.4 < low < 0.5 < high < 0.6
    _, low_2, high_2 = interval(np.stack([np.zeros(200), np.ones(200), agreeing[0]]))
    assert high_2 - low_2 > 2 * (high - low)


def test_ratio_of_equal_verdicts_is_one_for_sure() -> None:
    passed = (np.arange(50) % 5 > 0).astype(float)
    assert ratio_interval(passed, passed) == (1.0, 1.0, 1.0)


def test_a_distance_over_itself_is_one_and_prompts_that_disagree_widen_the_interval() -> None:
    one: dict[str, Any] = {"fd": 2.0, "without": {"fd": [1.9, 2.0, 2.1] * 3 + [2.0]}}
    assert ratio_of_distances(one, one, "fd") == (1.0, 1.0, 1.0)
    steady: dict[str, Any] = {"fd": 1.0, "without": {"fd": [1.0] * 10}}
    value, low, high = ratio_of_distances(one, steady, "fd")
    assert value == 2 and 2 - low == pytest.approx(high - 2) == pytest.approx(half_interval([one], "fd"))


@pytest.mark.parametrize(("measured", "bar", "met"), [(1.0, ">= 1.00", True), (0.99, ">= 1.00", False), (16.0, "<= 16", True)])
def test_a_bar_is_met_on_its_own_side(measured: float, bar: str, met: bool) -> None:
    assert Bar("x", measured, bar).met is met


class Block(nn.Linear):
    """As in diffusers: (text, image) out."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # a block gives two
        return x, super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(2, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.transformer_blocks[0](x)
        return found


def test_meter_counts_a_forward_once_and_a_backward_twice() -> None:
    net = Net()
    with Meter().on(net) as meter:
        with torch.no_grad():
            net(torch.ones(3, 2))
        assert meter.forwards == 3
        net(torch.ones(4, 2))[1].sum().backward()
        assert meter.forwards == 3 + 4 + 8
    net(torch.ones(1, 2))
    assert meter.forwards == 15  # hooks are gone
