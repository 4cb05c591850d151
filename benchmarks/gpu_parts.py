"""The measurements of `benchmarks.gpu`. A part is a generator of rows, each written as soon as it is there."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu_setup import STEPS, Bench, difference, host_gib, summary
from flashgen.artifact.manifest import Sampler
from flashgen.families.base import velocity
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.sampling import random_sampler
from flashgen.families.sd3.specs import SPECS, spec
from flashgen.flow.grid import shifted_grid
from flashgen.models.footprint import Footprint
from flashgen.models.pipeline import Pipeline, load_pipeline
from flashgen.models.sample import sample
from flashgen.pixels import Size
from flashgen.recipe.distillation import LoraTraining, MatchingTraining
from flashgen.recipe.schema import ComputeRecipe, Recipe
from flashgen.runtime.accelerator import drawing_dtype, dtype_of, total_device_bytes
from flashgen.runtime.timing import Laps
from flashgen.stages.distill import Distill
from flashgen.stages.tracking import FORWARD_AND_BACKWARD, WITH_CHECKPOINTING, round_forwards
from flashgen.stages.trainings import Networks
from flashgen.stages.trajectories import student_grid
from flashgen.training.cache import Replay
from flashgen.training.matching import Matcher, Roles, Task
from flashgen.training.prompts import PromptPool, prompt_pool
from flashgen.training.roles import roles_on

Row = dict[str, Any]
FULL_TRAINING_BYTES = 80e9  # of memory that a device must have for full training
PROMPT = "two red circles on a white background"
ROUNDS = {"dense, with heads": None, "adapters": LoraTraining(rank=4)}


# ---- CPU against the device


def compare(bench: Bench) -> Iterator[Row]:
    """One round of matching and one picture of the tiny model, on the CPU and on the device, in fp32 without and with TF32."""
    pipe = build_pipeline(SPECS["tiny"], 0)
    for network in pipe.networks():
        network.eval().requires_grad_(False)
    sampler = random_sampler(SPECS["tiny"]).model_copy(update={"sigmas": shifted_grid(8, 3.0)})
    pool = prompt_pool(["a red circle", "a blue square", "a green cross", "two dogs"], pipe, sampler)
    states = torch.randn((len(pool), STEPS + 1, 16, 8, 8), generator=torch.Generator().manual_seed(1)).half()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for name, precision in (("fp32", "highest"), ("TF32, as flashgen sets it", "high")):
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = precision == "high"
            for kind, lora in ROUNDS.items():
                yield {"numbers": name, "what": f"round of matching: {kind}"} | _rounds_differ(bench, pipe, pool, states, lora)
            pictures = [_picture(pipe, sampler, device) for device in (torch.device("cpu"), bench.device)]
            yield {"numbers": name, "what": "picture", "psnr_db": _psnr(*pictures)}
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _rounds_differ(bench: Bench, pipe: Pipeline, pool: PromptPool, states: torch.Tensor, lora: LoraTraining | None) -> Row:
    """Largest relative difference of a metric, and difference of the student's update over its size."""
    config = MatchingTraining(batch=8, node_adversarial=[0.0 if lora else 1.0], node_trajectory=[0.5])
    metrics, updates = [], []
    for device in (torch.device("cpu"), bench.device):
        network, here = copy.deepcopy(pipe.transformer).to(device), pool.on(device)
        if lora:
            teacher, student, fake_score = roles_on(network, lora, "student", "fake_score", seed=0, targets=bench.family.lora_targets)
            roles = Roles(student, teacher, fake_score)
        else:
            roles = Roles(copy.deepcopy(network).requires_grad_(True), network)
        start = [p.detach().clone() for p in roles.student.parameters()]
        task = Task("matching", here, shifted_grid(STEPS, 3.0), (16, 8, 8), 0, 0.5, Replay.from_states(states, here))
        found = Matcher(task, roles, config, bench.family).update(0)
        metrics.append({name: float(value) for name, value in found.items()})
        updates.append(torch.cat([(p.detach() - old).flatten().cpu() for p, old in zip(roles.student.parameters(), start, strict=True)]))
    apart = max(abs(metrics[1][name] - value) / max(abs(value), 1e-6) for name, value in metrics[0].items())
    return {"metrics": apart, "update": difference(updates[1], updates[0])}


def _picture(pipe: Pipeline, sampler: Sampler, device: torch.device) -> np.ndarray[Any, Any]:
    parts = {name: copy.deepcopy(part).to(device) if isinstance(part, nn.Module) else part for name, part in pipe.parts.items()}
    return sample(Pipeline(pipe.family, pipe.folder, parts, device), sampler, [PROMPT], [0])


