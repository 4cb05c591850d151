"""flashgen quantize: group-wise INT4 and its relatives for every linear layer of the transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.artifact.draft import Draft
from flashgen.artifact.manifest import Kind
from flashgen.errors import ArtifactError, MachineError, UsageError
from flashgen.progress import warn
from flashgen.quant.layer import Rounding, layer_bits, quantize_layer, relative_error, stored_bytes
from flashgen.stages.base import Result, Stage
from flashgen.stages.calibrate import Calibrated, calibrate
from flashgen.stages.nf4 import write_nf4
from flashgen.stages.planning import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.artifact.manifest import Sampler
    from flashgen.models.footprint import Footprint, Parts, Tensors
    from flashgen.quant.pack import QuantizedLinear


@dataclass
class Quantize(Stage):
    """A student or teacher with codes for its Linears in quantized/, from which `export` writes the graph.

    The pipeline stays loadable by diffusers, with dequantized weights. Methods rtn and hqq need no data: weights pass from file to file,
    one in memory at a time. GPTQ, a budget, static activations, a shared adaLN basis and step scales load the student and run it on
    prompts. Scheme nf4 writes bitsandbytes' codes instead, which diffusers loads as they are.
    """

    name = "quantize"
    takes: ClassVar[Mapping[str, tuple[Kind, ...]]] = {"student": ("student", "teacher")}
    kind = "quantized"

    @property
    def protect(self) -> tuple[str, ...]:
        """Prefixes of the layers that keep 8 bits: the recipe's, or the family's."""
        protect = self.recipe.quantize.protect
        return self.family.protect if protect is None else tuple(protect)

    @property
    def rounding(self) -> Rounding:
        """How the transformer's weights become codes."""
        config = self.recipe.quantize
        return Rounding(config.group, config.symmetric, config.method)

    @property
    def encoder_rounding(self) -> Rounding:
        """How the text encoders' weights become codes."""
        config = self.recipe.quantize
        return Rounding(config.encoder_group, config.symmetric)

    def bits(self, layer: str) -> int:
        """Bits of a layer of the transformer, where no budget decides."""
        return layer_bits(layer, self.recipe.quantize.bits, self.protect)

    def check(self) -> None:
        config = self.recipe.quantize
        if self.sampler.guidance != 1 and (config.low_rank_tolerance or config.step_scales or config.activations == "static"):
            raise UsageError(
                "quantize.low_rank_tolerance, quantize.step_scales and quantize.activations=static learn from rollouts without guidance, "
                "and a teacher is drawn with guidance; leave them out, or quantize a student"
            )
        if config.low_rank_tolerance and self.family.modulation is None:
            raise UsageError(f"quantize.low_rank_tolerance: {self.family.models} have no adaLN layers that share their input; set it to 0")
        if config.scheme == "nf4" and find_spec("bitsandbytes") is None:
            raise MachineError("--scheme nf4 writes with bitsandbytes, which is not installed: pip install 'flashgen[nf4]'")
        if config.calibrated:
            self.require_prompts()

    def settings(self) -> dict[str, Any]:
        config = self.recipe.quantize
        return config.model_dump() | {"protect": list(self.protect)} | (self.prompts_key() if config.calibrated else {})

    def plan(self) -> Plan:
        from flashgen.models.footprint import PROGRAM, Footprint

        config, footprint = self.recipe.quantize, Footprint(self.source)
        weights, disk, forwards = footprint.transformer, 0.0, 0
        memory: dict[str, Parts] = {}
        num_weights = sum(map(prod, weights.linears.values()))
        if config.scheme == "nf4":  # per weight half a byte, and an fp32 scale per 64; the rest in 16 bits; one tensor in fp32 beside them
            disk = 0.5625 * num_weights + 2 * (weights.count - num_weights)
            memory["round transformer"] = {"program": PROGRAM, "written": disk, "tensor": 14.0 * weights.largest}
        else:
            memory["round transformer"], codes = streamed(weights, self.rounding, self.bits)
            disk = codes + 2 * weights.count
            for part in footprint.encoders if config.encoder_bits else []:
                memory[f"round {part}"], codes = streamed(footprint.parts[part], self.encoder_rounding, lambda _: config.encoder_bits)
                disk += codes + 2 * footprint.parts[part].count
        if config.calibrated:
            memory["calibrate"], forwards = self._calibration(footprint)
        work = {"fp32": forwards * footprint.forward().multiply_adds, "rounded": num_weights}
        lighter = "without a budget, static activations, low_rank_tolerance and step_scales, which streams the weights"
        advice = {"calibrate": f"use --set quantize.method=rtn {lighter}, or fewer quantize.prompts"}
        plan = Plan(memory, disk, forwards, work, advice, machine=replace(self.machine, processes=1))  # they share nothing
        plan.add_validation(footprint, self.recipe.bench, self.num_validation_pictures)
        return plan

    def _calibration(self, footprint: Footprint) -> tuple[Parts, int]:
        """Memory of running the student, and its forward passes; a shared basis counts as if every rank were tried."""
        from flashgen.training.calibration import BATCH, layer_blocks, layer_groups

        config, linears = self.recipe.quantize, footprint.transformer.linears
        blocks, modulation = layer_blocks(linears, self.family), self.family.modulation
        memory = footprint.embedding(config.prompts)[0]
        memory |= {name: 4.0 * footprint.parts[name].count for name in ("transformer", "vae")}
        memory["activations"] += 4.0 * min(BATCH, config.prompts) * footprint.forward().hidden * self.family.costs.running
        rollouts = 2.0  # before and after
        if config.method == "gptq":
            rollouts += len(blocks)
            memory["moments"] = max(sum(4.0 * linears[name][1] ** 2 for name in names) for names in blocks)
            memory["factors"] = 4 * 8.0 * max(shape[1] for shape in linears.values()) ** 2  # of one layer, in float64
        if config.budget:
            rollouts += len(layer_groups(linears, self.family)) * len(config.choices)
        if config.activations == "static":  # on halves of the prompts: ranges, histograms, each group, and which groups together
            groups = len(layer_groups(linears, self.family))
            rollouts += 0.5 * (2 + groups + groups.bit_length())
        if config.low_rank_tolerance and modulation is not None and config.group != "channel":
            width = max((shape[1] for name, shape in linears.items() if modulation.search(name)), default=0)
            rollouts += 0.5 * (1 + width // 2 // config.group)
        if config.step_scales:
            rollouts += 1.5
        return memory, round(rollouts * config.prompts * self.sampler.num_steps)

    def make(self, draft: Draft) -> Result:
        if self.recipe.quantize.scheme == "nf4":
            return write_nf4(self, draft, self.protect)
        from flashgen.models.save import save_changed

        (draft.path / "quantized").mkdir()
        self._warn_of_long_groups()
        sampler, metrics = self._transformer(draft)
        encoders = self.encoders
        if encoders:
            metrics["encoders"] = {part: self._encoder(draft, part) for part in encoders}
        save_changed(draft, self.source.path, self.family, {}, kept=("transformer", *encoders))
        return Result(sampler, metrics)

    @cached_property
    def encoders(self) -> list[str]:
        """Text encoders to quantize."""
        return [part for part in self.family.text_encoders if self.recipe.quantize.encoder_bits and (self.source.path / part).is_dir()]

    def _warn_of_long_groups(self) -> None:
        """Warn once where groups end at the end of a row because they are longer than it."""
        from flashgen.models.rewrite import linear_shapes

        group = self.recipe.quantize.group
        rows = [
            k
            for part, rounding in {"transformer": self.rounding, **dict.fromkeys(self.encoders, self.encoder_rounding)}.items()
            for _, k in linear_shapes(self.source.path, part, self.family).values()
            if rounding.group != "channel" and rounding.group_of(k) < rounding.group
        ]
        if rows:
            warn(f"quantize.group={group} is longer than the rows of {len(rows)} layers ({min(rows)} inputs and more): one scale per row")

    def _transformer(self, draft: Draft) -> tuple[Sampler, dict[str, Any]]:
        """Write the transformer and its codes; returns how the result is sampled, and metrics."""
        from flashgen.export.codes import write_codes
        from flashgen.models.rewrite import linear_shapes, rewrite_network
        from flashgen.quant.pack import dequantize

        path, config = self.source.path, self.recipe.quantize
        shapes, rounding = linear_shapes(path, "transformer", self.family), self.rounding
        calibrated = calibrate(self, draft, rounding, self.protect) if config.calibrated else Calibrated()
        codes, factored, error = calibrated.codes, calibrated.factored, dict[str, float]()

        def change(name: str, weight: Tensor) -> Tensor:
            layer, _, parameter = name.rpartition(".")
            if layer in factored and parameter == "bias":
                return factored[layer].up.bias
            if layer not in shapes or parameter != "weight":
                return weight
            weight = weight.float()
            if layer in factored:
                new = dequantize(codes[f"{layer}.up"]) @ factored[layer].basis.T
            else:
                if layer not in codes:
                    codes[layer] = quantize_layer(weight, self.bits(layer), rounding)
                new = dequantize(codes[layer])
            error[layer] = relative_error(new, weight)
            return new

        rewrite_network(path / "transformer", draft.path / "transformer", change, f"quantize {len(shapes)} layers of transformer")
        if missing := sorted(shapes.keys() - error.keys()):
            raise ArtifactError(f"{path}/transformer has no weights of {', '.join(missing[:3])}; take the artifact from its source again")
        names = [f"{name}.up" if name in factored else name for name in shapes]
        basis = next((layer.basis for layer in factored.values()), None)
        packed_bytes = write_codes(draft.path, "transformer", {name: codes[name] for name in names}, basis)
        mean_bits = 8 * packed_bytes / sum(map(prod, shapes.values()))
        metrics = {"weight_error_max": max(error.values()), "mean_bits": mean_bits, "packed_bytes": packed_bytes}
        return self.sampler.model_copy(update={"scales": calibrated.scales}), calibrated.metrics | metrics

    def _encoder(self, draft: Draft, part: str) -> dict[str, float]:
        """Write a text encoder rounded to `encoder_bits` and its codes; returns its largest relative error and the bytes of its codes."""
        from flashgen.export.codes import write_codes
        from flashgen.models.rewrite import linear_shapes, rewrite_network
        from flashgen.quant.pack import dequantize

        layers, error = linear_shapes(self.source.path, part, self.family), [0.0]
        codes: dict[str, QuantizedLinear] = {}

        def change(name: str, weight: Tensor) -> Tensor:
            layer, _, parameter = name.rpartition(".")
            if parameter != "weight" or layer not in layers:
                return weight
            weight = weight.float()
            codes[layer] = quantize_layer(weight, self.recipe.quantize.encoder_bits, self.encoder_rounding)
            new = dequantize(codes[layer])
            error.append(relative_error(new, weight))
            return new

        rewrite_network(self.source.path / part, draft.path / part, change, f"quantize {len(layers)} layers of {part}")
        return {"weight_error_max": max(error), "packed_bytes": write_codes(draft.path, part, codes)}


def streamed(weights: Tensors, rounding: Rounding, bits: Callable[[str], int]) -> tuple[Parts, float]:
    """Memory while the tensors of a component pass one by one and their codes pile up, and bytes of all codes on disk."""
    from flashgen.models.footprint import PROGRAM

    codes = scales = peak = 0.0
    for name, (shape, size) in weights.entries.items():
        layer, count = name.removesuffix(".weight"), prod(shape)
        passing = count * (size + 2.0)  # as it was read and as it is written
        if layer in weights.linears:
            group = rounding.group_of(shape[1])
            groups = shape[0] * -(-shape[1] // group)
            codes += stored_bytes(shape, bits(layer), rounding)
            scales += 2.0 * groups  # fp32 until they are written
            passing = count * (size + 2.0 + 12) + groups * group  # and in fp32, dequantized and their difference
        peak = max(peak, codes + scales + passing)
    return {"program": PROGRAM, "codes and one tensor": peak}, codes
