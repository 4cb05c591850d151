"""Measurements of a network: verdicts on test prompts, distances between sets of pictures, diversity, forward passes, gradient noise."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.distribution import Features, Space, diversity, frechet_distance, pooled_latents, recall
from flashgen import worlds
from flashgen.artifact.manifest import Sampler
from flashgen.models.pipeline import Pipeline
from flashgen.models.sample import sample
from flashgen.training.matching import Matcher
from flashgen.training.ranks import Draws
from flashgen.training.rollout import roll_out
from flashgen.worlds.shapes.render import render
from flashgen.worlds.shapes.scene import prompt_set, realise

TEST_SEED = 4000  # prompts and noise that no stage uses; single prompts also occur in training, because the world is small
TENTHS = 10  # parts of the prompts that the jackknife leaves out in turn
REDRAWS = 8  # pictures per prompt in the sets for distances and diversity


@contextmanager
def replaced_transformer(pipe: Pipeline, network: nn.Module) -> Iterator[None]:
    """Inside, `pipe` draws with `network`."""
    before, pipe.transformer = pipe.transformer, network
    try:
        yield
    finally:
        pipe.transformer = before


def verdicts(images: NDArray[np.uint8], prompts: list[str]) -> list[int]:
    """1 for each picture that shows what its prompt asks for, else 0."""
    values = worlds.get("shapes").judge(images, prompts).values
    assert values is not None
    return values.astype(int).tolist()  # type: ignore[no-any-return]  # numpy's tolist


class Ruler:
    """Scores of networks in the teacher's pipeline: verdicts on `per_task` prompts per task, distances on `few` prompts drawn 8 times each.

    The two references of the distances, the teacher's own pictures and true scenes, are computed once and saved in `folder`.
    """

    def __init__(self, pipe: Pipeline, taught: Sampler, folder: Path, per_task: int, few: int) -> None:
        self.pipe, self.taught, self.teacher, self.folder = pipe, taught, pipe.transformer, folder
        self.prompts = worlds.get("shapes").prompts(TEST_SEED, per_task)
        self.few = [request for request in prompt_set(TEST_SEED + 1, few) for _ in range(REDRAWS)]

    def score(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """Verdicts and distances together."""
        return self.verdicts(network, sampler) | self.spread(network, sampler)

    def verdicts(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """`passed`: 1 or 0 per prompt, in the order of the tasks."""
        return {"passed": verdicts(self._draw(network, self.prompts, 0, sampler), self.prompts)}

    def spread(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """Distances of the network's pictures to the teacher's and to true scenes, and their diversity."""
        return self.distances(self._features(network, 10_000, sampler))

    def _draw(self, network: nn.Module, prompts: list[str], first: int, sampler: Sampler) -> NDArray[np.uint8]:
        with replaced_transformer(self.pipe, network):
            return sample(self.pipe, sampler, prompts, list(range(first, first + len(prompts))), batch=60)

    def _features(self, network: nn.Module, first: int, sampler: Sampler) -> Features:
        return pooled_latents(self.pipe.vae, self._draw(network, [request.caption() for request in self.few], first, sampler))

    def distances(self, features: Features) -> dict[str, Any]:
        """Distances of pictures [6 few, 8], and of those without each tenth of the prompts (`without`, for the jackknife)."""
        teacher, true = self.references()
        space = Space.of(true)
        sets = [space(part).reshape(-1, REDRAWS, space.axes.shape[1]) for part in (teacher, true, features)]
        tenths = np.arange(len(sets[0])) % TENTHS  # each tenth has prompts of every task
        without = [_distances(*(part[tenths != tenth] for part in sets)) for tenth in range(TENTHS)]
        return {**_distances(*sets), "without": {key: [round(one[key], 4) for one in without] for key in without[0]}}

    def references(self) -> tuple[Features, Features]:
        """Features of the teacher's pictures and of true scenes, for the same prompts with other noise."""
        path = self.folder / "references.npz"
        if not path.exists():
            rng = np.random.default_rng(TEST_SEED)
            taught = self._features(self.teacher, 20_000, self.taught)
            true = pooled_latents(self.pipe.vae, np.stack([render(realise(request, rng)) for request in self.few]))
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.npz")  # several processes may write it
            np.savez(temporary, teacher=taught, true=true)
            os.replace(temporary, path)
        with np.load(path) as saved:
            return saved["teacher"], saved["true"]


