"""flashgen show"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.errors import ArtifactError

if TYPE_CHECKING:
    from flashgen.artifact.manifest import Manifest
    from flashgen.artifact.store import Artifact


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
    lines += [f"recipe   {json.dumps(manifest.recipe)}", f"metrics  {json.dumps(manifest.metrics)}", "lineage"]
    return lines + _lineage(manifest, str(opened.path), "", set())


def _lineage(manifest: Manifest, name: str, indent: str, seen: set[str]) -> list[str]:
    """Lines for the artifact and, indented below, its ancestors that are still there."""
    from flashgen.artifact.store import open_artifact

    lines = [f"{indent}  {name}  {manifest.kind} by {manifest.stage}  {manifest.digest[:12]}"]
    if manifest.digest in seen:
        return lines
    seen.add(manifest.digest)
    for parent in manifest.parents:
        label = f"{parent.role} {parent.path}"
        try:
            found = open_artifact(Path(parent.path)).manifest
            if found.digest != parent.digest:
                raise ArtifactError("changed")
        except ArtifactError:
            lines.append(f"{indent}    {label}  {parent.digest[:12]}  (no longer there)")
            continue
        lines += _lineage(found, label, indent + "  ", seen)
    return lines
