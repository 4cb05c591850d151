"""export --target gguf: the transformer for programs that read GGUF."""

from __future__ import annotations

from pathlib import Path

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, begin
from flashgen.progress import say, warn
from flashgen.recipe.schema import Recipe
from flashgen.stages.plan import check


def run(source: Artifact, sampler: Sampler, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    """transformer/model.gguf of `source`, read back and compared with it tensor by tensor."""
    import flashgen.export.gguf as writer  # needs the extra: said before any work

    floor = recipe.export.psnr_floor_db
    settings = {"target": "gguf", "psnr_floor_db": floor}
    draft = begin(
        out, kind="gguf", stage="export", recipe=settings, seed=seed, parents=[source.as_parent("student")], force=force,
        check=lambda work: check("export", source, recipe, work, target="gguf"),
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    from flashgen.export.write import read_codes
    from flashgen.models.stream import stored

    weights = stored(source.path / "transformer")
    codes = read_codes(source.path) if source.manifest.kind == "quantized" else {}
    draft.link(source.path / "transformer" / "config.json", "transformer/config.json")  # diffusers asks for it
    path = draft.path / "transformer" / "model.gguf"
    types = writer.write(path, weights, codes, sampler, source.manifest.digest)
    psnr = writer.check(path, weights, floor)
    size = path.stat().st_size
    say(f"{size / 2**20:.1f} MiB; tensors by type: {', '.join(f'{name} {types[name]}' for name in sorted(types))}")
    held = sum(types[name] for name in types if name.startswith("Q"))
    if codes and types["F16"] > held:
        warn("no GGUF type holds most of these codes, so they stay fp16; what fits: groups of 32 or more, at most 4 bits, no shared basis")
    metrics = {"psnr_db": {"transformer": round(psnr, 2)}, "bytes": {"transformer": size}, "types": dict(types)}
    return draft.publish(sampler=sampler, metrics=metrics)
