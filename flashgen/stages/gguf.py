"""export --target gguf: the transformer for programs that read GGUF."""

from __future__ import annotations

from pathlib import Path

from flashgen.artifact.store import Artifact, begin, check_disk, open_artifact
from flashgen.errors import ArtifactError, UsageError
from flashgen.progress import say, warn
from flashgen.recipe.schema import Recipe


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    """transformer/model.gguf of a teacher, student or quantized artifact, read back and compared with it tensor by tensor.

    Raises UsageError for an artifact with scales of its steps (`quantize.repair`), which no reader of GGUF would apply.
    """
    import flashgen.export.gguf as writer  # needs the extra: said before any work

    source = open_artifact(student, kinds=("student", "quantized", "teacher"))
    sampler = source.manifest.sampler
    if sampler is None:
        raise ArtifactError(f"{source.path}: the manifest has no sampler; make the student again with: flashgen distill")
    if sampler.scales is not None:
        raise UsageError(
            f"{source.path} scales its steps (quantize.repair), which a GGUF cannot say and its readers would not do; quantize again "
            "with --set quantize.repair=false, or export without --target gguf"
        )
    floor = recipe.export.psnr_floor_db
    settings = {"target": "gguf", "psnr_floor_db": floor}
    draft = begin(
        out, kind="gguf", stage="export", recipe=settings, seed=seed, parents=[source.as_parent("student")], force=force,
        check=lambda _: check_disk(out, source.size_bytes()),
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
