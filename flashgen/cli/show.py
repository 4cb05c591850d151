"""flashgen show"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.errors import ArtifactError
from flashgen.progress import printable

if TYPE_CHECKING:
    from flashgen.artifact.manifest import Manifest, Parent
    from flashgen.artifact.store import Artifact

MAX_INDENT = 20  # generations


@command()
def show(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="any artifact")],
    options: Options,
    verify: Annotated[bool, typer.Option("--verify", help="check the sha256 of every file")] = False,
) -> None:
    """Print lineage, recipe and digests."""
    from flashgen.stages.inputs import open_input

    opened = open_input(artifact, verify=verify)
    if options.json:
        print(opened.manifest.model_dump_json())
    else:
        print("\n".join(_lines(opened, verify)))


def _lines(opened: Artifact, verified: bool) -> list[str]:
    manifest = opened.manifest
    sampler = manifest.sampler
    lines = [
        f"{opened.path}: {manifest.kind} {manifest.version} by {manifest.stage}, {manifest.created}",
        f"size     {opened.size_bytes() / 2**20:.1f} MiB in {len(manifest.files)} files, {'digests' if verified else 'sizes'} checked",
        f"digest   {manifest.digest}",
        f"seed     {manifest.seed}",
        f"family   {manifest.family}; world {manifest.world or 'none'}",
    ]
    if sampler:
        sigmas = " ".join(f"{sigma:.4g}" for sigma in sampler.sigmas)
        lines.append(f"sampler  sigmas {sigmas}; guidance {sampler.guidance:g}; encoder {sampler.encoder}; {sampler.size_px} px")
    if "decoder" in manifest.extra:
        lines.append(f"decoder  {manifest.extra['decoder']}: pictures differ a little from those of the VAE")
    lines += [f"recipe   {json.dumps(manifest.recipe)}", f"metrics  {json.dumps(manifest.metrics)}", "lineage"]
    return [printable(line) for line in [*lines, *_lineage(opened)]]


def _lineage(opened: Artifact) -> Iterator[str]:
    """Lines for the artifact and, indented below, its ancestors that are still there."""
    seen, stack = set[str](), [(opened.as_parent("self"), 0)]
    while stack:
        parent, depth = stack.pop()
        line = f"  {'  ' * min(depth, MAX_INDENT)}{f'{parent.role} {parent.path}' if depth else opened.path}"
        if parent.role == "source":  # a folder of another program, or a hub id
            is_there = parent.path.startswith("hf:") or Path(parent.path).is_dir()
            yield f"{line}  {parent.digest[:12]}{'' if is_there else '  (no longer there)'}"
        elif (manifest := _manifest(parent)) is None:
            yield f"{line}  {parent.digest[:12]}  (no longer there)"
        else:
            yield f"{line}  {manifest.kind} by {manifest.stage}  {manifest.digest[:12]}"
            if manifest.digest not in seen:
                stack += [(each, depth + 1) for each in reversed(manifest.parents)]
            seen.add(manifest.digest)


def _manifest(parent: Parent) -> Manifest | None:
    """The manifest of `parent`, or None if it is gone or another version."""
    from flashgen.artifact.store import open_artifact

    try:
        manifest = open_artifact(Path(parent.path)).manifest
    except ArtifactError:
        return None
    return manifest if manifest.digest == parent.digest else None
