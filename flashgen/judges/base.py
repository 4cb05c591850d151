"""The seam between flashgen and a judge: pictures in, numbers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]  # [N, H, W, 3]


@dataclass(frozen=True)
class Drawn:
    """Pictures of one network: picture i shows `prompts[i]` and was drawn from the noise of `seeds[i]`."""

    pictures: Pictures | Sequence[NDArray[np.uint8]]  # a list where sizes differ
    prompts: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Judgement:
    """Numbers of one set of pictures, in the judge's own unit.

    `values` [N] has one number per picture (0 and 1 where a picture passes or not), or is None where only a set has one (FID).
    `scores` has `overall` and parts by name, such as one per task.
    """

    values: NDArray[np.float64] | None
    scores: dict[str, float]

    @property
    def overall(self) -> float:
        """The score of the set."""
        return self.scores["overall"]

    @property
    def mean(self) -> float:
        """Mean over the pictures, or `overall` where a picture has no number. What training decides by."""
        return self.overall if self.values is None else float(self.values.mean())


class Judge(ABC):
    """Gives numbers for pictures. One judge serves validation while training, choices of stages, floors and `bench`."""

    metric: str  # name of the number in manifests and reports: composition, clip_score, fid, ...
    higher_is_better: bool = True

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Metric, digest of weights or program, and reference: all that the numbers depend on beside the pictures."""

    @abstractmethod
    def judge(self, drawn: Drawn) -> Judgement:
        """Judge a set of pictures. Raises NumericsError for a number that is not finite."""

    def better(self, score: float) -> float:
        """`score` in an order in which more is better."""
        return score if self.higher_is_better else -score
