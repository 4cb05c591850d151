"""SD3 without T5: which tokens stay, and the small encoder that may take its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import T5EncoderModel

from flashgen import families
from flashgen.families.conditioning import Conditioning
from flashgen.families.sd3.build import t5_config
from flashgen.families.sd3.restructuring import WithoutT5
from flashgen.families.sd3.specs import SPECS
from flashgen.families.sd3.text import shares
from flashgen.recipe.compression import RestructureRecipe


def compact(folder: Path, config: RestructureRecipe) -> Any:
    return WithoutT5().compact_encoder(folder, config, 0)


def test_a_compact_encoder_is_a_smaller_t5_of_the_same_width_with_the_large_ones_embeddings(tmp_path: Path) -> None:
    large = T5EncoderModel(t5_config(SPECS["tiny"].t5 | {"num_layers": 4}, 40)).eval()
    large.encoder.final_layer_norm.weight.data.uniform_()
    large.save_pretrained(tmp_path / "text_encoder_3")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    small, again = (compact(tmp_path, RestructureRecipe()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.arange(12).reshape(2, 6)
    assert small(ids)[0].shape == large(ids)[0].shape
    assert (small.config.num_layers, small.config.num_heads, small.config.d_ff) == (1, 1, 32)
    assert torch.equal(small.shared.weight, large.shared.weight)
    assert torch.equal(small.encoder.final_layer_norm.weight, large.encoder.final_layer_norm.weight)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    wide = compact(tmp_path, RestructureRecipe(layers=3, heads=2, d_ff=8)).config
    assert (wide.num_layers, wide.num_heads, wide.d_ff) == (3, 2, 8)


def test_pruning_removes_the_encoders_tokens_and_a_new_output_takes_their_place() -> None:
    tensors = {"embeds": torch.randn(2, 24, 32), "pooled": torch.randn(2, 32)}
    cond, how = Conditioning(families.get("sd3"), tensors, shares(16, 16, 16, 16)), WithoutT5()
    assert torch.equal(how.pruned(cond).tensors["embeds"], tensors["embeds"][:, :16])
    assert torch.equal(how.share(cond), tensors["embeds"][:, 16:])
    output = torch.randn(2, 8, 32, requires_grad=True)
    changed = how.with_output(cond, output)
    assert torch.equal(how.share(changed), output) and how.share(changed).requires_grad
    assert all(torch.equal(how.pruned(changed).tensors[name], how.pruned(cond).tensors[name]) for name in tensors)
    assert how.tokens_after({"clip": 16, "t5": 8}, "prune") == {"clip": 16, "t5": 0}
    assert how.tokens_after({"clip": 16, "t5": 8}, "zeros") == how.tokens_after({"clip": 16, "t5": 8}, "compact") == {"clip": 16, "t5": 8}
