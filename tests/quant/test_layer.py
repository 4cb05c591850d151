from __future__ import annotations

import pytest
import torch

from flashgen.quant.layer import Rounding, layer_bits, quantize_layer, relative_error, stored_bytes, stored_tensors
from flashgen.quant.pack import dequantize


@pytest.mark.parametrize(("inputs", "group"), [(16, 16), (17, 32), (48, 64), (64, 64), (200, 256), (1536, 256), (8, 16)])
def test_group_is_cut_to_the_power_of_two_that_holds_the_row(inputs: int, group: int) -> None:
    assert Rounding(256, False).group_of(inputs) == group


def test_group_that_fits_the_row_stays() -> None:
    assert Rounding(32, False).group_of(48) == 32
    assert Rounding("channel", True).group_of(48) == 48


@pytest.mark.parametrize("symmetric", [True, False])
def test_cut_group_gives_the_weights_of_the_longer_one_in_fewer_bytes(symmetric: bool) -> None:
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    cut, padded = (quantize_layer(weight, 4, Rounding(group, symmetric)) for group in (256, 64))
    assert cut.group == padded.group == 64
    assert torch.equal(dequantize(cut), dequantize(padded))
    assert cut.codes.nbytes == 8 * 64 // 2  # 256 codes per row would be four times as many


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rounding", [Rounding(16, False), Rounding(16, True), Rounding(256, False), Rounding(32, False, "hqq")])
def test_stored_bytes_are_those_of_the_stored_tensors(bits: int, rounding: Rounding) -> None:
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(bits))
    tensors = stored_tensors(quantize_layer(weight, bits, rounding))
    assert stored_bytes(weight.shape, bits, rounding) == sum(tensor.nbytes for tensor in tensors.values())


def test_only_a_channel_that_was_asked_for_is_one() -> None:
    weight = torch.randn(4, 32)
    one_group, channel = quantize_layer(weight, 8, Rounding(32, True)), quantize_layer(weight, 8, Rounding("channel", True))
    assert channel.codes.shape == one_group.codes.shape and channel.channel and not one_group.channel


def test_gptq_without_moments_is_rounding_to_nearest() -> None:
    weight = torch.randn(4, 32)
    gptq, rtn = (quantize_layer(weight, 4, Rounding(16, False, method)) for method in ("gptq", "rtn"))
    assert torch.equal(gptq.codes, rtn.codes)
    moments = torch.randn(64, 32)
    assert not torch.equal(quantize_layer(weight, 4, Rounding(16, False, "gptq"), moments.T @ moments).codes, rtn.codes)


def test_protected_layers_keep_8_bits() -> None:
    assert [layer_bits(name, 3, ("proj_out", "norm")) for name in ("proj_out", "norm1.linear", "attn.proj_out")] == [8, 8, 3]
    assert layer_bits("proj_out", 4, ()) == 4


def test_relative_error_is_a_ratio_of_norms() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
