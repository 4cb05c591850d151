"""Teacher, student and fake score on one frozen backbone: a LoRA adapter for each role that learns (peft).

A `Role` is called like a network of its own: it switches the backbone to its adapter; its parameters and its state are
the adapter's alone. The switch sets which adapter peft's layers use and nothing else. peft's own `set_adapter` also turns
`requires_grad` of the inactive adapters off, and a backward pass after such a switch silently loses its gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from flashgen.families.base import predict
from flashgen.randomness import seeded
from flashgen.recipe.distillation import LoraTraining
from flashgen.training.shards import full


class Backbone:
    """A frozen transformer with peft adapters, one of which is active; None is the transformer without adapters."""

    def __init__(
        self, transformer: nn.Module, lora: LoraTraining, roles: list[str], seed: int, targets: str, checkpointing: bool = False
    ) -> None:
        self.transformer = transformer.requires_grad_(False)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=targets, init_lora_weights=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
            for role in roles:
                with seeded(seed):  # equal A for all: then averages of A and of B, as `align` takes them, are averages of B A
                    transformer.add_adapter(config, adapter_name=role)  # type: ignore[operator]
        self.layers: list[Any] = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self.layers:  # autocast casts inputs itself; peft would first cast them to the adapters' float32
            layer.cast_input_dtype_enabled = getattr(transformer, "compute_dtype", None) is None
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name and parameter.dtype != torch.float32:  # small updates are lost in bf16
                torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().float()))  # type: ignore[no-untyped-call]  # torch's
        if checkpointing:
            transformer.enable_gradient_checkpointing(self._checkpoint)  # type: ignore[operator]
        self.switch(None)

    def switch(self, role: str | None) -> None:
        """Activate the adapter of `role`; None: the transformer without adapters."""
        self.role = role
        for layer in self.layers:  # private attributes of peft, which tests/training/test_roles.py pins
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]

    def _checkpoint(self, block: nn.Module, *arguments: Any) -> Any:
        """Run a block whose activations are recomputed in the backward pass with the role of its forward pass, whatever is active then."""
        role = self.role

        def run(*inputs: Any) -> Any:
            active = self.role
            self.switch(role)
            try:
                return block(*inputs)
            finally:
                self.switch(active)

        return checkpoint(run, *arguments, use_reentrant=False)


class Role(nn.Module):
    """One network of several on a `Backbone`. Gradient: its adapter's matrices only (none for the teacher, `adapter` None)."""

    backbone: Backbone

    def __init__(self, backbone: Backbone, adapter: str | None) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # not a submodule: its parameters belong to other roles too
        self.adapter = adapter

    @property
    def network(self) -> nn.Module:
        """The transformer under the adapters."""
        return self.backbone.transformer

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self.network.config

    def forward(self, return_dict: bool = False, **inputs: Any) -> tuple[Tensor]:
        """Output of the transformer for its keyword arguments, with this role's adapter."""
        self.backbone.switch(self.adapter)
        return (predict(self.network, inputs),)

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's matrices by their names in the transformer."""
        for name, parameter in self.network.named_parameters(*arguments, **options):
            if self.adapter is not None and f".{self.adapter}." in name and ".lora_" in name:
                yield name, parameter

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter's matrices alone."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor], *arguments: Any, **options: Any) -> None:  # type: ignore[override]
        """Copy `state` into the adapter. Raises ValueError if it is not the state of this adapter."""
        parameters = dict(self.named_parameters())
        if parameters.keys() != state.keys():
            raise ValueError(f"not the state of adapter {self.adapter}: {sorted(parameters.keys() ^ state.keys())[:3]}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def names(self) -> list[str]:
        """Names of the tensors of the dense network that this role stands for."""
        return [name.replace(".base_layer.", ".") for name in self.network.state_dict() if ".lora_" not in name]

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """One tensor of that dense network: W + (alpha / rank) B A in fp32 where there is an adapter.

        Sharded weights are gathered; then all processes must ask for the same names in the same order.
        """
        module, _, part = name.rpartition(".")
        layer: Any = self.network.get_submodule(module)
        if not hasattr(layer, "get_delta_weight"):
            return full(getattr(layer, part))
        value = full(getattr(layer.get_base_layer(), part))
        return value.float() + full(layer.get_delta_weight(self.adapter)).float() if part == "weight" and self.adapter else value


def unwrap(network: nn.Module) -> nn.Module:
    """The transformer under a `Role`; any other network itself."""
    return network.network if isinstance(network, Role) else network


def offloads(network: nn.Module) -> bool:
    """Return True if averages of `network` belong into the CPU's memory: those of a dense network on an accelerator that is not sharded."""
    parameter = next(iter(network.parameters()))
    return not isinstance(network, Role) and not isinstance(parameter, DTensor) and parameter.device.type != "cpu"


def roles_on(
    transformer: nn.Module, lora: LoraTraining, *names: str, seed: int, targets: str, checkpointing: bool = False
) -> tuple[Role, ...]:
    """(teacher, one role for each of `names`) on `transformer`. All equal it at first, since every B starts at zero.

    `targets` is a regular expression of the modules that get an adapter where `lora.targets` is None (`Family.lora_targets`).
    `checkpointing` recomputes activations in the backward pass.
    """
    backbone = Backbone(transformer, lora, list(names), seed, lora.targets or targets, checkpointing)
    return (Role(backbone, None), *(Role(backbone, name) for name in names))


@torch.no_grad()
def interpolate(high: Role, low: Role, weight_high: float) -> dict[str, Tensor]:
    """Dense weights of W + w B_h A_h + (1 - w) B_l A_l, by name: the exact interpolation of two adapters.

    peft's `combination_type="linear"` averages A and B apart, which leaves cross terms B_h A_l and is no interpolation.
    """
    return {name: torch.lerp(low.merged(name), high.merged(name), weight_high) for name in high.names()}
