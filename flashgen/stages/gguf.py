"""export --target gguf: the transformer as a file for programs that read GGUF."""

from __future__ import annotations

from importlib.util import find_spec

from flashgen.artifact.draft import Draft
from flashgen.artifact.files import link
from flashgen.errors import MachineError, UsageError
from flashgen.progress import say, warn
from flashgen.stages.base import Result, Stage


def check_gguf(stage: Stage) -> None:
    """Raises UsageError for artifacts that a GGUF cannot hold, and MachineError without the package that writes it."""
    if stage.family.gguf_arch is None:
        raise UsageError(f"--target gguf: no program reads {stage.family.models} from a GGUF; export with --target onnx")
    if stage.sampler.scales is not None:
        raise UsageError(
            f"{stage.source.path} scales its steps (quantize.step_scales), which a GGUF cannot express; quantize again "
            "with --set quantize.step_scales=false, or export without --target gguf"
        )
    if find_spec("gguf") is None:
        raise MachineError("--target gguf writes with the package gguf, which is not installed: pip install 'flashgen[gguf]'")


def write_gguf(stage: Stage, draft: Draft) -> Result:
    """Write transformer/model.gguf, read it back and compare it with the artifact tensor by tensor."""
    from flashgen.export import gguf
    from flashgen.export.codes import read_codes
    from flashgen.models.stream import stored

    source, family = stage.source, stage.family
    weights = stored(source.path / "transformer")
    codes = read_codes(source) if source.manifest.kind == "quantized" else {}
    link(source.path / "transformer" / "config.json", draft.path / "transformer" / "config.json")  # diffusers asks for it
    path = draft.path / "transformer" / "model.gguf"
    types = gguf.write(path, family, weights, codes, stage.sampler, source.manifest.digest)
    psnr = gguf.check(path, family, weights, stage.recipe.export.psnr_floor_db)
    size = path.stat().st_size
    say(f"{size / 2**20:.1f} MiB; tensors by type: {', '.join(f'{name} {types[name]}' for name in sorted(types))}")
    with_codes = sum(count for name, count in types.items() if name.startswith("Q"))
    if codes and types["F16"] > with_codes:
        warn(
            "no GGUF type holds most of these codes, so they stay fp16; types hold groups of 32 or more at up to 4 bits, or at 8 bits with "
            "--set quantize.symmetric=true, and no shared basis"
        )
    metrics = {"psnr_db": {"transformer": round(psnr, 2)}, "bytes": {"transformer": size}, "types": dict(types)}
    return Result(stage.sampler, metrics, validate=False)
