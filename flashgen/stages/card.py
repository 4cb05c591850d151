"""The model card: README.md of a student, quantized, device or gguf version, with front matter as the Hugging Face hub reads it.

The card is one of the version's files, so it cannot name the version's own digest. It has no paths and no times: the same run gives the
same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from flashgen.artifact.hub import HUB
from flashgen.artifact.manifest import Manifest, Parent, Sampler
from flashgen.artifact.store import open_artifact
from flashgen.errors import ArtifactError
from flashgen.families.configs import configs_in
from flashgen.families.tiny_decoder import TINY_DECODER

if TYPE_CHECKING:
    from flashgen.artifact.draft import Draft
    from flashgen.families.cards import Published, Usage
    from flashgen.stages.base import Stage

NAME = "README.md"
PROMPT = "a red fox in snow"  # of the examples, where the version belongs to no world
BASE = "BASE"  # stands for the base pipeline of a LoRA file whose hub id is not known
LIBRARIES = {"student": "diffusers", "quantized": "diffusers", "device": "flashgen", "gguf": "gguf"}
TINY_LINES = f'from diffusers import AutoencoderTiny\npipe.vae = AutoencoderTiny.from_pretrained("{TINY_DECODER}")'
MAX_ENTRIES = 16  # of one metric; longer tables stay in the manifest


def write_card(stage: Stage, draft: Draft, sampler: Sampler | None, metrics: Mapping[str, Any]) -> None:
    """Set the scheduler of the pipeline in `draft` to the student's noise levels where it can express them, and write the card."""
    lineage = ancestors(stage)
    root = lineage[-1]
    ours = not root.parents  # made from nothing by flashgen, and not imported or lost
    weights = None if ours else stage.family.published(configs_in(draft.path, stage.family))
    base = hub_id(root) or (weights.base_model if weights else None)
    few = sampler is not None and sampler.num_steps in sampler.trained_steps
    parts = [_front_matter(stage, ours, weights, base, few), f"# {_title(stage, sampler)}"]
    if sampler is not None:
        plain = few and stage.family.set_scheduler(draft.path, sampler)
        prompt = stage.world.prompts(0, 1)[0] if stage.world else PROMPT
        usage = stage.family.usage(sampler, prompt, base or BASE)
        parts += _drawing(stage, draft, sampler, usage, plain, prompt)
    parts += ["## Measured", _measured(stage, metrics), "## Lineage", _lineage(stage, lineage), "## Licence", _licence(ours, weights)]
    (draft.path / NAME).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def ancestors(stage: Stage) -> list[Manifest]:
    """Manifests of the first input, of its first input, and so on, as far as they are there and unchanged."""
    lineage = [stage.source.manifest]
    while (parent := _first_parent(lineage[-1])) is not None:
        try:
            manifest = open_artifact(parent.path).manifest
        except ArtifactError:
            break
        if manifest.digest != parent.digest or manifest in lineage:  # a circle that somebody has written
            break
        lineage.append(manifest)
    return lineage


def _first_parent(manifest: Manifest) -> Parent | None:
    """The first input of a version, if it was an artifact: an import has a source, which is none."""
    return next((parent for parent in manifest.parents[:1] if parent.role != "source"), None)


def hub_id(root: Manifest) -> str | None:
    """OWNER/NAME of the hub repository that `root` was imported from, or None."""
    paths = [parent.path for parent in root.parents if parent.role == "source" and parent.path.startswith(HUB)]
    return paths[0].removeprefix(HUB) if paths else None


def _front_matter(stage: Stage, ours: bool, weights: Published | None, base: str | None, few: bool) -> str:
    licence = {"license": "apache-2.0" if ours else "unknown"}
    if weights:
        licence = {"license": "other", "license_name": weights.license_id, "license_link": weights.license_link}
    fields: dict[str, Any] = licence | ({"base_model": base} if base else {})
    fields |= {"library_name": LIBRARIES[stage.kind], "pipeline_tag": "text-to-image"}
    fields["tags"] = ["flashgen", stage.family.name, stage.kind, *(["few-step"] if few else [])]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _title(stage: Stage, sampler: Sampler | None) -> str:
    drawn = f", {sampler.num_steps} steps at {sampler.size_px} px" if sampler else ""
    return f"{stage.kind} ({stage.family.models}){drawn}"


