"""Bootstrap intervals of means over pictures, clustered by prompt.

numpy instead of scipy.stats.bootstrap: pictures of one prompt are drawn together within each task, which that function can express only
through arrays of indices, at about fifty times the time; and its levels are too narrow for a few dozen prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashgen.errors import NumericsError

Interval = tuple[float, float]
LEVEL, RESAMPLES = 0.95, 2000


def intervals(
    values: ArrayLike,
    prompts: Sequence[str],
    tasks: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """95 % interval of the mean of `values` [N] as `overall`, and of the mean within each task.

    `overall` is the mean over the pictures, or, with `tasks` [N], the mean of the tasks' means (GenEval's rule). A resample draws as many
    prompts as there are, with replacement, within each task, and takes all pictures of a drawn prompt: prompts and seeds vary together
    (Davison and Hinkley 1997, sec. 3.8). The interval is the expanded percentile interval (Hesterberg 2015, sec. 5.3), whose level allows
    for the few prompts as Student's t does. Float64; a function of `seed`. None where fewer than two prompts leave nothing to draw from.

    Equal values give an interval of width 0. Raises NumericsError for values that are not finite.
    """
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        raise NumericsError("a score is not finite, so that its mean has no interval; look for black or broken pictures")
    strata: dict[str, dict[str, list[float]]] = {}
    for value, prompt, task in zip(x, prompts, tasks or [""] * len(x), strict=True):
        strata.setdefault(task, {}).setdefault(prompt, []).append(float(value))
    rng = np.random.default_rng(seed)
    means = {task: _resampled(list(clusters.values()), rng, resamples) for task, clusters in strata.items()}
    counts = {task: len(clusters) for task, clusters in strata.items()}
    found = {"overall": _interval(np.mean(list(means.values()), 0), sum(counts.values()), len(counts)) if means else None}
    return found | ({task: _interval(means[task], counts[task], 1) for task in means} if tasks is not None else {})


def difference_intervals(
    a: ArrayLike, b: ArrayLike, prompts: Sequence[str], tasks: Sequence[str] | None = None
) -> dict[str, Interval | None]:
    """Intervals of mean(a) - mean(b) as `intervals` gives them; picture i of both has the same prompt and seed, and is drawn in pairs."""
    return intervals(np.subtract(a, b, dtype=np.float64), prompts, tasks)


def _resampled(clusters: list[list[float]], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Means [resamples] over the pictures of clusters that are drawn with replacement."""
    sums, counts = np.array([sum(c) for c in clusters]), np.array([len(c) for c in clusters], np.float64)
    times = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=resamples)
    return np.asarray(times @ sums / (times @ counts))


def _interval(means: NDArray[np.float64], prompts: int, strata: int) -> Interval | None:
    """Quantiles at Phi(-+ sqrt(n / (n - 1)) t), for n prompts per stratum and t of `prompts - strata` degrees of freedom."""
    from scipy.special import ndtr, stdtrit

    freedom = prompts - strata
    if freedom < 1:
        return None
    tail = float(ndtr(-math.sqrt(prompts / freedom) * stdtrit(freedom, (1 + LEVEL) / 2)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
