"""The judge: does a picture show what its prompt asked for? Classical vision, no network.

It sees: a uniform background (from the border), connected shapes in front of it, each one's colour (nearest
palette entry of its core), its outline (best intersection-over-union with the four canonical shapes) and its
centre. GenEval's rule then applies: the picture passes when everything asked for is there and nothing else.
Stricter than GenEval: stray blobs, unclear colours and unclear outlines fail the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from flashgen.worlds.shapes.render import coverage
from flashgen.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, TASKS, Item, Request, related

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background that makes a pixel foreground
MIN_AREA = 0.006  # of the picture; the smallest true shape covers 0.029, drawn `free`
STRAY_AREA = 0.002  # smaller specks are ignored as noise, unless together they cover MIN_AREA
COLOR_TOLERANCE = 75.0  # RGB distance between a shape's median colour and its palette entry
CORE_PURITY = 0.7  # share of a shape's core whose nearest palette colour is the shape's
# With the best canonical outline. A disc and a square share 0.82, a disc and a diamond 0.84; thin bars lose more at their edges.
MIN_IOU = {"circle": 0.86, "square": 0.86, "triangle": 0.86, "cross": 0.8}
BORDER_PURITY = 0.8  # share of the border that is the background colour
BACKGROUND_TOLERANCE = 60.0


@dataclass(frozen=True)
class Seen:
    """One shape found in a picture; centre in 0..1."""

    shape: str
    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """Whether a picture passed, why not, and what was seen in it."""

    passed: bool
    reasons: tuple[str, ...] = ()
    seen: tuple[Seen, ...] = field(default=())
    background: str | None = None


def look(image: np.ndarray) -> tuple[str | None, list[Seen], list[str]]:
    """Background name, shapes found and complaints for one uint8 picture [H, W, 3]."""
    pixels = image.astype(np.float32)
    size = image.shape[0]
    names, palette = list(BACKGROUNDS), np.asarray(list(BACKGROUNDS.values()), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    nearest = np.linalg.norm(border[:, None] - palette, axis=-1)
    votes = np.bincount(nearest.argmin(1)[nearest.min(1) < BACKGROUND_TOLERANCE], minlength=len(names))
    if votes.max() < BORDER_PURITY * len(border):
        return None, [], ["the background is not one of the palette's"]
    index = int(votes.argmax())
    foreground = np.linalg.norm(pixels - palette[index], axis=-1) > FOREGROUND_DISTANCE
    labels, count = ndimage.label(foreground)
    seen, complaints, specks = [], [], 0.0
    for label in range(1, count + 1):
        mask = labels == label
        area = mask.mean()
        if area < STRAY_AREA:
            specks += area
            continue
        if area < MIN_AREA:
            complaints.append("a stray blob")
            continue
        color = _color(pixels, mask)
        shape = _shape(_outline(pixels, mask, palette[index], color)) if color else None
        if color is None or shape is None:
            complaints.append("a shape of unclear " + ("colour" if color is None else "outline"))
            continue
        y, x = np.argwhere(mask).mean(0)
        seen.append(Seen(shape, color, (x + 0.5) / size, (y + 0.5) / size))
    if specks >= MIN_AREA:
        complaints.append("many specks")
    return names[index], seen, complaints


def _color(pixels: np.ndarray, mask: np.ndarray) -> str | None:
    core = ndimage.binary_erosion(mask, iterations=max(1, mask.shape[0] // 48))
    if core.sum() < 0.25 * mask.sum():
        core = ndimage.binary_erosion(mask) if ndimage.binary_erosion(mask).sum() >= 4 else mask
    names, palette = list(COLORS), np.asarray(list(COLORS.values()), np.float32)
    distance = np.linalg.norm(np.median(pixels[core], axis=0) - palette, axis=-1)
    best = int(distance.argmin())
    agree = np.linalg.norm(pixels[core][:, None] - palette, axis=-1).argmin(1) == best
    return names[best] if distance[best] < COLOR_TOLERANCE and agree.mean() >= CORE_PURITY else None


def _outline(pixels: np.ndarray, mask: np.ndarray, background: np.ndarray, color: str) -> np.ndarray:
    """The mask with its edge where the picture is half shape, half background, which blur and JPEG leave in place."""
    span = np.asarray(COLORS[color], np.float32) - background
    alpha = (pixels - background) @ span / (span @ span)
    return np.asarray((alpha > 0.5) & ndimage.binary_dilation(mask, iterations=2))


@cache
def _template(shape: str, size: int = 64) -> np.ndarray:
    """Canonical mask [size, size] of area fraction about 1/5, centred on its centroid."""
    return _normalise(coverage(Item(shape, "red", 0.5, 0.5, 0.3), 4 * size) > 0.5, size)


def _normalise(mask: np.ndarray, size: int = 64) -> np.ndarray:
    """Resample a mask so that its centroid is the centre and its area is a fixed fraction (area 0.2)."""
    centre = np.argwhere(mask).mean(0)
    scale = np.sqrt(mask.sum() / (0.2 * size * size))
    offset = centre - scale * (size - 1) / 2
    return np.asarray(ndimage.affine_transform(mask.astype(np.float32), [scale, scale], offset, (size, size), order=1) > 0.5)


def _shape(mask: np.ndarray) -> str | None:
    normal = _normalise(mask)
    iou = [float((normal & _template(s)).sum() / (normal | _template(s)).sum()) for s in SHAPES]
    best = int(np.argmax(iou))
    return SHAPES[best] if iou[best] >= MIN_IOU[SHAPES[best]] else None


def judge(image: np.ndarray, request: Request) -> Verdict:
    """Judge one uint8 picture [H, W, 3] against a request."""
    background, seen, reasons = look(image)
    if request.background and background is not None and background != request.background:
        reasons.append(f"background is {background}, not {request.background}")
    wanted = sum(g.count for g in request.groups)
    if background is not None and len(seen) != wanted:
        reasons.append(f"{len(seen)} shapes, not {wanted}")
    if not reasons and not _assignable(seen, request):
        reasons.append("the shapes, colours or places are not those asked for")
    return Verdict(not reasons, tuple(reasons), tuple(seen), background)


def _assignable(seen: list[Seen], request: Request) -> bool:
    slots = [g for g in request.groups for _ in range(g.count)]
    for order in permutations(seen):
        if all(s.shape == g.shape and g.color in (None, s.color) for s, g in zip(order, slots, strict=True)):
            places, first = [np.array([s.x, s.y]) for s in order], request.groups[0].count
            relation = request.relation
            if relation is None or all(related(a, b, relation) for a in places[:first] for b in places[first:]):
                return True
    return False


def composition(passed: list[bool], requests: list[Request]) -> dict[str, float]:
    """Pass rates by task and `overall`, their unweighted mean over the tasks present (GenEval's rule)."""
    by_task: dict[str, list[bool]] = {}
    for ok, request in zip(passed, requests, strict=True):
        by_task.setdefault(request.task, []).append(ok)
    scores: dict[str, float] = {task: float(np.mean(by_task[task])) for task in TASKS if task in by_task}
    return {"overall": float(np.mean(list(scores.values()))), **scores}
