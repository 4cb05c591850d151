"""Code shared by the stages that train: checks, and the sizes of what they keep."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flashgen.errors import MachineError, UsageError
from flashgen.families.base import Family, compute_in
from flashgen.families.configs import configs_in
from flashgen.flow.grid import shifted_grid
from flashgen.flow.guidance import total_forwards
from flashgen.models.footprint import Tensors
from flashgen.recipe.base import Training
from flashgen.recipe.distillation import DistillRecipe, LoraTraining, MatchingTraining, SkipLayers, TrajectoryTraining
from flashgen.recipe.schema import ComputeRecipe
from flashgen.runtime.accelerator import dtype_of
from flashgen.runtime.processes import check_batch
from flashgen.stages.base import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flashgen.training.roles import Role

BEST_STATE = 4  # bytes of a checkpoint per learned weight for the best weights, when a training validates


@dataclass(frozen=True)
class Networks:
    """How a training holds its networks: on `device`, computing in `dtype`, as `compute` says, and sharded where the launch asks for it.

    With `compiled` their blocks go through torch.compile.
    """

    device: torch.device
    dtype: torch.dtype
    compute: ComputeRecipe
    family: Family
    compiled: bool = False

    @classmethod
    def of(cls, stage: Stage, compiled: bool = False) -> Networks:
        """Raises MachineError when the device cannot compute in the recipe's precision."""
        compute = stage.recipe.compute
        return cls(stage.device, dtype_of(compute.precision, stage.device), compute, stage.family, compiled)

    @property
    def autocast(self) -> torch.dtype | None:
        """Type that `families.base.predict` casts to; None where everything is float32."""
        return None if self.compute.precision == "float32" else self.dtype

    def frozen(self, network: nn.Module) -> nn.Module:
        """`network`, in place, without gradient and in `dtype`."""
        return self._finished(network.requires_grad_(False).to(self.device, self.dtype))

    def learning(self, network: nn.Module) -> nn.Module:
        """`network`, in place, with gradient: float32 weights, passes in `dtype`, activations recomputed where the recipe asks for it."""
        compute_in(network, self.autocast)
        if self.compute.activation_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' ModelMixin
        return self._finished(network.requires_grad_(True).to(self.device))

    def roles(self, network: nn.Module, lora: LoraTraining, *names: str, seed: int) -> tuple[Role, ...]:
        """`training.roles.roles_on`, with adapters inside autocast."""
        from flashgen.training.roles import roles_on

        compute_in(network, self.autocast)
        checkpointing, targets = self.compute.activation_checkpointing, self.family.lora_targets
        roles = roles_on(network, lora, *names, seed=seed, targets=targets, checkpointing=checkpointing)
        self._finished(network)
        return roles

    def _finished(self, network: nn.Module) -> nn.Module:
        from flashgen.training.shards import shard

        shard(network, self.family)
        if self.compiled:
            compile_blocks(network, self.family)
        return network


def compile_blocks(network: nn.Module, family: Family) -> None:
    """Let each block of `network` run through torch.compile, in place; the rest of a pass is not compiled.

    Blocks of one kind share what is compiled, for batches and pictures of any size, since the number of rows changes from round to
    round. Hooks on blocks stay outside, so they may come and go.
    """
    import torch

    torch._dynamo.config.recompile_limit = 256  # kinds of blocks, adapters, with or without gradient, one sample or several: 8 are too few
    for block in family.blocks(network):
        kind: Any = type(block)  # mypy: no Hashable
        block.__class__ = _compiled(kind)


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with a compiled forward method: a compiled method of each block would refer to its block, which would outlive its network."""
    import torch

    return type(kind.__name__, (kind,), {"forward": torch.compile(kind.forward, dynamic=True)})


def moment_bytes(training: Training, bits: int) -> float:
    """Bytes of an optimizer's state per weight: two moments of `bits`, or one where beta1 is 0 and `bits` 32.

    Moments of 8 bits have a scale per 256 numbers. Muon, with one moment of 32 bits, is counted as AdamW, but not below its own.
    """
    if bits == 32:
        return 4 if training.betas[0] == 0 else 8
    return 4 if getattr(training, "muon_lr", 0) or getattr(training, "fake_score_muon_lr", 0) else 2 * (1 + 4 / 256)


def regression_state(training: Training, bits: int) -> float:
    """Bytes of a regression's checkpoint per learned weight: weights, EMA, moments."""
    return 8 + moment_bytes(training, bits)