def keep(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as JSON; a kill at any moment leaves the old file or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    os.replace(temporary, path)


def _distances(teacher: Features, true: Features, mine: Features) -> dict[str, float]:
    """Distances between sets of features [prompts, redraws, dimensions] of the same prompts."""
    taught, real, drawn = (part.reshape(-1, part.shape[-1]) for part in (teacher, true, mine))
    return {
        "fd_teacher": frechet_distance(taught, drawn), "fd_true": frechet_distance(real, drawn), "recall_teacher": recall(taught, drawn),
        "recall_true": recall(real, drawn), "diversity": diversity(mine),
    }  # fmt: skip


class Meter:
    """Counts F: forward passes per sample; a backward pass counts 2."""

    def __init__(self) -> None:
        self.forwards = 0.0

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Hook of a transformer's first block: every backward pass ends there, also one from features in the middle."""
        rows = len(output[1])
        self.forwards += rows
        if output[1].requires_grad:
            output[1].register_hook(lambda _: self._add(2 * rows))  # type: ignore[no-untyped-call]  # untyped in torch

    def _add(self, rows: float) -> None:
        self.forwards += rows

    @contextmanager
    def on(self, *networks: nn.Module) -> Iterator[Meter]:
        """Inside, count the passes of `networks`, which may repeat."""
        blocks: list[Any] = [network.transformer_blocks for network in {id(n): n for n in networks}.values()]
        handles = [first.register_forward_hook(self._hook) for first, *_ in blocks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def gradient_variance(matcher: Matcher, prompts: int = 8, redraws: int = 8) -> dict[str, float]:
    """Mean variance per element of the direction at x0 over redraws of one prompt, averaged over prompts and all nodes but the last.

    `variance` redraws the initial noise and everything after it; `variance_given_z` redraws only what is random once the initial noise
    is fixed. With `shared` and tied augmentation nothing is, except at the last node, which has no next level to share: the last node is
    left out for all. Both are relative to the mean square of the direction, so that scales cancel.
    """
    task, count, variances = matcher.task, prompts * redraws, {}
    cond = task.pool[torch.arange(prompts).repeat_interleave(redraws)]
    for name, fixed in (("variance", False), ("variance_given_z", True)):
        g, parts = Draws(count, task.seed, 99), []
        noise = g.randn(*task.shape)
        if fixed:
            noise = noise[::redraws].repeat_interleave(redraws, 0)
        rollout = roll_out(matcher.net_at, noise, cond, task.nodes)
        for index in range(len(task.nodes) - 2):
            node, rows = torch.full((count,), index), torch.arange(count)
            fresh = [g.rand(), g.randn(*task.shape), g.rand(), g.randn(*task.shape)]
            _, comparison = matcher.compare(rollout.states[index], node, cond, fresh, rows)
            direction, _ = matcher.matching.direction(comparison)
            drawn = direction.reshape(prompts, redraws, -1)
            parts.append((drawn.var(1).mean() / drawn.square().mean()).item())
        variances[name] = float(np.mean(parts))
    return variances


def interval(table: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of `table` [runs, prompts] and its 95 % bootstrap interval over runs and prompts."""
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        runs = rng.integers(len(table), size=len(table))
        means.append(table[np.ix_(runs, rng.integers(table.shape[1], size=table.shape[1]))].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def half_interval(runs: list[dict[str, Any]], key: str) -> float:
    """Half of the 95 % interval of a distance's mean over runs (seeds): the spread of the runs, and a jackknife over their prompts.

    A bootstrap would be wrong: a Frechet distance grows when samples repeat.
    """
    without = np.mean([r["without"][key] for r in runs], 0)
    prompts = (len(without) - 1) * np.var(without)
    seeds = np.var([r[key] for r in runs], ddof=1) / len(runs) if len(runs) > 1 else 0.0
    return float(1.96 * np.sqrt(prompts + seeds))


def ratio_of_distances(mine: dict[str, Any], reference: dict[str, Any], key: str) -> tuple[float, float, float]:
    """mine / reference of a distance on the same prompts, and its 95 % interval, by the jackknife over prompts (see `half_interval`)."""
    value, without = mine[key] / reference[key], np.divide(mine["without"][key], reference["without"][key])
    half = float(1.96 * np.sqrt((len(without) - 1) * np.var(without)))
    return float(value), float(value) - half, float(value) + half


def ratio_interval(passed: NDArray[np.float64], reference: NDArray[np.float64]) -> tuple[float, float, float]:
    """mean(passed) / mean(reference), both [prompts] on the same prompts, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(passed), size=(2000, len(passed)))
    low, high = np.quantile(passed[drawn].mean(1) / np.maximum(reference[drawn].mean(1), 1e-9), [0.025, 0.975])
    return float(passed.mean() / max(reference.mean(), 1e-9)), float(low), float(high)


@dataclass(frozen=True)
class Bar:
    """One measured number, what it must reach (">= 0.85"), and its 95 % interval where there is one."""

    what: str
    measured: float
    bar: str
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        """Whether the number reaches its bar."""
        sign, limit = self.bar.split()
        return self.measured >= float(limit) if sign == ">=" else self.measured <= float(limit)


def report(bars: list[Bar], path: Path, command: str) -> None:
    """Print the table on stdout and write it to `path` as JSON."""
    print(f"\n{'what':<50}{'measured':>9}  {'95 %':<15}bar")
    for bar in bars:
        spread = "" if bar.low is None else f"{bar.low:.3f}..{bar.high:.3f}"
        print(f"{bar.what:<50}{bar.measured:>9.3f}  {spread:<15}{bar.bar:<8}{'' if bar.met else ' MISSED'}")
    path.write_text(json.dumps({"command": command, "rows": [{**asdict(bar), "met": bar.met} for bar in bars]}, indent=1) + "\n")