def _drawing(stage: Stage, draft: Draft, sampler: Sampler, usage: Usage | None, plain: bool, prompt: str) -> Iterator[str]:
    """Paragraphs that say how to draw; the first one says what the plain call in diffusers does."""
    in_diffusers = usage if stage.kind in ("student", "quantized") else None
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in sampler.sigmas)
    if in_diffusers and plain:
        yield (
            f"In diffusers `num_inference_steps={sampler.num_steps}, guidance_scale={sampler.guidance:g}` is enough: the scheduler of this "
            f"folder then walks sigma {sigmas}. Other numbers of steps walk noise levels that the student was not trained on."
        )
    elif in_diffusers:
        yield (
            f"**In diffusers pass `sigmas` as below: with `num_inference_steps` alone the pipeline does not walk this version's noise "
            f"levels, sigma {sigmas}.**"
        )
    if in_diffusers:
        yield f"## diffusers\n\nIn this folder:\n\n```python\n{in_diffusers.diffusers}\n```"
        yield 'On a GPU: `.to("cuda", torch.bfloat16)`.' + _warnings(stage, sampler)
    if in_diffusers and (draft.path / TINY_DECODER).is_dir():
        yield (
            "The pipeline decodes with its VAE. These two lines before the call take the tiny decoder, a small share of the time and a "
            f"slightly different picture:\n\n```python\n{TINY_LINES}\n```"
        )
    if in_diffusers and (draft.path / "lora").is_dir():
        where = f"; put the base's folder or hub id in the place of {BASE}" if f'"{BASE}"' in in_diffusers.lora else ""
        yield (
            "`lora/pytorch_lora_weights.safetensors` is the same student as a LoRA file for its base pipeline, with weight 1 (its alpha is "
            f"its rank){where}:\n\n```python\n{in_diffusers.lora}\n```"
        )
    elif stage.kind == "student":
        yield "There is no LoRA file: the weights are dense. Only `flashgen distill` with adapters (`distill.lora`) writes one."
    if stage.kind != "gguf":
        yield f'## flashgen\n\nIn this folder:\n\n    pip install flashgen\n    flashgen generate . "{prompt}" --seed 0 -o picture.png'
    if usage and stage.kind != "device":
        yield f"## ComfyUI\n\n{usage.comfyui}."


def _warnings(stage: Stage, sampler: Sampler) -> str:
    scaled = " diffusers does not apply the step scales of this version (`quantize.step_scales`), so its pictures differ from flashgen's."
    nf4 = " The transformer has NF4 codes: `pip install bitsandbytes`."
    return (scaled if sampler.scales else "") + (nf4 if stage.kind == "quantized" and stage.recipe.quantize.scheme == "nf4" else "")


def _measured(stage: Stage, metrics: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in _flat(metrics)]
    note = f"By `flashgen {stage.name}`; compositions are of validation prompts, not of those of `flashgen bench`."
    return "\n".join([note, "", "| metric | value |", "|---|---|", *rows]) if rows else "Nothing."


def _flat(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted name, value) of each number and word in nested metrics."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", text) for inner, text in (_flat(value) if len(value) <= MAX_ENTRIES else ()))
        elif isinstance(value, (str, int)):
            yield name, str(value)
        elif isinstance(value, float):
            yield name, f"{value:.4g}"


def _lineage(stage: Stage, lineage: list[Manifest]) -> str:
    lines = [f"* {role}: `flashgen {a.manifest.stage}`, digest `{a.manifest.digest}`" for role, a in stage.inputs.items()]
    listed = {artifact.manifest.digest for artifact in stage.inputs.values()}
    lines += [f"* ancestor: `flashgen {m.stage}`, digest `{m.digest}`" for m in lineage if m.digest not in listed]
    if source := hub_id(lineage[-1]):
        lines.append(f"* imported from https://huggingface.co/{source}")
    return "\n".join([f"Made by `flashgen {stage.name}`, seed {stage.seed}; all settings are in `manifest.json`.", "", *lines])


def _licence(ours: bool, weights: Published | None) -> str:
    if weights:
        return f"{weights.license_name} ({weights.license_link}), as of everything that is made from {weights.base_model}. {weights.notice}"
    if ours:
        return "Apache-2.0: the teacher was made by flashgen from nothing."
    return "The licence of the teacher applies, which flashgen does not know."