def _psnr(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float | None:
    """dB of two pictures; None where they are equal."""
    error = float(np.square(one.astype(float) - other.astype(float)).mean())
    return 10 * math.log10(255**2 / error) if error else None


# ---- passes of the transformer


def passes(bench: Bench) -> Iterator[Row]:
    """A forward pass, and one with its backward pass, of the three ways in which flashgen holds a transformer."""
    sizes, device = bench.sizes, bench.device
    compute = ComputeRecipe.model_validate({"precision": sizes.precision, "activation_checkpointing": True})
    dtype, pool, shape = dtype_of(compute.precision, device), bench.pool(), bench.shape(sizes.sizes_px[0])
    networks, lora = Networks(device, dtype, compute, bench.family), LoraTraining(rank=sizes.rank)
    one = Footprint(bench.teacher()).forward(Size(sizes.sizes_px[0], sizes.sizes_px[0]))
    kinds: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: networks.frozen(bench.transformer(dtype)),
        f"adapters of rank {sizes.rank} on it": lambda: networks.roles(bench.transformer(dtype), lora, "student", "fake_score", seed=0)[1],
        "all weights learn, in fp32": lambda: networks.learning(bench.transformer(torch.float32)),
    }
    for kind, make in kinds.items():
        bench.forget_peak()
        network = make()
        for batch, backward in itertools.product(sizes.batches, (False, True) if kind != "frozen" else (False,)):
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            sigma, cond = torch.full((batch,), 0.75, device=device), pool[torch.arange(batch)]

            def run(_: int, backward: bool = backward, x: Any = x, sigma: Any = sigma, cond: Any = cond, network: Any = network) -> None:
                with torch.set_grad_enabled(backward):
                    v = velocity(network, x, sigma, cond)
                if backward:
                    v.square().mean().backward()  # type: ignore[no-untyped-call]  # torch's
                    network.zero_grad(set_to_none=True)

            row: Row = {"network": kind, "tokens": one.tokens, "batch": batch, "pass": "F + B" if backward else "F"}
            try:
                laps = summary(bench.seconds(run, sizes.repeats, warmup=2))
            except torch.OutOfMemoryError:
                network.zero_grad(set_to_none=True)
                bench.forget_peak()
                yield row | {"note": "out of memory"}
                continue
            flop = 2 * one.multiply_adds * batch * (WITH_CHECKPOINTING if backward else 1)
            yield row | laps | {"tflop_per_s": flop / laps["seconds"] / 1e12, "share": bench.share(flop / laps["seconds"])}
        del network, run


# ---- rounds of matching


def _matcher(bench: Bench, recipe: Recipe) -> tuple[Distill, Matcher, Pipeline]:
    """The stage, its matching as `Distill.make` sets it up, with random networks and embeddings in place of those of files, and the
    pipeline that lies in memory beside it."""
    artifact = bench.teacher()
    stage = Distill({"teacher": artifact}, recipe, 0, device_name=str(bench.device))
    config = recipe.distill
    pipe = load_pipeline(artifact.path, weights="text", device=torch.device("cpu"))
    small = pipe["text_encoder"].to(bench.device)  # the only text encoder that stays on the device while a stage trains
    base = getattr(torch, config.lora.base) if config.lora else torch.float32
    pipe = Pipeline(
        bench.family, artifact.path, {"text_encoder": small, "vae": bench.vae(), "transformer": bench.transformer(base)}, bench.device
    )
    teacher, student, fake_score = stage._networks(pipe)
    nodes = student_grid(config, shifted_grid(config.trajectory.teacher_steps, stage.taught.shift))
    pool, shape = bench.pool(), bench.shape(stage.taught.size_px.height)
    states = torch.randn((len(pool), len(nodes), *shape), generator=torch.Generator().manual_seed(1)).half()
    replay = Replay.from_states(states, pool) if config.matching.needs_trajectories(config.steps) else None
    rows, shift = stage.micro_batch, stage.taught.shift
    task = Task("matching", pool, nodes, shape, 0, config.encoder_drop, replay, micro_batch=rows, shift=shift)
    matcher = Matcher(task, Roles(student, teacher, fake_score), config.matching, bench.family)
    bench.forget_peak()  # of making random weights
    return stage, matcher, pipe


def _memory(bench: Bench, stage: Distill, micro_batch: int) -> Row:
    """Measured peak of the device's tensors, the plan's, and their ratio."""
    planned = sum(size for part, size in stage.plan_with(micro_batch).limited["train"].items() if part not in ("program", "driver"))
    peak = bench.peak_bytes()
    return {"peak_bytes": peak, "plan_bytes": int(planned), "plan_over_peak": planned / peak if peak else None}


