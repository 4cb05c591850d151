"""flashgen restructure-encoder: run without the family's large text encoder (SD3: T5-XXL), or with a small one.

`zeros` keeps the encoder's empty tokens, `prune` removes them from the sequence, `compact` has a small encoder make them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flashgen.artifact.draft import Draft
from flashgen.errors import UsageError
from flashgen.families.base import Restructuring
from flashgen.models.footprint import PROGRAM, Footprint, Parts
from flashgen.recipe.compression import RestructureRecipe
from flashgen.stages.base import Result, Stage, Takes
from flashgen.stages.judging import score_floor
from flashgen.stages.needs import Held, passing
from flashgen.stages.planning import Plan
from flashgen.stages.trainings import Networks, check_optimizer, compute_key, moment_bytes, regression_state
from flashgen.stages.trajectories import embedding_room, own_steps, prompt_needs, stage_pool

if TYPE_CHECKING:
    from torch import nn

Mode = Literal["zeros", "prune", "compact"]


@dataclass
class RestructureEncoder(Stage):
    """Student to student without its large text encoder."""

    mode: Mode = "prune"

    name = "restructure-encoder"
    takes: ClassVar[Takes] = {"student": ("student",)}
    kind = "student"
    shards = True

    @property
    def config(self) -> RestructureRecipe:
        """The stage's section of the recipe."""
        return self.recipe.restructure

    @property
    def how(self) -> Restructuring:
        """The family's part of the work. Raises UsageError for a family that has nothing to remove."""
        if self.family.restructuring is None:
            raise UsageError(
                f"{self.source.path}: {self.family.models} has no text encoder that a student can do without, so there is nothing to "
                "restructure; go on with: flashgen quantize"
            )
        return self.family.restructuring

    @property
    def trains(self) -> bool:
        """Whether a network is trained; otherwise files are linked or left out."""
        return self.mode == "compact" or (self.mode == "prune" and self.config.iterations > 0)

    def check(self) -> None:
        encoder = self.how.encoder
        if self.sampler.encoder != "full":
            raise UsageError(
                f"{self.source.path} is restructured already (mode {self.sampler.encoder}); give a student that still has its {encoder}"
            )
        if self.trains:
            self.require_prompts()
            check_optimizer(self)

    def settings(self) -> dict[str, Any]:
        prompts = self.prompts_key() if self.trains else {}
        return self.config.model_dump(mode="json", exclude={"floor", "decoder"}) | {"mode": self.mode} | prompts | compute_key(self)

    def plan_with(self, micro_batch: int) -> Plan:
        footprint, config, steps = Footprint(self.source), self.config, self.sampler.num_steps
        plan = Plan({"link": Parts(program=PROGRAM)}, 1 << 20, machine=self.machine)
        if self.trains:
            held, rows = self._held(footprint), passing(self, micro_batch, config.batch)
            forwards = config.iterations * config.batch * 8 + config.prompts * steps
            text, adds = footprint.embedding(config.prompts, embedding_room(self))
            states = config.prompts * (steps + 1) if config.iterations else 0
            stored, encoders = prompt_needs(self, footprint, config.prompts)
            memory = {"embed": text, "train": held.training(rows) | encoders}
            if config.iterations:
                memory["trajectories"] = held.sampling(micro_batch, steps + 1, False) | encoders
            shared = stored + 2 * states * held.one.latent
            kept = self.recipe.checkpoint.keep * (2 if self.mode == "compact" and config.iterations else 1)
            state = regression_state(config, self.recipe.compute.optimizer_bits)
            disk = shared + 2 * held.learned + (kept + 1) * state * held.learned  # one more while it is being written
            advice = "use --mode zeros, or --mode prune with --set restructure.iterations=0, which load nothing"
            tokens = self.sampler.tokens[footprint.family.text_encoders[self.how.encoder].tokens]
            adds += config.embedding * config.batch * 3 * held.learned * tokens
            number = "bf16" if held.bytes_each == 2 else "fp32"
            work = {"bf16": adds, number: adds * (number == "bf16") + forwards * held.one.multiply_adds}
            plan = Plan(memory, disk, forwards, work, {"train": advice, "trajectories": advice}, shared, self.machine, rows)
        plan.add_validation(footprint, self.recipe.bench, self.num_validation_pictures)
        return plan

    def _held(self, footprint: Footprint) -> Held:
        """Networks that the training holds: the student and its successor."""
        count, size = footprint.transformer.count, 2 if self.recipe.compute.precision == "bfloat16" else 4
        learned = footprint.learnable if self.mode == "prune" else footprint.parts[self.how.encoder].count // 8
        return Held(
            self,
            footprint,
            footprint.forward(),
            float(size * count),
            1,
            learned,
            moment_bytes(self.config, self.recipe.compute.optimizer_bits),
            False,
            size,
            names=("student", "successor"),
        )

    def make(self, draft: Draft) -> Result:
        from flashgen.models.save import save_changed

        encoder, sampler = self.how.encoder, self.sampler
        changed = self._trained(draft) if self.trains else {}
        dropped = () if self.mode == "compact" else (encoder, self.family.text_encoders[encoder].tokenizer)
        save_changed(draft, self.source.path, self.family, changed, dropped=dropped)
        after = sampler.model_copy(update={"encoder": self.mode, "tokens": self.how.tokens_after(sampler.tokens, self.mode)})
        bytes_before = sum(file.size for file in self.source.manifest.files if file.path.startswith(f"{encoder}/"))
        bytes_after = sum(f.stat().st_size for f in (draft.path / encoder).glob("*")) if after.has_all_encoders else 0
        tokens = {"before": sum(sampler.tokens.values()), "after": sum(after.tokens.values())}
        sizes = {"encoder_bytes": {"before": bytes_before, "after": bytes_after}, "bytes_saved": bytes_before - bytes_after}
        return Result(after, {**sizes, "text_tokens": tokens}, floor=score_floor(self))

    def _trained(self, draft: Draft) -> dict[str, nn.Module]:
        """The network that takes over, by the component that it replaces."""
        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import latent_shape
        from flashgen.training.recovery import embedding_loss, pruned_loss, recover, vision_loss
        from flashgen.training.shards import gathered_network

        config, nodes, how, checkpoint, work = self.config, self.sampler.sigmas, self.how, self.recipe.checkpoint, draft.work
        text = load_pipeline(self.source.path, weights="text", device=self.device)  # no transformer in memory yet
        pool = stage_pool(self, config.prompts, self.seed + 3, text, self.sampler, draft.cache)
        del text
        networks, pipe = Networks.of(self), load_pipeline(self.source.path, weights="training", device=self.device)
        options: dict[str, Any] = {"device": self.device, "micro_batch": self.micro_batch}
        options["optimizer_bits"] = self.recipe.compute.optimizer_bits
        shape = latent_shape(pipe, self.sampler.size_px)
        slim = networks.learning(copy.deepcopy(pipe.transformer)) if self.mode == "prune" else None
        student = networks.frozen(pipe.transformer)
        replay = own_steps(self, student, pool, shape, draft.cache) if config.iterations else None
        if slim is not None:
            if config.adapter:
                how.text_embedder(slim.requires_grad_(False)).requires_grad_(True)
            assert replay is not None
            loss = pruned_loss(slim, replay, nodes, how)
            recover(slim, loss, config, config.iterations, self.seed, work, checkpoint, blocks=self.family.blocks(slim), **options)
            return {"transformer": gathered_network(slim, self.family)}
        prompts = self.training_prompts(config.prompts, self.seed + 3)
        ids = {name: value.to(self.device) for name, value in self.family.tokenize(pipe, prompts, self.sampler)[how.encoder].items()}
        small = how.compact_encoder(self.source.path, config, self.seed).to(self.device)
        recover(small, embedding_loss(small, pool, ids, how), config, config.embedding, self.seed, work, checkpoint, "embedding", **options)
        if replay:
            recover(
                small,
                vision_loss(small, student, replay, ids, nodes, how),
                config,
                config.iterations,
                self.seed,
                work,
                checkpoint,
                **options,
            )
        return {how.encoder: small}
