"""What the benchmarks measure of a network: verdicts on test prompts, distances between sets of pictures, diversity, forwards, noise."""

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
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from flashgen.artifact.manifest import Sampler
from flashgen.metrics.distribution import Features, Space, diversity, frechet_distance, pooled_latents, recall
from flashgen.models.sample import sample
from flashgen.shapes.render import render
from flashgen.shapes.scene import Request, prompt_set, realise
from flashgen.shapes.verify import judge
from flashgen.training.matching import Matcher
from flashgen.training.ranks import Draws
from flashgen.training.trajectories import roll_out

TEST_SEED = 4000  # a stream of prompts and noise that no stage draws from; single captions do occur in training, the world is small
TENTHS = 10  # parts of the prompts that the jackknife leaves out in turn
REDRAWS = 8  # pictures a prompt of the sets that distances and diversity are of


class Ruler:
    """Scores of networks in the teacher's pipeline: verdicts on 6 `per_task` prompts, distances on 6 `few` prompts drawn 8 times each.

    The teacher's own pictures and true scenes, which distances are taken to, are computed once and kept in `folder`.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, taught: Sampler, folder: Path, per_task: int, few: int) -> None:
        self.pipe, self.taught, self.teacher, self.folder = pipe, taught, pipe.transformer, folder
        self.requests = prompt_set(TEST_SEED, per_task)
        self.few = [request for request in prompt_set(TEST_SEED + 1, few) for _ in range(REDRAWS)]

    def score(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """Verdicts and distances together."""
        return self.verdicts(network, sampler) | self.spread(network, sampler)

    def verdicts(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """`passed`, prompt by prompt in task order."""
        with self._drawing(network):
            images = self._draw(self.requests, 0, sampler)
        return {"passed": [int(judge(image, request).passed) for image, request in zip(images, self.requests, strict=True)]}

    def spread(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """Distances of its pictures to the teacher's and to true scenes, and their diversity."""
        with self._drawing(network):
            features = pooled_latents(self.pipe.vae, self._draw(self.few, 10_000, sampler))
        return self.distances(features)

    @contextmanager
    def _drawing(self, network: nn.Module) -> Iterator[None]:
        self.pipe.transformer = network
        try:
            yield
        finally:
            self.pipe.transformer = self.teacher

    def _draw(self, requests: list[Request], first: int, sampler: Sampler) -> NDArray[np.uint8]:
        return sample(self.pipe, sampler, [r.caption() for r in requests], list(range(first, first + len(requests))), batch=60)

    def distances(self, features: Features) -> dict[str, Any]:
        """Distances of [6 few, 8] pictures, and the same without each tenth of the prompts (`without`, for the jackknife)."""
        teacher, true = self.references()
        space = Space.of(true)
        sets = [space(part).reshape(-1, REDRAWS, space.axes.shape[1]) for part in (teacher, true, features)]
        tenths = np.arange(len(sets[0])) % TENTHS  # of the prompts of every task
        without = [_distances(*(part[tenths != tenth] for part in sets)) for tenth in range(TENTHS)]
        return {**_distances(*sets), "without": {key: [round(one[key], 4) for one in without] for key in without[0]}}

    def references(self) -> tuple[Features, Features]:
        """Features of the teacher's pictures and of true scenes for the same prompts, other noise."""
        path = self.folder / "references.npz"
        if not path.exists():
            rng = np.random.default_rng(TEST_SEED)
            with self._drawing(self.teacher):
                taught = pooled_latents(self.pipe.vae, self._draw(self.few, 20_000, self.taught))
            true = pooled_latents(self.pipe.vae, np.stack([render(realise(request, rng)) for request in self.few]))
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.npz")  # several processes may be at it
            np.savez(temporary, teacher=taught, true=true)
            os.replace(temporary, path)
        with np.load(path) as saved:
            return saved["teacher"], saved["true"]


