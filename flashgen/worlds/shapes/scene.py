"""The grammar of the shapes world: scenes, the prompts that ask for them, and GenEval's six tasks.

A `Scene` is a finished picture (every attribute decided). A `Request` is what a prompt asks for: the
same structure with colours, background and relation possibly left open. `Request.caption()` writes the
prompt; `parse` reads one back, so any prompt in the grammar can be judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (245, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (60, 205, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TASKS: tuple[Task, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SIZE_PX = 64
MIN_GAP_PX = 4.0
LATTICE = 4  # cells per side, on whose corners shapes stand: the patches of the shapes transformer
RADIUS = 0.18  # in units of the picture's side


@dataclass(frozen=True)
class Item:
    """One drawn shape; centre and radius in units of the picture's side (0..1)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A finished picture."""

    items: tuple[Item, ...]
    background: str


@dataclass(frozen=True)
class Group:
    """`count` shapes of one kind; `color` None means the prompt leaves it open."""

    count: int
    color: str | None
    shape: str

    def words(self) -> str:
        """The group in words, as in `two red circles`."""
        noun = self.shape if self.count == 1 else PLURALS[self.shape]
        return " ".join([NUMBERS[self.count], *([self.color] if self.color else []), noun])


@dataclass(frozen=True)
class Request:
    """Contents that a prompt asks for: one or two groups, perhaps a relation first->second, perhaps a background."""

    task: Task
    groups: tuple[Group, ...]
    relation: Relation | None = None
    background: str | None = None

    def caption(self) -> str:
        """The prompt of the request."""
        join = f" {self.relation} " if self.relation else " and "
        text = join.join(g.words() for g in self.groups)
        return f"{text} on a {self.background} background" if self.background else text


def parse(prompt: str) -> Request:
    """Read a prompt of the grammar. Raises ValueError when the prompt is not in it."""
    text = " ".join(prompt.lower().replace(",", " ").strip().rstrip(".").split())
    background = None
    if found := re.search(r" on an? (\w+)(?: background)?$", text):
        background, text = found.group(1), text[: found.start()]
        if background not in BACKGROUNDS:
            raise ValueError(f"unknown background '{background}' in prompt '{prompt}'")
    text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    relation: Relation | None = next((r for r in RELATIONS if f" {r} " in text), None)
    groups = tuple(_parse_group(part, prompt) for part in re.split(f" {relation} " if relation else " and ", text))
    if len(groups) > 2:
        raise ValueError(f"more than two kinds of shapes in prompt '{prompt}'")
    return Request(_task_of(groups, relation), groups, relation, background)


def _parse_group(text: str, prompt: str) -> Group:
    words = text.split()
    counts = {w: n for n, w in NUMBERS.items()} | {"an": 1, "one": 1}
    nouns = {s: s for s in SHAPES} | {p: s for s, p in PLURALS.items()}
    if len(words) not in (2, 3) or words[0] not in counts or words[-1] not in nouns:
        raise ValueError(f"'{text}' is not '<count> [color] <shape>' in prompt '{prompt}'")
    color = words[1] if len(words) == 3 else None
    if color is not None and color not in COLORS:
        raise ValueError(f"unknown color '{color}' in prompt '{prompt}'")
    return Group(counts[words[0]], color, nouns[words[-1]])


def _task_of(groups: tuple[Group, ...], relation: Relation | None) -> Task:
    if relation:
        return "position"
    if any(g.count > 1 for g in groups):
        return "counting"
    if len(groups) == 2:
        return "color_attr" if any(g.color for g in groups) else "two_object"
    return "colors" if groups[0].color else "single_object"


def sample_request(rng: np.random.Generator, task: Task | None = None, *, color_prob: float = 0.5, background_prob: float = 0.5) -> Request:
    """Draw a prompt. Colours are open or stated with `color_prob` where the task leaves that free."""
    task = task or TASKS[rng.integers(len(TASKS))]
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < background_prob else None
    two = task in ("two_object", "position", "color_attr")
    count = int(rng.integers(2, 5)) if task == "counting" else 1
    shapes = rng.choice(SHAPES, 2 if two else 1, replace=False)
    colored = {"colors": True, "color_attr": True, "single_object": False, "two_object": False}.get(task, rng.random() < color_prob)
    colors = rng.choice(list(COLORS), len(shapes), replace=False) if colored else [None] * len(shapes)
    groups = tuple(Group(count, None if c is None else str(c), str(s)) for s, c in zip(shapes, colors, strict=True))
    relation = RELATIONS[rng.integers(4)] if task == "position" else None
    return Request(task, groups, relation, background)


