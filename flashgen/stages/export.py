"""export: a torch artifact becomes ONNX components that run without torch, each checked against torch."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, begin, open_artifact
from flashgen.progress import say, track
from flashgen.recipe.schema import ExportRecipe, Recipe
from flashgen.stages.checks import check_exporting
from flashgen.stages.plan import check

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

    from flashgen.export.components import Component
    from flashgen.quant.pack import QuantizedLinear


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool, target: str = "onnx", offline: bool = False) -> Artifact:
    """Export a teacher, student or quantized artifact for the device; `target` web adds a page that draws in the browser.

    Raises NumericsError when a component's PSNR against torch is below the recipe's floor, and MachineError when the page's
    libraries cannot be had; nothing is published then.
    """
    source = open_artifact(student, kinds=("student", "quantized", "teacher"))
    sampler = check_exporting(source, recipe, target, offline)
    if target == "gguf":
        from flashgen.stages import gguf

        return gguf.run(source, sampler, out, recipe, seed, force)
    settings = recipe.export.model_dump() | {"target": target}
    draft = begin(
        out, kind="device", stage="export", recipe=settings, seed=seed, parents=[source.as_parent("student")], force=force,
        check=lambda work: check("export", source, recipe, work),
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    from flashgen.export.components import components
    from flashgen.export.page import write_page
    from flashgen.export.parity import why_no_half
    from flashgen.export.write import put_factors, read_codes, write_component
    from flashgen.models.sample import load_pipeline

    config = recipe.export
    page = {"page": write_page(draft.path, offline)} if target == "web" else {}
    pipe = load_pipeline(source.path, weights="disk")  # nothing is ever loaded whole
    quantized = source.manifest.kind == "quantized"
    layers = read_codes(source.path) if quantized else {}
    put_factors(pipe.transformer, layers, source.path)
    psnr, largest = {}, {}
    parts = list(components(pipe, sampler, config.vae_encoder))
    for part in track(parts, "export", total=len(parts)):
        encoder = quantized and part.name.startswith("text_encoder")
        codes = layers if part.name == "transformer" else read_codes(source.path, part.name) if encoder else {}
        floor = config.psnr_floor_int8_db if codes and _level(codes, config) == 4 else config.psnr_floor_db
        stored = source.path / ("vae" if part.name.startswith("vae") else part.name)
        psnr[part.name], largest[part.name] = write_component(part, codes, draft.path, config.accuracy_level, floor, stored)
        _write_config(part, draft.path)
        gc.collect()
    extra = _runtime_files(pipe, sampler, source.path, draft.path) | {"fp16": why_no_half(largest)}
    sizes = {part.name: sum(f.stat().st_size for f in (draft.path / part.name).glob("model.onnx*")) for part in parts}
    metrics = {"psnr_db": {k: round(v, 2) for k, v in psnr.items()}, "bytes": sizes, "quantized_layers": len(layers)}
    artifact = draft.publish(sampler=sampler, metrics=metrics, extra=extra | {"accuracy_level": _level(layers, config)} | page)
    if target == "web":
        say(f"to look at it: python3 -m http.server -d {artifact.path}   and open http://localhost:8000")
    return artifact


def _level(codes: Mapping[str, QuantizedLinear], config: ExportRecipe) -> int:
    """The accuracy level that products with `codes` have: whole rows of weights are multiplied as integers, activations too."""
    from flashgen.export.rewrite import whole_rows

    return 4 if any(map(whole_rows, codes.values())) else config.accuracy_level


def _write_config(part: Component, folder: Path) -> None:
    """The network's own config beside its graph, as optimum wants it."""
    config: Any = part.module.net.config
    plain = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else dict(config)
    (folder / part.name / "config.json").write_text(json.dumps(plain, indent=1, sort_keys=True))


def _runtime_files(pipe: StableDiffusion3Pipeline, sampler: Sampler, source: Path, folder: Path) -> dict[str, Any]:
    """Tokenizers, scheduler and model_index.json; returns what the runtime must know beyond the sampler (manifest.extra)."""
    from flashgen.models.sample import latent_shape

    index = json.loads((source / "model_index.json").read_text())
    lengths = {"tokenizer": sampler.clip_tokens, "tokenizer_2": sampler.clip_tokens}
    if sampler.has_t5:
        lengths["tokenizer_3"] = sampler.t5_tokens
    else:
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    tokenizers = {}
    for name, length in lengths.items():
        tokenizer = getattr(pipe, name)
        tokenizer.save_pretrained(folder / name)
        _for_transformers_4(tokenizer, index, folder / name / "tokenizer_config.json")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.save(str(folder / name / "tokenizer.json"))
        tokenizers[name] = {"length": length, "pad_id": int(tokenizer.pad_token_id)}
    pipe.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return {
        "engine": "onnxruntime",
        "latent_shape": list(latent_shape(pipe, sampler.size_px)),
        "joint_dim": pipe.transformer.config.joint_attention_dim,
        # The decoder expects z / scaling_factor + shift_factor, as in diffusers.
        "vae": {"scaling_factor": pipe.vae.config.scaling_factor, "shift_factor": pipe.vae.config.shift_factor},
        "tokenizers": tokenizers,
    }


def _for_transformers_4(tokenizer: Any, index: dict[str, Any], config: Path) -> None:
    """optimum holds transformers below 5, where the plain classes want vocab.json, and [] is no set of extra tokens."""
    index[config.parent.name] = ["transformers", type(tokenizer).__name__.removesuffix("Fast") + "Fast"]
    settings = json.loads(config.read_text())
    if not settings.get("extra_special_tokens"):
        settings.pop("extra_special_tokens", None)
    config.write_text(json.dumps(settings, indent=1, sort_keys=True))
