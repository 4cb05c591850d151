"""Names of SD3's own checkpoints, against diffusers' converter in the other direction."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from flashgen.errors import ArtifactError
from flashgen.families.sd3.original import originals
from flashgen.families.sd3.specs import SPECS


def checkpoint(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in originals(state):
        rows = torch.cat([state[name] for name in tensor.parts])
        found[tensor.name] = torch.cat(rows.chunk(2)[::-1]) if tensor.swapped else rows
    return found


def test_diffusers_converter_gives_every_tensor_back() -> None:
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) for k, v in SD3Transformer2DModel(**SPECS["tiny"].transformer).state_dict().items()}
    back = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_sd35_medium_has_the_names_and_shapes_of_its_checkpoint() -> None:
    with torch.device("meta"):
        state = SD3Transformer2DModel(**SPECS["sd35-medium"].transformer).state_dict()
        found = {name.removeprefix("model.diffusion_model."): tuple(t.shape) for name, t in checkpoint(state).items()}
        back = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint(state))
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}
    d = 1536
    outside = {
        "pos_embed": (1, 384 * 384, d),
        **{"x_embedder.proj.weight": (d, 16, 2, 2), "x_embedder.proj.bias": (d,)},
        **linear("t_embedder.mlp.0", d, 256),
        **linear("t_embedder.mlp.2", d, d),
        **linear("y_embedder.mlp.0", d, 2048),
        **linear("y_embedder.mlp.2", d, d),
        **linear("context_embedder", d, 4096),
        **linear("final_layer.adaLN_modulation.1", 2 * d, d),
        **linear("final_layer.linear", 64, d),
    }
    blocks: dict[str, tuple[int, ...]] = {}
    for i in range(24):
        x, context, only_reads = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block", i == 23
        blocks |= attention(f"{x}.attn", d) | mlp(f"{x}.mlp", d) | linear(f"{x}.adaLN_modulation.1", (9 if i < 13 else 6) * d, d)
        blocks |= attention(f"{x}.attn2", d) if i < 13 else {}
        blocks |= linear(f"{context}.adaLN_modulation.1", (2 if only_reads else 6) * d, d) | attention(f"{context}.attn", d, only_reads)
        blocks |= {} if only_reads else mlp(f"{context}.mlp", d)
    assert found == outside | blocks


def linear(name: str, n: int, k: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}


def attention(name: str, d: int, only_reads: bool = False) -> dict[str, tuple[int, ...]]:
    norms = {f"{name}.ln_{part}.weight": (64,) for part in "qk"}
    return linear(f"{name}.qkv", 3 * d, d) | norms | ({} if only_reads else linear(f"{name}.proj", d, d))


def mlp(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return linear(f"{name}.fc1", 4 * d, d) | linear(f"{name}.fc2", d, 4 * d)


def test_a_tensor_without_a_name_is_an_artifact_error() -> None:
    with pytest.raises(ArtifactError, match=r"no name for transformer_blocks.0.attn.extra.weight"):
        originals(["transformer_blocks.0.attn.extra.weight"])