def lora(bench: Bench) -> Iterator[Row]:
    """Rounds of matching of the recipe sd35-medium-lora."""
    stage, matcher, _pipe = _matcher(bench, bench.sizes.recipe("sd35-medium-lora", *bench.sizes.lora))
    config, first = matcher.config, matcher.config.fake_score_warmup
    laps = summary(bench.seconds(lambda index: matcher.update(first + index), bench.sizes.repeats - 1))
    one = Footprint(stage.source).forward(stage.config.size_px)
    executed, needed = (
        2 * one.multiply_adds * config.batch * round_forwards(config, stage.config.steps, learning)[1] / laps["seconds"]
        for learning in (WITH_CHECKPOINTING, FORWARD_AND_BACKWARD)
    )
    row: Row = {"batch": config.batch, "micro_batch": matcher.task.micro_batch, "tokens": one.tokens}
    speed = {
        "samples_per_s": config.batch / laps["seconds"],
        "tflop_per_s": executed / 1e12,
        "share": bench.share(executed),
        "share_needed": bench.share(needed),
    }
    yield row | laps | speed | _memory(bench, stage, matcher.task.micro_batch)


def full(bench: Bench) -> Iterator[Row]:
    """Memory of rounds of matching of the recipe sd35-medium, all weights learning, by micro-batch."""
    total = total_device_bytes(bench.device)
    if total is not None and total < FULL_TRAINING_BYTES:
        yield {"note": f"not run: the device has {total / 1e9:.1f} GB, and full training is made for {FULL_TRAINING_BYTES / 1e9:.0f} GB"}
        return
    largest = max(bench.sizes.micro_batches)
    settings = (f"distill.matching.batch={largest}", f"distill.size_px={bench.sizes.sizes_px[1]}", *bench.sizes.full)
    recipe = bench.sizes.recipe("sd35-medium", *settings, "compute.micro_batch=1", "distill.trajectory.iterations=0")
    stage, matcher, _pipe = _matcher(bench, recipe)
    first = matcher.config.fake_score_warmup
    for micro_batch in bench.sizes.micro_batches:
        matcher.task.micro_batch = micro_batch
        bench.forget_peak()
        row: Row = {"micro_batch": micro_batch, "batch": largest, "size_px": bench.sizes.sizes_px[1]}
        try:
            laps = bench.seconds(lambda index: matcher.update(first + index), 1, warmup=int(micro_batch == bench.sizes.micro_batches[0]))
        except torch.OutOfMemoryError:
            yield row | {"note": "out of memory"}
            return
        yield row | {"seconds": laps[0]} | _memory(bench, stage, micro_batch) | {"host_gib": host_gib()}


# ---- drawing


def drawing(bench: Bench) -> Iterator[Row]:
    """The teacher's guided steps and the student's steps, picture by picture in turns, as `generate` draws them."""
    artifact, dtype = bench.teacher(), drawing_dtype(bench.device)
    pipe = load_pipeline(artifact.path, weights="text", device=bench.device)
    pipe.parts |= {"transformer": bench.transformer(dtype), "vae": bench.vae()}
    teacher = random_sampler(spec(bench.sizes.like))
    student = teacher.model_copy(update={"sigmas": shifted_grid(STEPS, teacher.shift), "guidance": 1.0, "trained_steps": [STEPS]})
    for side in bench.sizes.sizes_px:
        laps = {name: Laps(bench.synchronise) for name in ("teacher", "student")}
        bench.forget_peak()
        for index in range(1 + max(2, bench.sizes.repeats - 3)):
            for name, sampler in (("teacher", teacher), ("student", student)):
                used = Laps(bench.synchronise) if index == 0 else laps[name]  # the first of each is a warm-up
                with used.lap("picture"):
                    sample(pipe, sampler, [PROMPT], [index], batch=1, size_px=Size(side, side), laps=used)
        found = {name: _picture_laps(own) for name, own in laps.items()}
        ratios = {key: found["teacher"][key] / found["student"][key] for key in ("picture", "steps")}
        dtypes = {"numbers": str(dtype).removeprefix("torch."), "encoders": _where_encoders_are(pipe)}
        yield {"size_px": side, **found, "ratio": ratios, "peak_bytes": bench.peak_bytes(), **dtypes}


def _picture_laps(laps: Laps) -> Row:
    """Medians of seconds per picture: all of it, its steps, encoding and decoding; and the spread of the whole."""
    count = len(laps.seconds["picture"])
    steps = np.reshape(laps.seconds["step"], (count, -1)).sum(1)
    whole = summary(laps.seconds["picture"])
    parts = {name: float(np.median(laps.seconds[name])) for name in ("encode", "decode")}
    return {"picture": whole["seconds"], "spread": whole["spread"], "steps": float(np.median(steps)), **parts}


def _where_encoders_are(pipe: Pipeline) -> str:
    """Whether the text encoders' weights lie on the device or are read from disk for every prompt."""
    streamed = [name for name in pipe.family.text_encoders if any(p.is_meta for p in pipe[name].parameters())]
    return f"{', '.join(streamed)} read from disk" if streamed else "on the device"
