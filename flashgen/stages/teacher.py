"""flashgen teacher: train the shapes teacher, import a diffusers pipeline, or fabricate one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from flashgen.artifact.manifest import Parent, Sampler
from flashgen.artifact.store import Artifact, Draft, begin, open_artifact
from flashgen.errors import ArtifactError
from flashgen.flow.grid import shifted_grid
from flashgen.models.specs import COMPONENTS, SPECS, Spec, spec
from flashgen.processes import check_launch
from flashgen.recipe.schema import Recipe
from flashgen.stages.checks import check_compiler

TEACHER_STEPS = 28
SUFFIXES = (".json", ".txt", ".model", ".safetensors")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


def _sampler(clip_tokens: int, t5_tokens: int, size_px: int, guidance: float, shift: float) -> Sampler:
    return Sampler(
        sigmas=shifted_grid(TEACHER_STEPS, shift),
        shift=shift,
        guidance=guidance,
        encoder="full",
        clip_tokens=clip_tokens,
        t5_tokens=t5_tokens,
        size_px=size_px,
        trained_steps=[],
    )


def train(recipe: Recipe, out: Path, seed: int, force: bool) -> Artifact:
    """The shapes world's autoencoder, then its three text encoders, then its transformer on the frozen rest."""
    check_launch()
    draft = begin(out, kind="teacher", stage="teacher", recipe=recipe.teacher.model_dump(), seed=seed, parents=[], force=force)
    if isinstance(draft, Artifact):
        return draft
    if recipe.teacher.flow.compile:
        check_compiler("teacher.flow.compile=false")
    from flashgen.models.build import SHIFT, build_pipeline
    from flashgen.models.save import save_pipeline
    from flashgen.stages.report import finish
    from flashgen.training.autoencoder import encode_scenes, train_autoencoder
    from flashgen.training.encoders import train_encoders
    from flashgen.training.teacher import train_flow

    config, shapes = recipe.teacher, SPECS["shapes"]
    pipe = build_pipeline(shapes, seed)
    train_autoencoder(pipe.vae, config.autoencoder, seed, draft.work)
    latents, captions = encode_scenes(pipe.vae, config.flow.samples, seed, draft.work)
    train_encoders(pipe, config.encoders, config.flow.t5_tokens, seed, draft.work)
    ema = train_flow(pipe, latents, captions, config.flow, seed, draft.work)
    ema.copy_to(pipe.transformer)
    save_pipeline(draft, pipe)
    return finish(draft, _sampler(shapes.clip_tokens, config.flow.t5_tokens, 64, config.guidance, SHIFT), recipe.bench)


def random(like: str, out: Path, seed: int, force: bool, layers: int | None = None) -> Artifact:
    """Right shapes, seeded random weights: for tests of memory, speed and formats without a hub. At most `layers` of each network."""
    from flashgen.models.build import SHIFT

    shapes: Spec = spec(like) if layers is None else spec(like).shallow(layers)
    recipe = {"random": {"like": like} | ({} if layers is None else {"layers": layers})}
    draft = begin(out, kind="teacher", stage="teacher", recipe=recipe, seed=seed, parents=[], force=force)
    if isinstance(draft, Artifact):
        return draft
    from flashgen.models.random_weights import write_random

    write_random(shapes, draft.path, seed)
    size_px = int(shapes.transformer["sample_size"]) * 8
    return draft.publish(sampler=_sampler(shapes.clip_tokens, shapes.t5_tokens, size_px, 4.5, SHIFT))


def import_(source: str, out: Path, force: bool) -> Artifact:
    """A StableDiffusion3Pipeline folder or hub id: checked, hard-linked where possible, digested."""
    from flashgen.models.networks import check_networks, has_nf4

    folder = Path(source) if Path(source).is_dir() else _download(source)
    has_t5 = "text_encoder_3" in check_networks(folder)
    if has_nf4(folder / "transformer"):
        raise ArtifactError(f"{source} has a transformer of NF4 codes, which is no teacher; give the pipeline in fp16 or bf16")
    identity = Parent(role="source", path=str(source), digest=_fingerprint(folder))
    draft = begin(out, kind="teacher", stage="teacher", recipe={"import": source}, seed=0, parents=[identity], force=force)
    if isinstance(draft, Artifact):
        return draft
    _copy_pipeline(folder, draft)
    transformer = json.loads((folder / "transformer/config.json").read_text())
    shift = json.loads((folder / "scheduler/scheduler_config.json").read_text()).get("shift", 3.0)
    tokens = json.loads((folder / "tokenizer/tokenizer_config.json").read_text()).get("model_max_length", 77)
    t5 = folder / "tokenizer_3/tokenizer_config.json"
    t5_tokens = json.loads(t5.read_text()).get("model_max_length", 256) if has_t5 else 256
    sampler = _sampler(tokens, min(t5_tokens, 256), transformer["sample_size"] * 8, 4.5, shift)
    return draft.publish(sampler=sampler.model_copy(update={"encoder": "full" if has_t5 else "zeros"}))


def open_teacher(ref: str, out: Path) -> Artifact:
    """A teacher artifact; a plain diffusers folder or hub id is imported beside `out` first."""
    folder = Path(ref)
    plain = (folder / "model_index.json").is_file() and not (folder / "manifest.json").exists()
    hub = not folder.exists() and HUB_ID.fullmatch(ref) is not None
    return import_(ref, out.with_name(f"{out.name}-teacher"), force=False) if plain or hub else open_artifact(ref, ("teacher",))


def _download(source: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        patterns = ["model_index.json", *(f"{part}/*{suffix}" for part in COMPONENTS for suffix in SUFFIXES)]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*.fp16*"]))
    except Exception as error:
        kind = type(error).__name__
        if kind == "GatedRepoError":
            raise ArtifactError(
                f"{source} is gated: accept its licence on https://huggingface.co/{source}, then log in with: hf auth login"
            ) from error
        why = f"could not be fetched from the hub ({kind})"
        raise ArtifactError(f"{source} is no folder here and {why}; give a local folder") from error


def _files(folder: Path) -> list[Path]:
    """What of `folder` is the pipeline, relative to it. A hub repository holds more: other people's layouts, second copies of weights."""
    parts = [path for part in COMPONENTS for path in sorted((folder / part).glob("*"))]
    own = [path for path in parts if path.is_file() and path.suffix in SUFFIXES and not _variant(path)]
    return [path.relative_to(folder) for path in (folder / "model_index.json", *own)]


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the pipeline does, without reading gigabytes: names, sizes and times."""
    stats = [(str(path), (folder / path).stat().st_size, (folder / path).stat().st_mtime_ns) for path in sorted(_files(folder))]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _variant(path: Path) -> bool:
    """Whether a file is a second copy of weights, in another type: model.fp16.safetensors beside model.safetensors."""
    return ".fp16" in path.name and any(".fp16" not in other.name for other in path.parent.glob("*.safetensors"))


def _copy_pipeline(folder: Path, draft: Draft) -> None:
    """Weights are linked, the rest copied, without components that flashgen does not know. Links of a hub cache are resolved."""
    for relative in _files(folder):
        target = draft.path / relative
        target.parent.mkdir(exist_ok=True)
        if target.suffix == ".safetensors":
            draft.link((folder / relative).resolve(), str(relative))
        else:
            shutil.copyfile(folder / relative, target)
    index = json.loads((draft.path / "model_index.json").read_text())
    index |= {name: [None, None] for name, part in index.items() if isinstance(part, list) and name not in COMPONENTS}
    (draft.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
