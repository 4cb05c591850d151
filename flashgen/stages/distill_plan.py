"""Memory, disk and time that `flashgen distill` needs."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from flashgen.families.base import Forward
from flashgen.models.footprint import Footprint
from flashgen.stages.needs import Held, has_heads, passing
from flashgen.stages.pictures import add_pictures
from flashgen.stages.planning import Plan
from flashgen.stages.tracking import learning_cost, matching_forwards
from flashgen.stages.trainings import adapter_count, checkpoint_bytes, moment_bytes
from flashgen.stages.trajectories import cached_sizes, embedding_room, prompt_needs

if TYPE_CHECKING:
    from flashgen.stages.distill import Distill

MEMORY_ADVICE = (
    "use --recipe sd35-medium-24gb (on a GPU sd35-medium-lora), or --set distill.lora.rank=64 --set distill.lora.base=bfloat16 "
    "--set compute.activation_checkpointing=true, or lower compute.micro_batch and distill.size_px (or distill.sizes)"
)


def plan(stage: Distill, micro_batch: int) -> Plan:
    """Plan of `stage` with `micro_batch` samples that pass together (0: all of a process)."""
    footprint, config = Footprint(stage.source), stage.config
    lora, matching, bits = config.lora, config.matching, stage.recipe.compute.optimizer_bits
    forwards_of = [footprint.forward(size) for size in config.all_sizes]
    one, latent = max(forwards_of, key=lambda forward: forward.tokens), fmean(forward.latent for forward in forwards_of)
    held, (states, on_policy, cached, prompts) = (
        _held(stage, footprint, one),
        cached_sizes(config, stage.taught.shift, stage.inputs["start"].manifest.sampler if stage.follows_start else None),
    )
    prompts += [stage.pictures.num_captions] if stage.pictures else []
    stored, encoders = prompt_needs(stage, footprint, *prompts)
    rows = max((passing(stage, micro_batch, batch) for batch in config.batches), default=0)
    text, text_adds = footprint.embedding(sum(prompts), embedding_room(stage))
    memory = {"embed": text, "train": held.training(rows) | encoders}
    if cached:
        guided = not stage.follows_start and config.trajectory.guidance != 1
        memory["trajectories"] = held.sampling(micro_batch, config.steps + 1, guided) | encoders
    if stage.machine.sharded:  # before a process keeps its part it has read the teacher and, without adapters, copied it in float32
        memory["load"] = held.fixed() | {"full networks": held.frozen if lora else 8.0 * footprint.transformer.count}
    learning = learning_cost(stage)
    matched = matching_forwards(matching, config.steps, learning) * matching.batch
    regressed = sum(part.iterations * part.batch for part in (config.trajectory, config.on_policy))
    forwards = cached + round(matched) + regressed * learning
    if encoders:  # the text of every sample, not of every prompt
        rounds = matching.iterations + matching.fake_score_warmup if matching.iterations else 0
        drawn = rounds * matching.batch + regressed + (prompts[1] if cached else 0)
        text_adds = drawn * footprint.embedding(1)[1]
    transformers = 2 if matching.validate_every and matching.iterations and stage.judges else 1  # the best validation's and the last
    shared = stored + 2 * states * latent
    disk = shared + 2 * on_policy * latent + 2 * transformers * footprint.transformer.count
    disk += held.learned * (checkpoint_bytes(config, stage.recipe.checkpoint.keep, bits) + (2 if lora else 0))  # the LoRA file
    number = "bf16" if held.bytes_each == 2 else "fp32"
    work = {"bf16": text_adds, number: text_adds * (number == "bf16") + forwards * fmean(f.multiply_adds for f in forwards_of)}
    advice = {"train": MEMORY_ADVICE, "trajectories": MEMORY_ADVICE}
    needed = Plan(memory, disk, forwards, work, advice, shared, stage.machine, rows)
    add_pictures(needed, footprint, stage.pictures)
    needed.add_validation(footprint, stage.recipe.bench, stage.num_validation_pictures)
    return needed


def _held(stage: Distill, footprint: Footprint, one: Forward) -> Held:
    """Networks that the larger one of the trainings holds."""
    config, lora, matching = stage.config, stage.config.lora, stage.config.matching
    frozen = 2 if (lora.base if lora else stage.recipe.compute.precision) == "bfloat16" else 4
    count = footprint.transformer.count
    learned = adapter_count(footprint.transformer, lora, footprint.family.lora_targets) if lora else footprint.learnable
    bits = stage.recipe.compute.optimizer_bits
    moments = [moment_bytes(part, bits) for part in (config.trajectory, config.on_policy) if part.iterations]
    moments += [2 * moment_bytes(matching, bits)] if matching.iterations else []
    parts = [part for part in (config.trajectory, config.on_policy, matching) if part.iterations]
    return Held(
        stage, footprint, one, float(frozen * count + 4 * count * stage.follows_start), 2 if lora or matching.iterations else 1, learned,
        max(moments, default=0), lora is not None, 2 if stage.recipe.compute.precision == "bfloat16" else frozen,
        config.steps, matching.batch if matching.iterations else 0, has_heads(matching, config.steps),
        any(part.validate_every for part in parts),
    )  # fmt: skip
