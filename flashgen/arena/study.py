"""A study: pictures of several artifacts under opaque names, and which comparisons each rater sees.

STUDY/study.json has the settings, the artifacts, the items (prompt and seed) and a random key; STUDY/pictures has the pictures without
metadata. Names of pictures and comparisons are hashes under the key, so that they tell nobody which artifact drew what.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from flashgen.artifact.files import fsync
from flashgen.errors import ArtifactError, UsageError
from flashgen.png import read_picture
from flashgen.progress import say, track, warn
from flashgen.recipe.base import Model

VERSION = 1
GOLD_ITEMS = 20  # at most so many pictures are spoiled for gold pairs
NOISE_SHARE = 0.65  # of a spoiled picture
Kind = Literal["pair", "repeat", "gold"]


class Settings(Model):
    """Settings of a study."""

    question: str = Field("Which picture do you prefer for this prompt?", min_length=1, max_length=300, description="the one question")
    ties: bool = Field(True, description="whether a rater may prefer neither picture")
    per_rater: int = Field(40, ge=1, description="pairs that each rater compares, without repeats and gold pairs")
    repeats: float = Field(0.05, ge=0, le=0.5, description="share of `per_rater` that is asked again with the sides swapped")
    gold: float = Field(0.05, ge=0, le=0.5, description="share of `per_rater` that is added as a picture against a spoiled one")
    seed: int = Field(0, ge=0, description="seed of pairs, sides and order")
    prompts: int | None = Field(None, ge=1, description="number of prompts that the bench must have")
    seeds: int | None = Field(None, ge=1, description="number of pictures per prompt that the bench must have")


# SD3.5-Flash's study: 124 raters, 507 prompts, 4 seeds. Its shares of repeats and gold pairs and its pairs per rater are not published:
# 50 pairs from each of 124 raters judge each of 2028 pairs of pictures three times (our choice).
PRESETS = {"sd35-flash": Settings(per_rater=50, prompts=507, seeds=4)}
SD35_FLASH_RATERS = 124


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one item, side by side; `left` and `right` are numbers of artifacts, None is the spoiled picture of a gold pair."""

    id: str
    kind: Kind
    item: int
    left: int | None
    right: int | None