def keep(path: Path, found: dict[str, Any]) -> None:
    """As JSON; a kill at any moment leaves the old file or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    os.replace(temporary, path)


def _distances(teacher: Features, true: Features, mine: Features) -> dict[str, float]:
    """Of pictures [prompts, redraws, dimensions] of the same prompts."""
    taught, real, drawn = (part.reshape(-1, part.shape[-1]) for part in (teacher, true, mine))
    return {
        "fd_teacher": frechet_distance(taught, drawn), "fd_true": frechet_distance(real, drawn), "recall_teacher": recall(taught, drawn),
        "recall_true": recall(real, drawn), "diversity": diversity(mine),
    }  # fmt: skip


class Meter:
    """Counts F of the networks it is hung on."""

    def __init__(self) -> None:
        self.forwards = 0.0

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """On the first block of a transformer: the last that a backward reaches, also from features in the middle."""
        rows = len(output[1])
        self.forwards += rows
        if output[1].requires_grad:
            output[1].register_hook(lambda _: self._add(2 * rows))  # type: ignore[no-untyped-call]  # torch leaves it so

    def _add(self, rows: float) -> None:
        self.forwards += rows

    @contextmanager
    def on(self, *networks: nn.Module) -> Iterator[Meter]:
        blocks: list[Any] = [network.transformer_blocks for network in {id(n): n for n in networks}.values()]
        handles = [first.register_forward_hook(self._hook) for first, *_ in blocks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def gradient_variance(matcher: Matcher, prompts: int = 8, redraws: int = 8) -> dict[str, float]:
    """Mean variance an element of the direction at x0 over redraws, prompt by prompt, averaged over all nodes but the last.

    `variance` redraws the start noise and everything after it; `variance_given_z` only what is random once the start noise is
    fixed (nothing, for `shared` with tied augmentation; its last node has no next level to share, so it is left out for all).
    Both over the mean square of the direction, so that scales cancel.
    """
    found = {}
    said = matcher.pool.cond[torch.arange(prompts).repeat_interleave(redraws)]
    count = prompts * redraws
    for name, fixed in (("variance", False), ("variance_given_z", True)):
        g, parts = Draws(count, matcher.seed, 99), []
        noise = g.randn(*matcher.shape)
        if fixed:
            noise = noise[::redraws].repeat_interleave(redraws, 0)
        rollout = roll_out(matcher.net_at, noise, said, matcher.nodes)
        for index in range(len(matcher.nodes) - 2):
            node = torch.full((count,), index)
            x0, x_eval, sigma_eval = matcher.estimate(rollout.states[index], node, said, g.rand(), g.randn(*matcher.shape))
            direction, _ = matcher.direction(x0, x_eval, matcher.sigmas[node], sigma_eval, node, said, g)
            drawn = direction.reshape(prompts, redraws, -1)
            parts.append((drawn.var(1).mean() / drawn.square().mean()).item())
        found[name] = float(np.mean(parts))
    return found


def interval(table: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of [runs, prompts] and its 95 % bootstrap interval over runs and prompts."""
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        runs = rng.integers(len(table), size=len(table))
        means.append(table[np.ix_(runs, rng.integers(table.shape[1], size=table.shape[1]))].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def half_interval(runs: list[dict[str, Any]], key: str) -> float:
    """Half of the 95 % interval of a distance's mean over runs (seeds): their spread, and a jackknife over prompts, which they share.

    No bootstrap: a Frechet distance grows when samples repeat.
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
        sign, limit = self.bar.split()
        return self.measured >= float(limit) if sign == ">=" else self.measured <= float(limit)


def report(bars: list[Bar], path: Path, command: str) -> None:
    """The table on stdout, the same as JSON in `path`."""
    print(f"\n{'what':<50}{'measured':>9}  {'95 %':<15}bar")
    for bar in bars:
        spread = "" if bar.low is None else f"{bar.low:.3f}..{bar.high:.3f}"
        print(f"{bar.what:<50}{bar.measured:>9.3f}  {spread:<15}{bar.bar:<8}{'' if bar.met else ' MISSED'}")
    path.write_text(json.dumps({"command": command, "rows": [{**asdict(bar), "met": bar.met} for bar in bars]}, indent=1) + "\n")
