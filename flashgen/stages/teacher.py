"""flashgen teacher: train a world's teacher, import a diffusers pipeline, or fabricate one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen import families, worlds
from flashgen.artifact.draft import Draft
from flashgen.artifact.files import check_file, copy, read_json
from flashgen.artifact.hub import HUB, check_origin, fetch
from flashgen.artifact.manifest import NAME, Parent, Sampler
from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError, UsageError
from flashgen.stages.base import Result, Stage, Takes, run
from flashgen.stages.inputs import RecipeChoice, open_input
from flashgen.stages.trainings import check_compiler

if TYPE_CHECKING:
    from flashgen.families.base import Family
    from flashgen.worlds.base import World

SMALL = (".json", ".txt", ".model")
SUFFIXES = (*SMALL, ".safetensors")
HELD_OUT_PER_TASK = 40


class _NoInput(Stage):
    """A stage that starts from nothing that is an artifact."""

    takes: ClassVar[Takes] = {}
    kind = "teacher"
    cpu_only = True
    name = "teacher"


class Train(_NoInput):
    """The embedded world's teacher, trained from nothing."""

    @cached_property
    def family(self) -> Family:
        return families.get(self.recipe.family or "sd3")

    @cached_property
    def world(self) -> World | None:
        return worlds.get(worlds.NAMES[0])

    def check(self) -> None:
        if self.recipe.teacher.flow.compile:
            check_compiler("teacher.flow.compile=false")

    def settings(self) -> dict[str, Any]:
        return self.recipe.teacher.model_dump(mode="json")

    def make(self, draft: Draft) -> Result:
        from flashgen.models.save import save_pipeline

        assert self.world is not None
        data, held_out = self.world.teacher_data(), self.world.prompts(self.seed, HELD_OUT_PER_TASK)
        config, checkpoint = self.recipe.teacher, self.recipe.checkpoint
        pipe, sampler = self.family.train_teacher(data, held_out, config, self.seed, draft.work, checkpoint)
        save_pipeline(draft.path, pipe)
        return Result(sampler)


@dataclass
class Random(_NoInput):
    """Right shapes, seeded random weights: for tests of memory, speed and formats without a hub."""

    like: str = ""
    layers: int | None = None  # at most, per network
    of_world: str | None = None

    needs_recipe = False

    @cached_property
    def family(self) -> Family:
        by_name = {name: family for family in map(families.get, families.names()) for name in family.architectures}
        if self.like not in by_name:
            raise UsageError(f"--like '{self.like}' is not an architecture; choose from {', '.join(by_name)}")
        return by_name[self.like]

    @cached_property
    def world(self) -> World | None:
        return None if self.of_world is None else worlds.get(self.of_world)

    def check(self) -> None:
        self.family  # noqa: B018  an unknown architecture is an error

    def settings(self) -> dict[str, Any]:
        options = {"layers": self.layers, "world": self.of_world}
        return {"random": {"like": self.like} | {name: value for name, value in options.items() if value is not None}}

    def make(self, draft: Draft) -> Result:
        words = self.world.teacher_data().words if self.world else None
        return Result(self.family.write_random(self.like, self.layers, words, draft.path, self.seed), validate=False)


@dataclass
class Import(_NoInput):
    """A diffusers folder or a hub id, checked, copied and digested."""

    origin: str = ""  # a folder, or hf:OWNER/NAME
    of_world: str | None = None

    needs_recipe = False

    @cached_property
    def folder(self) -> Path:
        """The pipeline's folder, downloaded if it is on the hub."""
        return _download(self.origin.removeprefix(HUB)) if self.origin.startswith(HUB) else Path(self.origin)

    @cached_property
    def checked(self) -> tuple[Family, Sampler]:
        """Family and default sampler of the pipeline, with everything checked that a stage will read but the values of weights."""
        from flashgen.models.border import check_pipeline

        return check_pipeline(self.folder)

    @cached_property
    def family(self) -> Family:
        return self.checked[0]

    @cached_property
    def world(self) -> World | None:
        return None if self.of_world is None else worlds.get(self.of_world)

    def check(self) -> None:
        check_origin(self.origin)

    def settings(self) -> dict[str, Any]:
        return {"import": self.origin} | ({"world": self.of_world} if self.of_world else {})

    def parents(self) -> list[Parent]:
        where = self.origin if self.origin.startswith(HUB) else str(self.folder.absolute())
        return [Parent(role="source", path=where, digest=_fingerprint(self.folder, self.family))]

    def make(self, draft: Draft) -> Result:
        from flashgen.models.networks import has_nf4
        from flashgen.models.stream import plain_name, variant

        if has_nf4(self.folder / "transformer"):
            raise ArtifactError(f"{self.origin} has a transformer of NF4 codes, which is no teacher; give the pipeline in fp16 or bf16")
        for relative in _files(self.folder, self.family):
            target = draft.path / relative.parent / plain_name(relative.name)
            copy((self.folder / relative).resolve(), target)  # no links: the user's folder may change
            if variant(relative.name) and target.suffix == ".json":  # an index of shards, which names them with the variant, too
                shards = read_json(target)
                names = {name: plain_name(str(shard)) for name, shard in shards["weight_map"].items()}
                target.write_text(json.dumps(shards | {"weight_map": names}, indent=2) + "\n")
        index = read_json(draft.path / "model_index.json")
        unknown = {name for name, part in index.items() if isinstance(part, list) and name not in self.family.components}
        index |= {name: [None, None] for name in unknown}
        (draft.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        return Result(self.checked[1], validate=False)


def open_teacher(ref: str, out: Path) -> Artifact:
    """A teacher artifact; a plain diffusers folder or hf:OWNER/NAME is imported beside `out` first."""
    folder = Path(ref)
    plain = (folder / "model_index.json").is_file() and not (folder / NAME).exists()
    if plain or ref.startswith(HUB):
        return run(Import, {}, out.absolute().with_name(f"{out.absolute().name}-teacher"), RecipeChoice(), origin=ref)
    return open_input(ref, ("teacher",))


def _download(hub_id: str) -> Path:
    components = {component for family in map(families.get, families.names()) for component in family.components}
    patterns = ["model_index.json", *(f"{part}/*{suffix}" for part in sorted(components) for suffix in SUFFIXES)]
    return fetch(hub_id, patterns, ignore_patterns=["*.fp16*"])


def _files(folder: Path, family: Family) -> list[Path]:
    """The files of the pipeline, relative to `folder`. A hub repository holds more: other layouts, second copies of weights."""
    from flashgen.models.networks import part_classes
    from flashgen.models.stream import weight_files, weight_layout

    kept = [folder / "model_index.json"]
    for part in part_classes(folder, family):
        if part in family.networks:
            index, _ = weight_layout(folder / part)
            kept += [*([index] if index else []), *weight_files(folder / part)]
        kept += [path for path in sorted((folder / part).glob("*")) if path.suffix in SMALL and ".safetensors" not in path.name]
    for path in kept:
        check_file(path)
    return [path.relative_to(folder) for path in kept]


def _fingerprint(folder: Path, family: Family) -> str:
    """sha256 over names, sizes and times of the pipeline's files: changes when a file does, without reading gigabytes."""
    states = [(str(path), (folder / path).stat()) for path in sorted(_files(folder, family))]
    return hashlib.sha256(json.dumps([(name, state.st_size, state.st_mtime_ns) for name, state in states]).encode()).hexdigest()
