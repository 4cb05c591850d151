"""Opening what a command names: artifacts, their world and sampler, and the recipe that goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen import families, worlds
from flashgen.artifact.manifest import MAX_TOKENS, Sampler
from flashgen.artifact.store import MEND, Artifact, open_artifact
from flashgen.errors import ArtifactError, UsageError
from flashgen.families.configs import configs_in
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe

if TYPE_CHECKING:
    from flashgen.families.base import Family
    from flashgen.worlds.base import World


def open_input(ref: str | Path, kinds: tuple[str, ...] | None = None, verify: bool = False) -> Artifact:
    """Open an artifact. The name of a world, as in `shapes`, is its embedded teacher wherever a teacher will do; `./shapes` is a folder."""
    if ref in worlds.NAMES and (kinds is None or "teacher" in kinds):
        ref = worlds.get(str(ref)).teacher()
    artifact = open_artifact(ref, kinds, verify)
    artifact.verify(".json")  # configs are read before any stage starts
    return artifact


def world_of(artifact: Artifact) -> World | None:
    """The world that the artifact names, or None. For manifests of 0.1 and 0.2, which name none, the lineage decides."""
    if artifact.manifest.world is not None:
        return worlds.get(artifact.manifest.world)
    embedded = {open_artifact(worlds.get(name).teacher()).manifest.digest: name for name in worlds.NAMES}
    seen: set[str] = set()
    queue = [artifact.as_parent("self")]
    while queue:
        parent = queue.pop()
        if parent.digest in embedded:
            return worlds.get(embedded[parent.digest])
        if parent.path in seen:
            continue
        seen.add(parent.path)
        try:
            manifest = open_artifact(parent.path).manifest
        except ArtifactError:
            continue
        if not manifest.flashgen_version.startswith(("0.1.", "0.2.")):
            continue  # it would have named its world
        queue += manifest.parents if manifest.digest == parent.digest else []
    return None


def sampler_of(artifact: Artifact) -> Sampler:
    """How to draw from `artifact`. Raises ArtifactError when flashgen cannot; an export draws without its family."""
    manifest = artifact.manifest
    family = None if manifest.kind == "device" else families.get(manifest.family)  # an unknown one is an error
    if manifest.kind == "gguf":
        raise ArtifactError(
            f"{artifact.path} is a transformer for stable-diffusion.cpp, ComfyUI-GGUF or diffusers, which read its model.gguf; with "
            f"flashgen draw from the artifact that it was exported from, {manifest.parents[0].path}"
        )
    if manifest.sampler is None:
        raise ArtifactError(f"{artifact.path}: the manifest has no sampler, so nothing says how to draw; make it again with --force")
    if family is not None:
        _check_sampler(artifact.path, family, manifest.sampler)
    return manifest.sampler


def _check_sampler(folder: Path, family: Family, sampler: Sampler) -> None:
    """Raises ArtifactError for token lengths and a picture size that the networks in `folder` do not have."""
    configs = configs_in(folder, family)
    for name, encoder in family.text_encoders.items():
        length, config = sampler.tokens.get(encoder.tokens, -1), configs(name) if (folder / name).is_dir() else {}
        least, most = (2 if config else 0), min(MAX_TOKENS, config.get("max_position_embeddings", MAX_TOKENS))
        if not least <= length <= most:
            raise ArtifactError(f"{folder}: sampler.tokens.{encoder.tokens} is not {least} to {most}, as {name} needs; {MEND}")
    if (folder / "transformer").is_dir() and (folder / "vae").is_dir():
        unit, largest = family.size_limits(configs)
        if any(side % unit or side > largest for side in sampler.size_px):
            raise ArtifactError(f"{folder}: sampler.size_px {sampler.size_px} is not in multiples of {unit} up to {largest} px; {MEND}")


def teacher_of(student: Artifact) -> Artifact:
    """The teacher in the lineage of `student`, by path, each step checked by digest; a teacher's is itself."""
    current, seen = student, set[str]()
    while current.manifest.kind != "teacher":
        if current.manifest.digest in seen:
            raise ArtifactError(f"{student.path} names no teacher: the parents of {current.path} go round in a circle; make it again")
        seen.add(current.manifest.digest)
        parents = {parent.role: parent for parent in current.manifest.parents}
        if (parent := parents.get("teacher")) is not None:
            made_from = open_artifact(parent.path, ("teacher",))
        elif current.manifest.parents:
            parent = current.manifest.parents[0]
            made_from = open_artifact(parent.path)
        else:
            raise ArtifactError(f"{student.path} names no teacher; it is no output of flashgen distill, and none was made from one")
        if made_from.manifest.digest != parent.digest:
            raise ArtifactError(f"the {parent.role} at {parent.path} is not the one {current.path} was made from; make it again")
        current = made_from
    return current


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe as the command line names it; without a name it is the default of the artifact's world."""

    name: str | None = None
    overrides: tuple[str, ...] = ()

    def resolve(self, source: Artifact | None) -> Recipe:
        """The resolved recipe. Raises UsageError when there is no name and `source` belongs to no world."""
        if self.name is not None:
            return load(self.name, self.overrides)
        world = world_of(source) if source is not None else worlds.get(worlds.NAMES[0])
        if world is None:
            assert source is not None
            raise UsageError(
                f"{source.path} belongs to no world, so it has no default recipe; give one with --recipe NAME|FILE (flashgen's own: "
                "docs/recipes.md), or make a file that extends one and give that"
            )
        return load(world.recipe, self.overrides)
