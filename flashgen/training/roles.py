"""Teacher, student and proxy on one frozen backbone: a LoRA adapter for each of the two that learn (peft).

A `Role` looks like a network of its own: called, it switches the backbone to its adapter; its parameters and its state are
the adapter's alone. The switch sets which adapter peft's layers use and nothing else. peft's own `set_adapter` also turns
`requires_grad` of the inactive adapters off, and a backward that comes after such a switch loses its gradients without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashgen.recipe.schema import LoraTraining


class Backbone:
    """A transformer with peft adapters, and which one is at work; None is the frozen network itself."""

    def __init__(self, transformer: nn.Module, lora: LoraTraining, roles: list[str], seed: int) -> None:
        self.transformer = transformer.requires_grad_(False)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=lora.targets, init_lora_weights=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            for role in roles:
                torch.manual_seed(seed)  # the same A for all: averages of A and B apart, as coupling takes them, are then those of B A
                transformer.add_adapter(config, adapter_name=role)  # type: ignore[operator]
        self.layers = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                parameter.data = parameter.data.float()  # what learns in small steps does not learn in bf16
        if lora.checkpointing:
            transformer.enable_gradient_checkpointing(self._checkpoint)  # type: ignore[operator]
        self.switch(None)

    def switch(self, role: str | None) -> None:
        self.role = role
        for layer in self.layers:
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]

    def _checkpoint(self, block: nn.Module, *arguments: Any) -> Any:
        """A block is computed again in the backward pass, when another role may be at work: each takes its own along."""
        role = self.role

        def run(*inputs: Any) -> Any:
            before = self.role
            self.switch(role)
            try:
                return block(*inputs)
            finally:
                self.switch(before)

        return checkpoint(run, *arguments, use_reentrant=False)


class Role(nn.Module):
    """One network of several on a `Backbone`. Gradient: its adapter's matrices only (none for the teacher, `adapter` None)."""

    def __init__(self, backbone: Backbone, adapter: str | None) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # not a child: its parameters belong to other roles too
        self.adapter = adapter

    def forward(self, x: Tensor, embeds: Tensor, pooled: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """In the backbone's dtype inside, in that of `x` outside; the timestep is never rounded."""
        self.backbone.switch(self.adapter)
        own = self.backbone.transformer.dtype
        return (self.backbone.transformer(x.to(own), embeds.to(own), pooled.to(own), timestep, return_dict=return_dict)[0].to(x.dtype),)

    def __getattr__(self, name: str) -> Any:
        if name in ("transformer_blocks", "config"):
            return getattr(self.backbone.transformer, name)
        return super().__getattr__(name)

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.backbone.transformer.named_parameters(*arguments, **options):
            if self.adapter is not None and f".{self.adapter}." in name and ".lora_" in name:
                yield name, parameter

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor], *arguments: Any, **options: Any) -> None:  # type: ignore[override]
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            raise ValueError(f"not the state of adapter {self.adapter}: {sorted(own.keys() ^ state.keys())[:3]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def names(self) -> list[str]:
        """Of the tensors of the dense network that this role is."""
        return [name.replace(".base_layer.", ".") for name in self.backbone.transformer.state_dict() if ".lora_" not in name]

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """One tensor of that network: W + (alpha / rank) B A, in fp32, where there is an adapter."""
        module, _, part = name.rpartition(".")
        layer: Any = self.backbone.transformer.get_submodule(module)
        if not hasattr(layer, "get_delta_weight"):
            whole: Tensor = getattr(layer, part)
            return whole
        value: Tensor = getattr(layer.get_base_layer(), part)
        return value.float() + layer.get_delta_weight(self.adapter).float() if part == "weight" and self.adapter else value


def roles_on(transformer: nn.Module, lora: LoraTraining, *names: str, seed: int) -> tuple[Role, ...]:
    """(teacher, one role for each of `names`) on `transformer`. All equal it at first, since every B starts at zero."""
    with torch.random.fork_rng(devices=[]):
        backbone = Backbone(transformer, lora, list(names), seed)
    return (Role(backbone, None), *(Role(backbone, name) for name in names))


@torch.no_grad()
def interpolate(high: Role, low: Role, weight_high: float) -> dict[str, Tensor]:
    """Dense weights of W + w B_h A_h + (1 - w) B_l A_l, by name: the exact interpolation of two adapters.

    peft's `combination_type="linear"` averages A and B apart, so that cross terms B_h A_l appear: no interpolation.
    """
    return {name: torch.lerp(low.merged(name), high.merged(name), weight_high) for name in high.names()}