def realise(request: Request, rng: np.random.Generator, *, free: bool = False) -> Scene:
    """A random finished picture that fulfils the request.

    Shapes have one size and stand on a 16 px lattice, two and more in the middle of a quadrant each, so that a small teacher
    can learn in an hour which is which (our choice; docs/lab-log.md). `free` lifts these limits; the autoencoder is trained on
    such scenes.
    """
    background = request.background or str(rng.choice(list(BACKGROUNDS)))
    kinds = [(g.shape, g.color or str(rng.choice(list(COLORS)))) for g in request.groups for _ in range(g.count)]
    if len(kinds) > 4:
        raise ValueError(f"there is room for four shapes in a picture, not {len(kinds)}")
    low, high = {1: (0.17, 0.26), 2: (0.13, 0.19)}.get(len(kinds), (0.11, 0.145)) if free else (RADIUS, RADIUS)
    while True:
        radii = rng.uniform(low, high, len(kinds))
        centres = _place(radii, request.relation, rng, free)
        if centres is not None:
            items = tuple(Item(s, c, float(x), float(y), float(r)) for (s, c), (x, y), r in zip(kinds, centres, radii, strict=True))
            return Scene(items, background)


def _place(radii: np.ndarray, relation: Relation | None, rng: np.random.Generator, free: bool) -> np.ndarray | None:
    """Non-overlapping centres [n, 2]; a relation is drawn unmistakably: its axis is 1.5 x the other one."""
    margin, gap = 2 / SIZE_PX, MIN_GAP_PX / SIZE_PX
    for _ in range(40):
        low, high = (radii + margin)[:, None], (1 - radii - margin)[:, None]
        xy = rng.uniform(low, high, (len(radii), 2))
        if not free:
            xy = rng.choice(np.arange(1, LATTICE, 1 if len(radii) == 1 else 2), (len(radii), 2)) / LATTICE
        delta = xy[:, None] - xy[None]
        # Squares reach sqrt(pi)/2 of their radius sideways but further at the corners, hence the 1.2.
        apart = np.hypot(delta[..., 0], delta[..., 1]) - 1.2 * (radii[:, None] + radii[None])
        if np.any(apart[~np.eye(len(radii), dtype=bool)] < gap):
            continue
        if relation and not related(xy[0], xy[1], relation, dominance=1.5):
            continue
        return np.asarray(xy)
    return None


def related(first: np.ndarray, second: np.ndarray, relation: Relation, *, dominance: float = 1.0) -> bool:
    """Whether `first` stands in `relation` to `second`: the named axis must dominate the other one."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return bool(sign * along > dominance * abs(across))


def mutate(request: Request, rng: np.random.Generator) -> Request:
    """The same request with exactly one stated attribute changed to a different value."""
    slots = ["shape", "count"] + ["color"] * any(g.color for g in request.groups)
    slots += ["relation"] * bool(request.relation) + ["background"] * bool(request.background)
    slot = str(rng.choice(slots))
    if slot == "relation":
        return _with(request, relation=_other(rng, RELATIONS, request.relation))
    if slot == "background":
        return _with(request, background=_other(rng, tuple(BACKGROUNDS), request.background))
    index = int(rng.choice([i for i, g in enumerate(request.groups) if slot != "color" or g.color]))
    group = request.groups[index]
    changed = {
        "shape": lambda: Group(group.count, group.color, _other(rng, SHAPES, group.shape)),
        "color": lambda: Group(group.count, _other(rng, tuple(COLORS), group.color), group.shape),
        "count": lambda: Group(int(_other(rng, tuple(NUMBERS), group.count)), group.color, group.shape),
    }[slot]()
    return _with(request, groups=(*request.groups[:index], changed, *request.groups[index + 1 :]))


def _other(rng: np.random.Generator, values: tuple, current: object):  # type: ignore[no-untyped-def, type-arg]
    return [v for v in values if v != current][rng.integers(len(values) - 1)]


def _with(request: Request, **changes: object) -> Request:
    return Request(**{**request.__dict__, **changes})


def prompt_set(seed: int, per_task: int, *, color_prob: float = 0.5, background_prob: float = 0.5) -> list[Request]:
    """`per_task` requests of each task, in task order; the same seed gives the same list."""
    rng = np.random.default_rng([seed, 0x5CE9E])
    return [sample_request(rng, t, color_prob=color_prob, background_prob=background_prob) for t in TASKS for _ in range(per_task)]
