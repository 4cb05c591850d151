"""Memory that a training needs in one process."""

from __future__ import annotations

from dataclasses import dataclass

from flashgen.families.base import Forward
from flashgen.models.footprint import PROGRAM, Footprint, Parts
from flashgen.recipe.distillation import MatchingTraining
from flashgen.stages.base import Stage
from flashgen.stages.planning import ON_CPU


@dataclass(frozen=True)
class Held:
    """Memory that a training of `stage` holds while it runs, and how its batches pass.

    `frozen` are bytes of networks that do not learn; `networks` learn `learned` weights each, with `moments` bytes of optimizer state per
    weight, all optimizers together. `matching` is the batch of distribution matching, 0 without it; `adversarial`: with heads.
    """

    stage: Stage
    footprint: Footprint
    one: Forward
    frozen: float
    networks: int
    learned: int
    moments: float
    adapters: bool
    bytes_each: int  # of a number in activations
    steps: int = 0  # of the student
    matching: int = 0
    adversarial: bool = False
    validates: bool = False
    names: tuple[str, str] = ("teacher", "student and fake score")  # of what is frozen and of what learns
    whole: float = 0.0  # of the frozen bytes, those that every process keeps though it shards the others

    def fixed(self) -> Parts:
        """Memory held from beginning to end, whatever the training."""
        small = [name for name in self.footprint.encoders if not self.footprint.is_large(name)]
        parts = Parts(program=PROGRAM, vae=4.0 * self.footprint.parts["vae"].count)
        return parts | {"small text encoders": 4.0 * sum(self.footprint.parts[name].count for name in small)}

    def weights(self) -> Parts:
        """Networks without gradients, as they are when trajectories are computed."""
        shards = self.stage.machine.shards
        tables = 0 if self.adapters else 4.0 * self.networks * self.footprint.tables  # each copy of the network has its own
        sizes = (self.whole + (self.frozen - self.whole) / shards, 4.0 * self.networks * self.learned / shards + tables)
        return self.fixed() | dict(zip(self.names, sizes, strict=True))

    def training(self, rows: int) -> Parts:
        """Everything while `rows` samples pass together."""
        from flashgen.training.ranks import BUCKET

        machine, learned = self.stage.machine, self.learned / self.stage.machine.shards
        parts = self.weights() | {"gradients": 4.0 * learned, "optimizers": self.moments * learned}  # gradients of one at a time
        offloaded = machine.accelerated and not self.adapters and not machine.sharded  # as `training.roles.offloads`
        averages = 4.0 * (1 + (self.validates and self.stage.judges))  # bytes per weight, with the best validation's
        saved = 4.0 * self.networks + self.moments + averages  # of a checkpoint, of which each process copies a part
        parts[f"copy for a checkpoint{ON_CPU}"] = saved * self.learned / machine.processes
        copies = offloaded or self.validates  # of the weights, while they are averaged or while the average is drawn with
        parts[f"average{ON_CPU if offloaded else ''}"] = (averages + 4.0 * copies) * learned
        parts["temporaries of a step"] = 8.0 * min(learned, BUCKET)
        if self.stage.recipe.compute.precision == "bfloat16" and not self.adapters:
            parts["bf16 copies in autocast"] = 2.0 * self.learned  # torch keeps them until a forward pass ends
        if machine.sharded:
            parts["gathered blocks"] = 12.0 * self.learned / self.one.blocks  # two in fp32, and gradients of one
        parts["activations"] = float(rows * self.one.hidden * self._kept() * self.bytes_each)
        if self.matching:
            batch = self.matching // machine.processes
            cond = 2 * self.footprint.conditioning_bytes()
            parts["states of a batch"] = float(batch * (cond + 4 * (2 * self.steps + 12) * self.one.latent))
            parts[f"noise of a batch{ON_CPU}"] = 2 * 4.0 * self.matching * self.one.latent  # of all processes
        return parts

    def _kept(self) -> int:
        """Tensors of the size of a block's hidden states that are alive per sample at the peak of a student's step."""
        costs, blocks = self.footprint.family.costs, self.one.blocks
        block = costs.kept_with_adapters if self.adapters else costs.kept
        is_recomputed = self.stage.recipe.compute.activation_checkpointing
        graph = blocks + block if is_recomputed else block * blocks
        if not self.matching:
            return graph
        waiting = blocks if is_recomputed else graph  # the student's, while the teacher runs with and without the prompt
        return max(graph, waiting + max(2 * costs.running, graph if self.adversarial else 0))

    def sampling(self, micro_batch: int, states: int, guided: bool) -> Parts:
        """Everything while a part of a cache is computed, with `states` per sample."""
        from flashgen.training.cache import SHARD as together

        rows = min(together, micro_batch or together)
        running = self.footprint.family.costs.running * (2 if guided else 1)
        parts = self.weights() | {"activations": float(rows * self.one.hidden * running * self.bytes_each)}
        return parts | {"states of a part": float(together * (self.footprint.conditioning_bytes() + 2 * 4 * states * self.one.latent))}


def passing(stage: Stage, micro_batch: int, batch: int) -> int:
    """Samples of a batch that pass together in one process."""
    own = max(1, batch // stage.machine.processes)
    return min(own, micro_batch or own)


def has_heads(matching: MatchingTraining, steps: int) -> bool:
    """Return True if the matching trains discriminator heads."""
    return matching.iterations > 0 and any(matching.node_weights(steps)["adversarial"])
