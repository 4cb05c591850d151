"""What a stage will need: memory by phase and component, disk, forwards and time. From headers and configs alone; no weight is read.

Weights are counted tensor by tensor. Activations follow from the shapes and from what each network keeps; docs/fullsize.md compares the
sums with what was measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flashgen.artifact.files import disk_bytes
from flashgen.artifact.store import Artifact, check_disk, open_artifact
from flashgen.errors import MachineError
from flashgen.models.footprint import PROGRAM, Parts, Tensors, embedded, embedding, forward, tensors
from flashgen.models.specs import ENCODERS
from flashgen.recipe.schema import DistillRecipe, LoraTraining, MatchingTraining, QuantizeRecipe, Recipe, TrajectoryTraining
from flashgen.stages.checks import follows_teacher

KEPT = 35  # tensors the size of a block's hidden states that it keeps for its backward pass
ADAPTED = 2 * KEPT  # and with adapters, which see their inputs in fp32
WITHOUT_GPU = "run it where more memory is free"
MEND = {
    "distill": "use --recipe sd35-medium-24gb, or --set distill.lora.rank=64 --set distill.lora.base=bfloat16 "
    "--set distill.lora.checkpointing=true, or lower distill.matching.batch and distill.size_px",
    "finetune": f"use --set finetune.lora.rank=64, or {WITHOUT_GPU}",
    "restructure": "use --mode zeros, or --mode prune with --set restructure.iterations=0, which load nothing",
    "quantize": "use --set quantize.method=rtn without a budget, basis_tolerance and repair, which streams the weights",
    "export": f"export ONNX at a smaller size, or {WITHOUT_GPU}",
}


class Plan(NamedTuple):
    """`memory` by phase and component; bytes, forwards of the transformer at batch 1, and multiply-adds by type of number."""

    memory: dict[str, Parts]
    disk: float
    forwards: int = 0
    work: Mapping[str, float] = MappingProxyType({})

    @property
    def peak(self) -> float:
        return max(sum(parts.values()) for parts in self.memory.values())


def adapter_count(transformer: Tensors, lora: LoraTraining) -> int:
    """Numbers that one adapter learns."""
    return sum(lora.rank * sum(shape) for name, shape in transformer.linears.items() if re.fullmatch(lora.targets, name))


def distill(source: Artifact, parts: dict[str, Tensors], recipe: Recipe) -> Plan:
    config: DistillRecipe = recipe.distill
    transformer, lora = parts["transformer"], config.lora
    one, matching, trajectory, correction = (
        forward(source, transformer, config.size_px),
        config.matching,
        config.trajectory,
        config.correction,
    )
    size = 2 if lora and lora.base == "bfloat16" else 4
    learned = adapter_count(transformer, lora) if lora else transformer.count
    train = Parts(program=PROGRAM, vae=4 * parts["vae"].count)
    train |= {"teacher": size * transformer.count, "student and proxy": 8 * learned, "gradients": 8 * learned, "optimizers": 16 * learned}
    train |= {"average": 4 * learned, "a step's temporaries": 8 * learned}  # of AdamW, over all tensors at once
    again, own = lora is not None and lora.checkpointing, ADAPTED if lora else KEPT
    kept = own + one.blocks if again else own * one.blocks
    train["activations"] = max(config.batches, default=0) * one.hidden * kept * size
    rounds = _rounds(matching)
    learning = 4 if again else 3
    forwards = rounds * (config.steps + learning * matching.proxy_updates) + matching.iterations * (learning + 3)
    prompts = matching.prompts if matching.iterations else 0
    whole = _followed(config)
    cached = states = 0  # forwards, and what is kept of them: all nodes of a trajectory, both ends of each corrected step
    if config.wants_trajectories:
        prompts += trajectory.prompts
        cached = whole * trajectory.prompts
        states = (config.steps + 1) * trajectory.prompts
    joined = states
    if correction.iterations:
        cached += (whole + config.steps) * correction.prompts
        states += 2 * config.steps * correction.prompts
        joined = states + 2 * config.steps * (trajectory.prompts + correction.prompts)  # the parts are still there then
    train["trajectories"] = 2 * joined * one.latent
    regressed = sum(part.iterations * part.batch for part in (trajectory, correction))
    work = cached + forwards * matching.batch + regressed * learning
    text, adds = embedding(source, parts, prompts)
    written = (
        2 if matching.watch_every and matching.iterations and recipe.bench.per_task else 1
    )  # transformers in 16 bits: the best look and the last
    disk = prompts * embedded(source, parts) + 2 * written * transformer.count + 36 * learned + 2 * states * one.latent
    number = "bf16" if size == 2 else "fp32"
    return Plan({"embed": text, "train": train}, disk, work, {"bf16": adds, number: adds * (number == "bf16") + work * one.adds})


def finetune(source: Artifact, parts: dict[str, Tensors], recipe: Recipe) -> Plan:
    config, transformer = recipe.finetune, parts["transformer"]
    one = forward(source, transformer)
    learned = adapter_count(transformer, config.lora) if config.lora else transformer.count
    copies = 3 if config.lora else 2  # student, its copy under the adapters, teacher
    train = Parts(program=PROGRAM, vae=8 * parts["vae"].count)
    train |= {"networks": 4 * copies * transformer.count, "branches and proxies": 16 * learned, "gradients": 8 * learned}
    train |= {"optimizers": 16 * learned, "average": 4 * learned, "activations": config.matching.batch * one.hidden * KEPT * one.blocks * 4}
    steps, matching = len(source.manifest.sampler.sigmas) - 1 if source.manifest.sampler else 4, config.matching
    rounds = 2 * _rounds(matching)
    forwards = (rounds * (steps + 3 * matching.proxy_updates) + 2 * matching.iterations * 6) * matching.batch
    trajectory, cached, prompts = recipe.distill.trajectory, 0, matching.prompts
    if follows_teacher(matching, source):
        prompts += trajectory.prompts
        forwards += _guided(trajectory) * trajectory.prompts
        cached = 2 * (steps + 1) * trajectory.prompts * one.latent
    train["trajectories"] = cached
    text, _ = embedding(source, parts, prompts)
    disk = prompts * embedded(source, parts) + 2 * transformer.count + 36 * learned + cached
    return Plan({"embed": text, "train": train}, disk, forwards, {"fp32": forwards * one.adds})


def _followed(config: DistillRecipe) -> int:
    """Forwards of one trajectory."""
    if config.follow == "teacher":
        return _guided(config.trajectory)
    assert config.start is not None
    sampler = open_artifact(config.start, ("student",)).manifest.sampler
    assert sampler is not None
    return len(sampler.sigmas) - 1


def _guided(trajectory: TrajectoryTraining) -> int:
    """Forwards of one of the teacher's."""
    return trajectory.teacher_steps * (1 if trajectory.guidance == 1 else 2)


