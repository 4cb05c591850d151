"""How SD3's artifacts are drawn in diffusers and ComfyUI, and the licence of Stability AI's weights: words of the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashgen.artifact.manifest import Sampler
from flashgen.families.cards import Published, Usage
from flashgen.families.sd3.specs import SPECS
from flashgen.flow.grid import shift

TIMESTEPS = 1000  # entries of ComfyUI's table of sigmas
HUB_IDS = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
}


def usage(sampler: Sampler, prompt: str, base: str) -> Usage:
    """diffusers' calls and ComfyUI's settings that draw as `sampler` says."""
    return Usage(_call(sampler, prompt, "."), _call(sampler, prompt, base, "lora"), _comfyui(sampler))


def _call(sampler: Sampler, prompt: str, pipeline: str, lora: str | None = None) -> str:
    absent = "" if sampler.has_all_encoders else ", text_encoder_3=None, tokenizer_3=None"
    return "\n".join(
        [
            "import torch",
            "from diffusers import StableDiffusion3Pipeline",
            "",
            f'pipe = StableDiffusion3Pipeline.from_pretrained("{pipeline}"{absent}).to(torch.float32)',
            *([f'pipe.load_lora_weights("{lora}")'] if lora else []),
            "pipe.scheduler.set_shift(1.0)  # the sigmas below are shifted already",
            "image = pipe(",
            f"    {prompt!r},",
            f"    sigmas={sampler.sigmas[:-1]},",
            f"    guidance_scale={sampler.guidance},",
            f"    max_sequence_length={sampler.tokens['t5']},",
            f"    height={sampler.size_px.height},",
            f"    width={sampler.size_px.width},",
            "    generator=torch.manual_seed(0),",
            ").images[0]",
        ]
    )


def _comfyui(sampler: Sampler) -> str:
    rest = f"sampler euler, CFG {sampler.guidance:g}"
    if all(abs(a - b) < 1e-6 for a, b in zip(simple_sigmas(sampler.num_steps, sampler.shift), sampler.sigmas, strict=True)):
        return f"ModelSamplingSD3 with shift {sampler.shift:g}, scheduler simple, {sampler.num_steps} steps, {rest}"
    return f"SamplerCustom with the node ManualSigmas, `{', '.join(f'{sigma:.6g}' for sigma in sampler.sigmas)}`, {rest}"


def simple_sigmas(steps: int, k: float) -> list[float]:
    """The sigmas of ComfyUI's scheduler "simple" with shift `k`: every (1000 / steps)-th of a table of 1000, rounded down, then 0."""
    return [shift((TIMESTEPS - int(i * TIMESTEPS / steps)) / TIMESTEPS, k) for i in range(steps)] + [0.0]


def published(config: Mapping[str, Any]) -> Published | None:
    """Stability AI's weights whose transformer has this config."""
    for name, hub_id in HUB_IDS.items():
        if all(_plain(config.get(key)) == _plain(value) for key, value in SPECS[name].transformer.items()):
            return Published(
                hub_id,
                "stabilityai-ai-community",
                "Stability AI Community License",
                f"https://huggingface.co/{hub_id.removesuffix('-diffusers')}/blob/main/LICENSE.md",
                "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. "
                "All Rights Reserved. Powered by Stability AI.",
            )
    return None


def _plain(value: Any) -> Any:
    """`value` as JSON has it; older configs leave out what is empty."""
    return (list(value) or None) if isinstance(value, (list, tuple)) else value
