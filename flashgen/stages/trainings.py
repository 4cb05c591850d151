"""What the stages that train share: checks, and the sizes of what they keep."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashgen.errors import MachineError, UsageError
from flashgen.families.base import compute_in
from flashgen.families.configs import configs_in
from flashgen.models.footprint import Tensors
from flashgen.recipe.base import Training
from flashgen.recipe.distillation import LoraTraining, MatchingTraining, TrajectoryTraining
from flashgen.recipe.schema import ComputeRecipe
from flashgen.runtime.accelerator import dtype_of
from flashgen.runtime.processes import check_batch
from flashgen.stages.base import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flashgen.training.roles import Role

BEST_STATE = 4  # bytes of a checkpoint per learned weight for the best weights, when a training validates
FORWARD_AND_BACKWARD, WITH_CHECKPOINTING = 3, 4  # cost of a training pass, in forward passes


@dataclass(frozen=True)
class Networks:
    """How a training holds its networks: on `device`, computing in `dtype`, as `compute` says."""

    device: torch.device
    dtype: torch.dtype
    compute: ComputeRecipe

    @classmethod
    def of(cls, stage: Stage) -> Networks:
        """Raises MachineError when the device cannot compute in the recipe's precision."""
        compute = stage.recipe.compute
        return cls(stage.device, dtype_of(compute.precision, stage.device), compute)

    @property
    def autocast(self) -> torch.dtype | None:
        """What `families.base.predict` casts to; None where everything is float32."""
        return None if self.compute.precision == "float32" else self.dtype

    def frozen(self, network: nn.Module) -> nn.Module:
        """`network`, in place, without gradient and in `dtype`."""
        return network.requires_grad_(False).to(self.device, self.dtype)

    def learning(self, network: nn.Module) -> nn.Module:
        """`network`, in place, with gradient: float32 weights, passes in `dtype`, activations recomputed where the recipe asks for it."""
        compute_in(network, self.autocast)
        if self.compute.activation_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' ModelMixin
        return network.requires_grad_(True).to(self.device)

    def roles(self, network: nn.Module, lora: LoraTraining, *names: str, seed: int, targets: str) -> tuple[Role, ...]:
        """`training.roles.roles_on`, with adapters inside autocast."""
        from flashgen.training.roles import roles_on

        compute_in(network, self.autocast)
        return roles_on(network, lora, *names, seed=seed, targets=targets, checkpointing=self.compute.activation_checkpointing)


def moment_bytes(training: Training) -> int:
    """Bytes of an optimizer's state per weight: two moments, or one where beta1 is 0. Muon, with one, is counted as AdamW."""
    return 4 if training.betas[0] == 0 else 8


def regression_state(training: Training) -> int:
    """Bytes of a regression's checkpoint per learned weight: weights, EMA, moments."""
    return 8 + moment_bytes(training)


def matching_state(matching: MatchingTraining) -> int:
    """Bytes of matching's checkpoint per learned weight: student, fake score, EMA, moments of two."""
    return 12 + 2 * moment_bytes(matching) + (BEST_STATE if matching.validate_every else 0)


def check_matching(stage: Stage, matching: MatchingTraining, batches: list[int]) -> None:
    """Raises UsageError for blocks that the transformer does not have and batches that the processes cannot share."""
    source = stage.source
    num_blocks = stage.family.num_blocks(configs_in(source.path))
    if any(not 0 <= block < num_blocks for block in matching.adversarial.blocks):
        setting = f"{stage.name}.matching.adversarial.blocks={matching.adversarial.blocks}"
        raise UsageError(f"{setting}: the transformer's blocks are 0 to {num_blocks - 1}")
    if not matching.min_sigma < matching.max_sigma:
        raise UsageError(f"{stage.name}.matching.min_sigma={matching.min_sigma} must be below max_sigma={matching.max_sigma}")
    for batch in batches:
        check_batch(batch, stage.machine.processes)


def check_compiler(without: str) -> None:
    """Raises MachineError when torch.compile would find no C++ compiler; `without` is the `--set` value that turns compiling off."""
    if name := missing_compiler():
        raise MachineError(
            f"torch.compile needs a C++ compiler and there is no '{name}'; install one (CXX names another), or --set {without}"
        )


def missing_compiler() -> str | None:
    """Name of the C++ compiler that torch.compile would look for, if it is not installed."""
    name = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # as torch._inductor looks for one
    return name if shutil.which(name) is None else None


def adapter_count(transformer: Tensors, lora: LoraTraining, targets: str) -> int:
    """Number of weights that one adapter learns."""
    pattern = lora.targets or targets
    return sum(lora.rank * sum(shape) for name, shape in transformer.linears.items() if re.fullmatch(pattern, name))


def matching_rounds(matching: MatchingTraining) -> int:
    """Rounds of a matching training, warm-up included."""
    return matching.iterations + matching.fake_score_warmup if matching.iterations else 0


def guided_forwards(trajectory: TrajectoryTraining) -> int:
    """Forward passes of one trajectory of the guided teacher."""
    return trajectory.teacher_steps * (1 if trajectory.guidance == 1 else 2)


def plain_config(config: Any) -> dict[str, Any]:
    """A network's config without the notes of the library that wrote it."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