def _rounds(matching: MatchingTraining) -> int:
    return matching.iterations + matching.proxy_warmup if matching.iterations else 0


def restructure(source: Artifact, parts: dict[str, Tensors], recipe: Recipe, mode: str = "prune") -> Plan:
    config, transformer = recipe.restructure, parts["transformer"]
    if mode == "zeros" or (mode == "prune" and not config.iterations):
        return Plan({"link": Parts(program=PROGRAM)}, 1 << 20)
    one = forward(source, transformer)
    learned = transformer.count if mode == "prune" else parts["text_encoder_3"].count // 8
    train = Parts(program=PROGRAM, vae=4 * parts["vae"].count, student=4 * transformer.count)
    train |= {"successor": 4 * learned, "gradients": 4 * learned, "optimizers": 8 * learned, "average": 4 * learned}
    train["activations"] = config.batch * one.hidden * KEPT * one.blocks * 4
    forwards = config.iterations * config.batch * 8
    text, _ = embedding(source, parts, config.prompts)
    disk = config.prompts * embedded(source, parts) + 2 * learned
    return Plan({"embed": text, "train": train}, disk, forwards, {"fp32": forwards * one.adds})


def quantize(source: Artifact, parts: dict[str, Tensors], recipe: Recipe) -> Plan:
    config, transformer = recipe.quantize, parts["transformer"]
    memory: dict[str, Parts] = {}
    disk = 0.0
    if config.scheme == "nf4":  # half a byte a weight and an fp32 scale for 64, the rest in 16 bits; one tensor beside them in fp32
        linear = sum(prod(shape) for shape in transformer.linears.values())
        disk = 0.5625 * linear + 2 * (transformer.count - linear)
        return Plan({"round transformer": {"program": PROGRAM, "written": disk, "tensor": 14.0 * transformer.largest}}, disk)
    for part in ("transformer", *(ENCODERS if config.encoder_bits else ())):
        if part in parts:
            memory[f"round {part}"], codes = _streamed(parts[part], config, part)
            disk += codes + 2 * parts[part].count
    forwards = 0
    if config.calibrated:
        widest = max(shape[1] for shape in transformer.linears.values())
        held = {"student": 4.0 * transformer.count, "vae": 4.0 * parts["vae"].count, "moments": 4.0 * 20 * widest**2}
        memory["calibrate"] = embedding(source, parts, config.prompts)[0] | held
        steps = len(source.manifest.sampler.sigmas) - 1 if source.manifest.sampler else 4
        passes = 1 + (25 if config.method == "gptq" else 0) + (145 * len(config.choices) if config.budget else 0)
        forwards = config.prompts * steps * passes
    weights = sum(prod(shape) for shape in transformer.linears.values())
    return Plan(memory, disk, forwards, {"fp32": forwards * forward(source, transformer).adds, "rounded": weights})


