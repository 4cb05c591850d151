"""A judge without weights: the student's pictures beside the teacher's pictures of the same prompts and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import NumericsError, UsageError
from flashgen.judges.base import Drawn, Judge, Judgement, Pictures

Draw = Callable[[Sequence[str], Sequence[int]], Pictures]
Values = NDArray[np.float64]
SIDE_PX = 32  # longer side of the pictures that distances are taken of
REQUESTS = 2  # of which the teacher's pictures stay in memory
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class TeacherJudge(Judge):
    """Compares pictures with those that `draw(prompts, seeds)` gives of the teacher; `teacher` is its digest, for `identity`.

    `overall` (metric `teacher_distance`, lower is better): mean over pictures of the root mean square difference between the two pictures
    of one prompt and noise, each reduced by averaging to at most 32 px on its longer side, in parts of the full range (0 to 1). Our choice:
    at that size layout and colour count, and fine texture does not.

    Parts are ratios to the teacher's pictures, 1 where both agree; a part is left out where the teacher's number is 0 or not defined:

    `diversity`: mean distance, as above, between two pictures of one prompt and different noise; where no prompt was drawn twice, between
    two pictures of different prompts (our choice). Mode collapse makes it small.
    `saturation`: mean over all pixels of HSV saturation, (max - min) / max of the channels, 0 for black (Smith 1978).
    `sharpness`: mean over pictures of the variance of the 4-neighbour Laplacian of luma (Pech-Pacheco et al. 2000, LAPV). Blur makes it
    small, noise makes it large.
    """

    metric = "teacher_distance"
    higher_is_better = False

    def __init__(self, draw: Draw, teacher: str) -> None:
        self.teacher = teacher
        self._draw = lru_cache(maxsize=REQUESTS)(draw)

    def identity(self) -> dict[str, Any]:
        """The metric and the teacher's digest."""
        return {"metric": self.metric, "teacher": self.teacher}

    def judge(self, drawn: Drawn) -> Judgement:
        """Judge `drawn`; its teacher's pictures are drawn once for the last two requests.

        Raises UsageError for no pictures and for sizes other than the teacher's, and NumericsError for a number that is not finite.
        """
        if not len(drawn.pictures):
            raise UsageError("the judge `teacher` got no pictures to judge; draw at least one")
        reference = self._draw(tuple(drawn.prompts), tuple(drawn.seeds))
        for ours, theirs in zip(drawn.pictures, reference, strict=True):
            if ours.shape != theirs.shape:
                sizes = " and ".join(f"{x.shape[1]}x{x.shape[0]}" for x in (ours, theirs))
                raise UsageError(f"the judge `teacher` compares pictures of one size, not {sizes} px; draw at the teacher's size")
        ours, theirs = _reduced(drawn.pictures), _reduced(reference)
        values = np.array([_distance(a, b) for a, b in zip(ours, theirs, strict=True)])
        scores = {"overall": float(values.mean())}
        numbers = {
            "diversity": (diversity(ours, drawn.prompts), diversity(theirs, drawn.prompts)),
            "saturation": (_mean(saturation, drawn.pictures), _mean(saturation, reference)),
            "sharpness": (_mean(sharpness, drawn.pictures), _mean(sharpness, reference)),
        }
        scores |= {name: mine / of_teacher for name, (mine, of_teacher) in numbers.items() if mine is not None and of_teacher}
        if not np.isfinite([*scores.values(), *values]).all():
            raise NumericsError(f"the judge `teacher` gives {scores}; look for broken pictures")
        return Judgement(values, scores)


def saturation(picture: Pictures) -> float:
    """Mean HSV saturation of a picture [H, W, 3], 0 to 1."""
    high, low = picture.max(2).astype(np.float64), picture.min(2)
    return float(np.mean((high - low) / np.maximum(high, 1)))


def sharpness(picture: Pictures) -> float:
    """Variance of the Laplacian of the luma, 0 to 255, of a picture [H, W, 3], over the pixels with four neighbours."""
    y = picture @ GREY
    return float(np.var(y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1])) if min(y.shape) > 2 else 0.0


def diversity(pictures: Sequence[Values], prompts: Sequence[str]) -> float | None:
    """Mean distance between pictures of one prompt, averaged over the prompts with at least two, else between all; None for one picture."""
    groups: dict[str, list[Values]] = {}
    for picture, prompt in zip(pictures, prompts, strict=True):
        groups.setdefault(prompt, []).append(picture)
    several = [group for group in groups.values() if len(group) > 1] or [list(pictures)]
    if len(several[0]) < 2:
        return None
    return float(np.mean([np.mean([_distance(a, b) for i, a in enumerate(group) for b in group[:i]]) for group in several]))


def _distance(a: Values, b: Values) -> float:
    """Root mean square difference; of different shapes, of the larger picture cut to both."""
    rows, columns = np.minimum(a.shape[:2], b.shape[:2])
    return float(np.sqrt(np.mean((a[:rows, :columns] - b[:rows, :columns]) ** 2)))


def _reduced(pictures: Iterable[Pictures]) -> list[Values]:
    """Pictures in [0, 1] whose longer side is at most `SIDE_PX`, reduced by averaging."""
    from PIL import Image

    reduced = []
    for picture in pictures:
        height, width = picture.shape[:2]
        scale = min(1.0, SIDE_PX / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        reduced.append(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX), np.float64) / 255)
    return reduced


def _mean(number: Callable[[Pictures], float], pictures: Iterable[Pictures]) -> float:
    return float(np.mean([number(picture) for picture in pictures]))