def matching_state(matching: MatchingTraining, bits: int) -> float:
    """Bytes of matching's checkpoint per learned weight: student, fake score, EMA, moments of two."""
    return 12 + 2 * moment_bytes(matching, bits) + (BEST_STATE if matching.validate_every else 0)


def checkpoint_bytes(config: DistillRecipe, keep: int, bits: int) -> float:
    """Bytes of all checkpoints of `distill` per learned weight; a checkpoint is written beside the `keep` that stay."""
    sizes = [regression_state(part, bits) for part in (config.trajectory, config.on_policy) if part.iterations]
    sizes += [matching_state(config.matching, bits)] if config.matching.iterations else []
    return keep * sum(sizes) + max(sizes, default=0)


def compute_key(stage: Stage) -> dict[str, Any]:
    """The settings of `compute` that change what is learned. Students from before there were `optimizer_bits` stay up to date."""
    compute = stage.recipe.compute
    return {"precision": compute.precision} | ({"optimizer_bits": compute.optimizer_bits} if compute.optimizer_bits != 32 else {})


def check_optimizer(stage: Stage) -> None:
    """Raises MachineError without the package for 8-bit moments, and UsageError for such moments of sharded weights."""
    if stage.recipe.compute.optimizer_bits == 32:
        return
    if find_spec("bitsandbytes") is None:
        raise MachineError(
            "compute.optimizer_bits=8 needs bitsandbytes, which is not installed: pip install 'flashgen[nf4]', "
            "or --set compute.optimizer_bits=32"
        )
    if stage.machine.sharded:
        raise UsageError("compute.optimizer_bits=8 does not go with FSDP2, whose shards bitsandbytes cannot update; set it to 32")


def check_matching(stage: Stage, matching: MatchingTraining, batches: list[int]) -> None:
    """Raises UsageError for blocks that the transformer does not have and batches that the processes cannot share."""
    _check_blocks(stage, f"{stage.name}.matching.adversarial.blocks", matching.adversarial.blocks)
    _check_skip_layers(stage, f"{stage.name}.matching.skip_layers", matching.skip_layers)
    _check_skip_layers(stage, "distill.trajectory.skip_layers", stage.recipe.distill.trajectory.skip_layers)
    if not matching.min_sigma < matching.max_sigma:
        raise UsageError(f"{stage.name}.matching.min_sigma={matching.min_sigma} must be below max_sigma={matching.max_sigma}")
    for batch in batches:
        check_batch(batch, stage.machine.processes)


def _check_skip_layers(stage: Stage, setting: str, skip: SkipLayers | None) -> None:
    """Raises UsageError for blocks that the transformer does not have, and for a family whose transformer always runs all of them."""
    if skip is not None and stage.family.skip_argument is None:
        raise UsageError(f"{setting}: {stage.family.models} cannot leave out blocks of its transformer; set it to null")
    _check_blocks(stage, f"{setting}.blocks", skip.blocks if skip else [])


def _check_blocks(stage: Stage, setting: str, blocks: list[int]) -> None:
    num_blocks = stage.family.num_blocks(configs_in(stage.source.path, stage.family))
    if any(not 0 <= block < num_blocks for block in blocks):
        raise UsageError(f"{setting}={blocks}: the transformer's blocks are 0 to {num_blocks - 1}")


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


def guided_forwards(trajectory: TrajectoryTraining, shift: float) -> int:
    """Forward passes of one trajectory of the guided teacher, whose grid has `shift`."""
    from flashgen.training.rollout import guidance_of

    return total_forwards(guidance_of(trajectory, shift), shifted_grid(trajectory.teacher_steps, shift))


def plain_config(config: Any) -> dict[str, Any]:
    """A network's config without the notes of the library that wrote it."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