class Study:
    """A study that was built in `folder`. Raises ArtifactError if there is none or `study.json` is broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            document = json.loads((folder / "study.json").read_text())
            if document["version"] != VERSION:
                raise ArtifactError(
                    f"{folder}/study.json has version {document['version']}, this flashgen reads {VERSION}; update flashgen"
                )
            self.settings = Settings(**document["settings"])
            self.id, self._key = str(document["id"]), bytes.fromhex(document["key"])
            self.artifacts = [str(artifact["name"]) for artifact in document["artifacts"]]
            self.prompts = [str(item["prompt"]) for item in document["items"]]
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} holds no study (no study.json); build one with flashgen bench ... --arena {folder}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{folder}/study.json is broken ({error!r}); restore it, or build the study again in a new folder"
            ) from error

    def opaque(self, *parts: object) -> str:
        """Name that tells nothing of `parts` to anybody without the study's key."""
        return hashlib.blake2b(repr(parts).encode(), key=self._key, digest_size=9).hexdigest()

    def picture(self, item: int, artifact: int | None) -> str:
        """Opaque name of the picture of an artifact (None: the spoiled one) for an item."""
        return self.opaque("picture", item, artifact)

    def picture_file(self, name: str) -> Path:
        """File of the picture with an opaque name."""
        return self.folder / "pictures" / f"{name}.png"

    @cached_property
    def pictures(self) -> dict[str, Path]:
        """File by opaque name for every picture of the study."""
        names = [self.picture(item, artifact) for item in range(len(self.prompts)) for artifact in range(len(self.artifacts))]
        spoiled = [self.picture(item, None) for item, _ in self.gold] if self.settings.gold else []
        return {name: self.picture_file(name) for name in [*names, *spoiled]}

    @cached_property
    def gold(self) -> list[tuple[int, int]]:
        """(item, artifact) of the pictures that gold pairs show beside their spoiled versions."""
        items = self._random("gold").permutation(len(self.prompts))[:GOLD_ITEMS]
        return [(int(item), i % len(self.artifacts)) for i, item in enumerate(items)]

    def plan(self, slot: int) -> list[Comparison]:
        """The comparisons of one rater in order; `slot` (0, 1, ...) is the rater's place among the raters.

        The main comparisons are dealt from one deck, slot after slot, in which every pair of artifacts occurs once per round and every
        (pair, item) once per pass. Each artifact of a pair is on the left in half of the pair's comparisons (to within one).
        """
        random, deck = self._random("slot", slot), len(self.prompts) * len(self.pairs)
        count = min(self.settings.per_rater, deck)
        sides: dict[tuple[int, int], bool] = {}
        main = []
        for card in range(slot * count, (slot + 1) * count):
            (a, b), item = self._card(card % deck)
            swap = sides[a, b] = not sides.get((a, b), bool(random.integers(2)))
            main.append((item, b, a) if swap else (item, a, b))
        main = [main[i] for i in random.permutation(count)]
        early = main[: max(1, count // 3)]  # what is asked again comes from the first third, and returns in the second half
        chosen = random.permutation(len(early))[: self._extra(self.settings.repeats) if count > 1 else 0]
        rest: list[tuple[Kind, int, int | None, int | None]] = [("pair", *choice) for choice in main[count // 2 :]]
        rest += [("repeat", early[i][0], early[i][2], early[i][1]) for i in chosen]
        order: list[tuple[Kind, int, int | None, int | None]] = [("pair", *choice) for choice in main[: count // 2]]
        order += [rest[i] for i in random.permutation(len(rest))]
        for i in random.permutation(len(self.gold))[: self._extra(self.settings.gold)]:
            item, artifact = self.gold[i]
            left, right = (artifact, None) if random.integers(2) else (None, artifact)
            order.insert(int(random.integers(len(order) + 1)), ("gold", item, left, right))
        return [Comparison(self.opaque("comparison", slot, i), *choice) for i, choice in enumerate(order)]

    def page_data(self, slot: int) -> dict[str, Any]:
        """Data of a rater's page: prompts and opaque names, no artifact and no kind of comparison."""
        comparisons = [
            {"id": c.id, "prompt": self.prompts[c.item], "left": self.picture(c.item, c.left), "right": self.picture(c.item, c.right)}
            for c in self.plan(slot)
        ]
        return {
            "study": self.id,
            "slot": slot,
            "question": self.settings.question,
            "ties": self.settings.ties,
            "comparisons": comparisons,
        }

    def raters_for(self, votes: int) -> int:
        """Number of raters after which every (pair of artifacts, item) has `votes` votes."""
        deck = len(self.prompts) * len(self.pairs)
        return math.ceil(votes * deck / min(self.settings.per_rater, deck))

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of artifacts."""
        return list(itertools.combinations(range(len(self.artifacts)), 2))

    @cached_property
    def _items(self) -> list[int]:
        return [int(item) for item in self._random("items").permutation(len(self.prompts))]

    def _card(self, card: int) -> tuple[tuple[int, int], int]:
        round_, place = divmod(card, len(self.pairs))
        pair = int(self._random("round", round_).permutation(len(self.pairs))[place])
        stride = max(1, len(self._items) // len(self.pairs))
        return self.pairs[pair], self._items[(round_ + pair * stride) % len(self._items)]

    def _extra(self, share: float) -> int:
        return math.ceil(share * self.settings.per_rater)

    def _random(self, *stream: object) -> np.random.Generator:
        digest = hashlib.sha256(repr(stream).encode()).digest()
        return np.random.default_rng([self.settings.seed, int.from_bytes(digest[:8], "big")])


def settings_of(values: Mapping[str, Any], preset: str | None = None) -> Settings:
    """Settings from `values` over those of a preset. Raises UsageError for unknown names and values out of range."""
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"there is no preset of a study called {preset}; use one of: {', '.join(PRESETS)}")
    base = PRESETS[preset].model_dump() if preset else {}
    try:
        return Settings(**{**base, **values})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"study setting {'.'.join(map(str, first['loc']))}: {first['msg']}; see docs/arena.md") from error


def build(bench_out: Path, study: Path, settings: Settings) -> Path:
    """Build a study in folder `study` from the folder that `flashgen bench --out` wrote; returns `study`.

    A study that was built before from the same pictures with the same settings is left as it is, its votes too. Raises UsageError when
    `study` holds anything else or the bench has one artifact only, ArtifactError when the bench's files are missing or broken.
    """
    artifacts, items, folders = _bench(bench_out)
    _check_counts(items, settings, bench_out)
    described = {"version": VERSION, "settings": settings.model_dump(), "artifacts": artifacts, "items": items}
    if (study / "study.json").exists():
        Study(study)  # raises if it is broken
        old = json.loads((study / "study.json").read_text())
        if {key: old.get(key) for key in described} != described:
            raise UsageError(f"{study} holds a study of other artifacts, prompts or settings; name another folder")
        return study
    if study.exists() and (not study.is_dir() or any(study.iterdir())):
        raise UsageError(f"{study} exists and holds no study; name an empty or a new folder")
    temporary = study.absolute().with_name(f".{study.absolute().name}.{os.getpid()}.tmp")
    try:
        (temporary / "pictures").mkdir(parents=True)
        document = {**described, "id": secrets.token_hex(8), "key": secrets.token_hex(32)}
        (temporary / "study.json").write_text(json.dumps(document, indent=1) + "\n")
        _write_pictures(Study(temporary), folders)
        fsync(temporary / "study.json")
        os.replace(temporary, study)
        fsync(study.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    built = Study(study)
    say(
        f"study {study}: {len(artifacts)} artifacts, {len(items)} pictures of each, {len(built.plan(0))} comparisons per rater; "
        f"raters until every pair of pictures has one vote: {built.raters_for(1)}"
    )
    return study


def drawn_rows(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row of a bench.json per folder of pictures: rows that differ in threads share theirs, and are one artifact."""
    return list({str(row["pictures"]): row for row in reversed(bench["results"])}.values())[::-1]


def _bench(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Path]]:
    """(artifacts with unique names, items, folder of pictures per artifact) of a bench."""
    try:
        bench = json.loads((folder / "bench.json").read_text())
        rows = drawn_rows(bench)
        items = [{"prompt": str(p["prompt"]), "seed": int(p["seed"]), "task": p.get("task")} for p in bench["prompts"]]
        names = [str(row["name"]) for row in rows]
        folders = [folder / str(row["pictures"]) for row in rows]
        refs = [str(row["artifact"]) for row in rows]
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no bench.json; write one with flashgen bench ARTIFACT... --out {folder}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}/bench.json is broken or has no pictures ({error!r}); run flashgen bench again") from error
    if len(names) < 2:
        raise UsageError(
            f"a preference test needs two artifacts or more, {folder}/bench.json has {len(names)}; bench more of them together"
        )
    if not items:
        raise ArtifactError(f"{folder}/bench.json has no prompts; run flashgen bench again")
    for path in folders:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{folder}/bench.json names pictures outside of its folder ({path}); run flashgen bench again")
    seen = Counter(names)
    unique = [f"{i:02d}-{name}" if seen[name] > 1 else name for i, name in enumerate(names)]
    return [{"name": name, "artifact": ref} for name, ref in zip(unique, refs, strict=True)], items, folders


def _check_counts(items: Sequence[Mapping[str, Any]], settings: Settings, folder: Path) -> None:
    """Raises UsageError if the bench has other numbers of prompts or seeds than the settings want."""
    counts = Counter(item["prompt"] for item in items)
    if settings.prompts is not None and len(counts) != settings.prompts:
        raise UsageError(
            f"{folder} has {len(counts)} prompts, the study wants {settings.prompts}; bench with that many, or change `prompts`"
        )
    if settings.seeds is not None and set(counts.values()) != {settings.seeds}:
        few = min(counts.values())
        raise UsageError(
            f"{folder} has {few} seeds for a prompt, the study wants {settings.seeds}; bench with that many, or change `seeds`"
        )


def _write_pictures(study: Study, folders: Sequence[Path]) -> None:
    """Write the pictures of every artifact, and the spoiled ones, as PNG with pixels alone: text chunks would name the artifact."""
    from PIL import Image

    sizes: list[set[tuple[int, int]]] = [set() for _ in folders]
    gold = set(study.gold) if study.settings.gold else set()
    for item in track(range(len(study.prompts)), "study", total=len(study.prompts)):
        for artifact, folder in enumerate(folders):
            source = folder / f"{item:04d}.png"
            try:
                pixels = read_picture(source, ("PNG",))
            except (OSError, ValueError) as error:
                raise ArtifactError(f"{source} is missing or is no picture ({error}); run flashgen bench again") from error
            sizes[artifact].add(pixels.shape[:2])
            Image.fromarray(pixels).save(study.picture_file(study.picture(item, artifact)))
            if (item, artifact) in gold:
                noise = study._random("noise", item).integers(0, 256, pixels.shape)
                spoiled = (1 - NOISE_SHARE) * pixels + NOISE_SHARE * noise
                Image.fromarray(spoiled.round().astype(np.uint8)).save(study.picture_file(study.picture(item, None)))
    if any(size != sizes[0] for size in sizes):
        warn("the artifacts' pictures differ in size, by which a rater could tell the artifacts apart; bench them at one size")
