"""flashgen restructure-encoder --mode decoder: the student with a tiny decoder, which learns what the VAE makes of the student's latents.

All other files are linked: the VAE stays, and diffusers and torch draw with it. `export` takes the tiny decoder in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.artifact.draft import Draft
from flashgen.artifact.files import sha256
from flashgen.artifact.hub import HUB, check_origin, fetch
from flashgen.artifact.manifest import hash_json
from flashgen.errors import NumericsError, UsageError
from flashgen.families.configs import configs_in
from flashgen.families.tiny_decoder import CONFIG, TINY_DECODER, WEIGHTS, levels
from flashgen.models.footprint import LIVE_IMAGES, PROGRAM, Footprint, Parts
from flashgen.pixels import slices, to_uint8
from flashgen.progress import say
from flashgen.recipe.compression import DecoderRecipe
from flashgen.runtime.accelerator import drawing_dtype
from flashgen.runtime.processes import from_first
from flashgen.stages.base import Result, Stage, Takes
from flashgen.stages.judging import score_floor
from flashgen.stages.needs import Held, passing
from flashgen.stages.planning import Plan
from flashgen.stages.trainings import Networks, check_optimizer, compute_key, moment_bytes
from flashgen.stages.trajectories import embedding_room, own_steps, prompt_needs, stage_pool

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashgen.training.cache import Replay

SETTING = "restructure.decoder"
KEPT = 3  # tensors that a block, and a change of resolution, keep for the backward pass


@dataclass
class TrainDecoder(Stage):
    """Student to the same student with a tiny decoder."""

    name = "restructure-encoder"
    takes: ClassVar[Takes] = {"student": ("student",)}
    kind = "student"

    @property
    def config(self) -> DecoderRecipe:
        """The stage's part of the recipe."""
        return self.recipe.restructure.decoder

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(channels of the latents, pixels per latent along a side) of the source's VAE."""
        configs = configs_in(self.source.path, self.family)
        return self.family.latent_shape(configs, self.sampler.size_px)[0], self.family.vae_factor(configs)

    @cached_property
    def start(self) -> Path | None:
        """Folder of the tiny decoder to start from, downloaded if it is on the hub; None without one."""
        if (origin := self.config.start) is None:
            return None
        check_origin(origin, f"{SETTING}.start: ")
        return fetch(origin.removeprefix(HUB), [CONFIG, WEIGHTS]) if origin.startswith(HUB) else Path(origin)

    @property
    def num_latents(self) -> int:
        """Trajectories of the student: for training, and held out."""
        return (self.recipe.restructure.prompts if self.config.iterations else 0) + self.config.held_out

    def check(self) -> None:
        from flashgen.models.tiny_decoder import load_tiny_decoder

        if levels(self.shape[1]) is None:
            raise UsageError(
                f"{self.source.path}: its VAE has {self.shape[1]} pixels per latent along a side, and a tiny decoder, which doubles its "
                "resolution at each level, has a power of two; keep the VAE"
            )
        self.require_prompts()
        check_optimizer(self)
        if self.start is not None:
            load_tiny_decoder(self.start, *self.shape)
        elif not self.config.iterations:
            raise UsageError(f"{SETTING}.iterations=0 trains nothing; give a tiny decoder with --set {SETTING}.start=FOLDER|hf:OWNER/NAME")

    def settings(self) -> dict[str, Any]:
        own = self.config.model_dump(mode="json", exclude={"psnr_floor_db"})
        if self.start is not None:
            own["start_sha256"] = hash_json([sha256(self.start / name) for name in (CONFIG, WEIGHTS)])
        return {"mode": "decoder", "prompts": self.recipe.restructure.prompts, "decoder": own} | self.prompts_key() | compute_key(self)

    def plan_with(self, micro_batch: int) -> Plan:
        footprint, config, one = Footprint(self.source), self.config, Footprint(self.source).forward()
        count, steps, rows = self.num_latents, self.sampler.num_steps, passing(self, micro_batch, config.batch)
        size = 2 if self.recipe.compute.precision == "bfloat16" else 4
        held = Held(self, footprint, one, float(size * footprint.transformer.count), 0, 0, 0.0, False, size, names=("student", "learned"))
        stored, encoders = prompt_needs(self, footprint, count)
        text, adds = footprint.embedding(count, embedding_room(self))
        memory = {"embed": text, "trajectories": held.sampling(micro_batch, steps + 1, False) | encoders}
        memory["train"], decoding = self._training(footprint, rows)
        learned, channels = memory["train"]["tiny decoder"], int(footprint.decoder["channels"])
        full = 4.0 * LIVE_IMAGES * channels * prod(self.sampler.size_px)
        memory["measure"] = memory["train"] | {"activations": full}
        work = {"bf16": adds, "fp32": decoding}
        work["bf16" if size == 2 else "fp32"] += count * steps * one.multiply_adds
        shared = stored + 2.0 * count * (steps + 1) * one.latent
        advice = {"train": f"use --set {SETTING}.crop=N or a lower compute.micro_batch", "trajectories": "use --set compute.micro_batch=1"}
        disk = shared + (self.recipe.checkpoint.keep + 1) * learned
        plan = Plan(memory, disk, count * steps, work, advice, shared, self.machine, rows)
        plan.add_validation(footprint, self.recipe.bench, self.num_validation_pictures)
        return plan

    def _training(self, footprint: Footprint, rows: int) -> tuple[Parts, float]:
        """(memory while `rows` crops pass together, multiply-adds of the training and of its measurement).

        Multiply-adds are those of torch on tensors without numbers.
        """
        from flashgen.models.networks import empty_network

        config, factor, size = self.config, self.shape[1], self.sampler.size_px
        tiny, vae = self._new().to("meta"), empty_network(self.source.path, "vae", self.family)
        sides = [min(side // factor, config.crop) for side in size]
        pixels, widths, blocks = prod(sides) * factor**2, tiny.config.decoder_block_out_channels, tiny.config.num_decoder_blocks
        per_pixel = sum(
            width * (KEPT * count + KEPT) / 4**level for level, (width, count) in enumerate(zip(widths, reversed(blocks), strict=True))
        )
        activations = 4.0 * rows * pixels * max(per_pixel, LIVE_IMAGES * int(footprint.decoder["channels"]))
        learned = sum(parameter.numel() for parameter in tiny.decoder.parameters())
        state = 12 + moment_bytes(config, self.recipe.compute.optimizer_bits)  # bytes per weight: itself, its gradient, its average
        parts = Parts(program=PROGRAM, vae=4.0 * footprint.parts["vae"].count, activations=activations)
        parts["tiny decoder"] = float(state * learned)
        per_tiny, per_vae = multiply_adds(tiny.decoder, self.shape[0], sides), multiply_adds(self._decode(vae), self.shape[0], sides)
        measured = config.held_out * prod(size) / pixels * (per_vae + per_tiny)
        return parts, config.iterations * config.batch * (per_vae + 3 * per_tiny) + measured

    def make(self, draft: Draft) -> Result:
        import torch

        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.save import save_changed, save_network
        from flashgen.models.tiny_decoder import load_tiny_decoder
        from flashgen.training.decoder import decoder_loss, psnr_db, squared_errors
        from flashgen.training.recovery import recover

        config, count = self.config, self.num_latents - self.config.held_out
        replay = self._trajectories(draft)
        vae = self._decode(load_pipeline(self.source.path, weights="vae", device=self.device).vae)
        tiny = self._new().to(self.device)
        loss = decoder_loss(tiny.decoder, vae, replay, count, config)
        recover(
            tiny.decoder, loss, config, config.iterations, self.seed, draft.work, self.recipe.checkpoint, "decoder",
            device=self.device, micro_batch=self.micro_batch, optimizer_bits=self.recipe.compute.optimizer_bits,
        )  # fmt: skip
        save_network(tiny, draft.path / TINY_DECODER)
        tiny = load_tiny_decoder(draft.path / TINY_DECODER, *self.shape).to(self.device)  # in fp16, as it will be read
        held_out = (replay.pictures(torch.tensor([row])) for row in range(count, self.num_latents))
        errors = squared_errors(tiny.decoder, vae, held_out)
        psnr, worst = psnr_db(sum(errors) / len(errors)), psnr_db(max(errors))
        say(f"tiny decoder: {psnr:.1f} dB against the VAE on {len(errors)} held-out latents, the worst {worst:.1f} dB")
        if not psnr >= config.psnr_floor_db:  # NaN is below, too
            raise NumericsError(
                f"the tiny decoder is at {psnr:.1f} dB PSNR against the VAE on {len(errors)} held-out latents, below "
                f"{SETTING}.psnr_floor_db={config.psnr_floor_db:g}; train longer with --set {SETTING}.iterations=N, or lower the floor"
            )
        save_changed(draft, self.source.path, self.family, {}, kept=(TINY_DECODER,))
        measured = {"psnr_db": round(psnr, 2), "psnr_worst_db": round(worst, 2)} | self._validate(draft, tiny.decoder)
        return Result(self.sampler, {**self.source.manifest.metrics, TINY_DECODER: measured}, validate=False)

    def _new(self) -> Any:
        """The AutoencoderTiny before training."""
        from flashgen.models.tiny_decoder import load_tiny_decoder, new_tiny_decoder

        if self.start is not None:
            return load_tiny_decoder(self.start, *self.shape)
        return new_tiny_decoder(*self.shape, self.config.width, self.config.blocks, self.seed)

    def _decode(self, vae: Any) -> Callable[[Tensor], Tensor]:
        return lambda z: self.family.from_latents(vae, z)

    def _trajectories(self, draft: Draft) -> Replay:
        """Rollouts of the student, whose networks are gone from memory afterwards."""
        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import latent_shape

        text = load_pipeline(self.source.path, weights="text", device=self.device)
        pool = stage_pool(self, self.num_latents, self.seed + 3, text, self.sampler, draft.cache)
        del text
        pipe = load_pipeline(self.source.path, weights="transformer", device=self.device)
        student = Networks.of(self).frozen(pipe.transformer)
        return own_steps(self, student, pool, latent_shape(pipe, self.sampler.size_px), draft.cache)

    def _validate(self, draft: Draft, decoder: nn.Module) -> dict[str, Any]:
        """Draw validation pictures through the tiny decoder into the draft and judge them; returns the scores by metric.

        Raises NumericsError when the score is worse than `restructure.floor` of the student's own allows.
        """
        import numpy as np

        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import sample_latents
        from flashgen.stages.report import VALIDATION_SEED, check_floor, copy_records, grid_prompts, save_grid, score

        copy_records(draft)
        prompts, batch = grid_prompts(self, VALIDATION_SEED), self.recipe.bench.batch
        if not prompts:
            return {}
        pipe = load_pipeline(self.source.path, drawing_dtype(self.device), device=self.device)
        z = sample_latents(pipe, self.sampler, prompts, list(range(len(prompts))), batch)
        images = np.concatenate([to_uint8(decoder(z[rows]).detach().cpu().numpy()) for rows in slices(len(z), batch)])
        save_grid(images, draft.path / "samples" / "validation.png")
        judge = self.judge
        if not self.judges or judge is None:
            return {}
        judgement = from_first(lambda: score(judge, images, prompts))
        say(f"{judge.metric} on {len(prompts)} validation prompts, through the tiny decoder: {judgement.overall:.3f}")
        if floor := score_floor(self):
            check_floor(judge, judgement.overall, *floor, f"{SETTING}.iterations")
        return {judge.metric: judgement.scores}


def multiply_adds(decode: Callable[[Tensor], Tensor], channels: int, sides: Sequence[int]) -> float:
    """Multiply-adds of decoding one latent [1, channels, *sides] with networks that have no weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decode(torch.empty(1, channels, *sides, device="meta"))
    return float(counter.get_total_flops()) / 2