def _streamed(part: Tensors, config: QuantizeRecipe, name: str) -> tuple[Parts, float]:
    """Peak while tensors pass one by one and codes pile up, and the bytes of all codes."""
    codes = peak = 0.0
    for tensor, (shape, size) in part.found.items():
        count, layer = prod(shape), tensor.removesuffix(".weight")
        passing = count * (size + 2)  # as it was read and as it is written
        if layer in part.linears:
            bits = config.bits_of(layer) if name == "transformer" else config.encoder_bits
            group = config.group_of(shape[1]) if name == "transformer" else config.encoder_group
            blocks = shape[0] * -(-shape[1] // group)
            codes += blocks * (group * bits / 8 + 4 + (0 if config.symmetric else bits / 8))
            passing = count * (size + 2 + 12) + blocks * group  # and in fp32, dequantized and their difference
        peak = max(peak, codes + passing)
    return Parts({"program": PROGRAM, "codes and the tensor at work": peak}), codes


def export(source: Artifact, parts: dict[str, Tensors], recipe: Recipe, target: str = "onnx") -> Plan:
    """Layers pass torch from disk; then onnxruntime holds a component's weights: mapped, packed anew, or unpacked to fp32.
    A GGUF is written and read back tensor by tensor, no network runs.

    Twice the codes is what docs/fullsize.md shows, not what was derived.
    """
    if target == "gguf":
        packed = source.path / "quantized" / "transformer.safetensors"
        held = Parts(program=PROGRAM, codes=packed.stat().st_size if packed.exists() else 0.0, tensor=14.0 * parts["transformer"].largest)
        return Plan({"write": held}, 2.0 * parts["transformer"].count)
    assert source.manifest.sampler is not None
    size = recipe.export.size_px or source.manifest.sampler.size_px
    one = forward(source, parts["transformer"], size)
    activations = {"transformer": 4.0 * 40 * one.hidden, "vae": 4.0 * 3 * 512 * min(size, 512) ** 2}
    memory, disk = dict[str, Parts](), 0.0
    for part in (p for p in ("transformer", "vae", *ENCODERS) if p in parts):
        packed = source.path / "quantized" / f"{part}.safetensors"
        codes = float(packed.stat().st_size) if packed.exists() else 0.0
        linear = sum(prod(shape) for shape in parts[part].linears.values()) if codes else 0
        table = sum(prod(shape) for n, (shape, _) in parts[part].found.items() if n == "pos_embed.pos_embed")
        rest = parts[part].count - linear - table
        disk += (codes + 2 * rest) * (0.6 if part == "vae" and not recipe.export.vae_encoder else 1)  # the decoder alone
        running = activations.get(part, 256 << 20)
        memory[part] = {"program": PROGRAM, "codes": codes, "graph": 2 * codes, "weights": 4 * rest, "activations": running}
    return Plan(memory, disk, 2, {"fp32": 2 * one.adds})


PLANS: dict[str, Any] = {"distill": distill, "finetune": finetune, "restructure": restructure, "quantize": quantize, "export": export}


def plan_of(stage: str, source: Artifact, recipe: Recipe, **extra: Any) -> Plan:
    parts = tensors(source)
    found: Plan = PLANS[stage](source, parts, recipe, **{k: v for k, v in extra.items() if k in ("mode", "target")})
    looks = [part.watch_every for part in (recipe.distill.trajectory, recipe.distill.correction, recipe.distill.matching)]
    if stage != "export" and (recipe.bench.per_task or (stage == "distill" and any(looks))):  # the result is drawn from
        one, batch = forward(source, parts["transformer"]), min(recipe.bench.batch, 6 * recipe.bench.per_task or 8)
        drawn = embedding(source, parts, batch)[0] | {"transformer": 4 * parts["transformer"].count, "vae": 4 * parts["vae"].count}
        found.memory["validate"] = drawn | {"pictures": batch * one.hidden * 40 * 4}
    return found


def check(stage: str, source: Artifact, recipe: Recipe, work: Path, **extra: Any) -> None:
    """Raises MachineError, before any work, when memory or disk are too small for the plan; it names what would fit.

    What an earlier run has left in `work`, the stage's folder of resume state, needs no disk again.
    """
    plan = plan_of(stage, source, recipe, **extra)
    check_disk(work.parents[1], int(plan.disk) - disk_bytes(work))
    free = memory_bytes()
    if free is not None and plan.peak > free:
        phase, parts = max(plan.memory.items(), key=lambda item: sum(item[1].values()))
        most = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sorted(parts.items(), key=lambda item: -item[1])[:3])
        needs = f"{stage} needs {plan.peak / 2**30:.1f} GiB of memory in its phase '{phase}' (GiB: {most})"
        raise MachineError(f"{needs}, {free / 2**30:.1f} are there; {MEND[stage]}")


def memory_bytes() -> int | None:
    """Of this machine, or what its container may use; None where the system does not tell."""
    sizes = []
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            sizes.append(int(text))
    if (info := Path("/proc/meminfo")).exists() and (total := re.search(r"MemTotal:\s+(\d+)", info.read_text())):
        sizes.append(int(total[1]) << 10)
    return min(sizes) if sizes else None


def seconds(plan: Plan) -> float:
    """By a calibration of some seconds on this machine: matrix products in each type of number, and rounding."""
    import torch

    from flashgen.quant.rounding import quantize_groups

    total = 0.0
    for number, amount in plan.work.items():
        if not amount:
            continue
        dtype = torch.bfloat16 if number == "bf16" else torch.float32
        x, weight, done = torch.randn(512, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype), 0.0
        started = time.perf_counter()
        while time.perf_counter() - started < 3:
            if number == "rounded":
                quantize_groups(weight, 4, 128, False)
            else:
                torch.nn.functional.linear(x, weight)
            done += weight.numel() * (1 if number == "rounded" else len(x))
        total += amount * (time.perf_counter() - started) / done
    return round(total, 1)
