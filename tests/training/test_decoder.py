"""The loss of the tiny decoder: what it is zero for, who gets gradient, and that micro-batches see the same crops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.graphs import Call, Component
from flashgen.models.pipeline import Pipeline
from flashgen.models.tiny_decoder import new_tiny_decoder, tiny_component
from flashgen.recipe.compression import DecoderRecipe
from flashgen.training.cache import Replay
from flashgen.training.decoder import decoder_loss, psnr_db, random_crops, squared_errors
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws


@pytest.fixture
def replay(pool: PromptPool) -> Replay:
    return Replay.from_states(torch.randn(8, 2, 16, 6, 10, generator=torch.Generator().manual_seed(0)).half(), pool)


def test_loss_is_zero_for_the_vae_itself_and_its_gradient_is_the_decoders(pipe: Pipeline, replay: Replay) -> None:
    tiny, config = new_tiny_decoder(16, 8, 8, 1, 0).decoder, DecoderRecipe(crop=4)

    def vae(z: Tensor) -> Tensor:
        return pipe.family.from_latents(pipe.vae, z)

    class Vae(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return vae(z)

    assert decoder_loss(Vae(), vae, replay, 8, config)(Draws(4, 1)).item() == 0
    pipe.vae.requires_grad_(True)
    decoder_loss(tiny, vae, replay, 8, config)(Draws(4, 1)).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in tiny.parameters()) and all(p.grad is None for p in pipe.vae.parameters())


def test_each_term_sees_its_own_error(replay: Replay) -> None:
    """A decoder that is off by a constant errs in pixels and colours; one that is off by a chessboard in pixels and edges."""
    black = torch.zeros

    def board(z: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(8 * z.shape[2]), torch.arange(8 * z.shape[3]), indexing="ij")
        return (1 - 2 * ((rows + columns) % 2)).float().expand(len(z), 3, -1, -1)

    class Off(nn.Module):
        def __init__(self, error: str) -> None:
            super().__init__()
            self.error = error

        def forward(self, z: Tensor) -> Tensor:
            return board(z) if self.error == "board" else torch.ones(len(z), 3, 8 * z.shape[2], 8 * z.shape[3])

    def vae(z: Tensor) -> Tensor:
        return black(len(z), 3, 8 * z.shape[2], 8 * z.shape[3])

    config = DecoderRecipe(gradient=10, coarse=100)
    losses = {error: decoder_loss(Off(error), vae, replay, 8, config)(Draws(4, 1)).item() for error in ("constant", "board")}
    assert losses == {"constant": pytest.approx(1 + 100), "board": pytest.approx(1 + 10 * 4)}


def test_micro_batches_decode_the_crops_of_the_batch(replay: Replay) -> None:
    z = replay.pictures(torch.arange(4))
    together = random_crops(z, Draws(4, 5), 4)
    parts = [random_crops(z[part.part], part, 4) for part in Draws(4, 5).micro_batches(1)]
    assert together.shape == (4, 16, 4, 4) and torch.equal(torch.cat(parts), together)
    assert not torch.equal(together, random_crops(z, Draws(4, 6), 4)) and torch.equal(random_crops(z, Draws(4, 5), 99), z)


def test_psnr_is_that_of_pictures_whose_range_is_two() -> None:
    def constant(value: float) -> nn.Module:
        return nn.Identity() if value == 0 else _Constant(value)

    errors = squared_errors(constant(0.5), constant(0.3), iter([torch.ones(1, 3, 4, 4)]))
    assert errors == [pytest.approx(0.04)] and psnr_db(errors[0]) == pytest.approx(20) and psnr_db(0) == pytest.approx(100)
    assert squared_errors(constant(3), constant(2), iter([torch.ones(1, 3, 4, 4)])) == [0]  # both are white


def test_a_component_in_fp16_takes_and_gives_fp32() -> None:
    network = new_tiny_decoder(16, 8, 8, 1, 0)
    latents = {"latent_sample": torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))}
    part = Component("vae_decoder", Call(network, network.decode), latents, ("sample",))
    tiny = tiny_component(part, network, {"scaling_factor": 1.3, "shift_factor": 0.1})
    expected = tiny.reference()[0]
    tiny.module.half()
    assert (out := tiny.reference()[0]).dtype == torch.float32
    assert out.shape == expected.shape == (1, 3, 32, 48) and torch.allclose(out, expected, atol=0.01) and not torch.equal(out, expected)


class _Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, z: Tensor) -> Tensor:
        return torch.full_like(z, self.value)
