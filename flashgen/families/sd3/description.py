"""The description by which a runtime without torch draws with SD3's exported components (`families.graphs`). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashgen.artifact.manifest import Manifest, Sampler
from flashgen.families.base import Family
from flashgen.families.configs import Configs, read_config


def describe(family: Family, configs: Configs, sampler: Sampler, pad_ids: Mapping[str, int]) -> dict[str, Any]:
    """Description for components exported from a pipeline; `pad_ids` by tokenizer folder."""
    return _describe(family, configs, sampler, pad_ids, family.latent_shape(configs, sampler.size_px))


def describe_old(family: Family, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Description of a device artifact of flashgen 0.1 or 0.2, which stored none: from its configs and `Manifest.extra`."""
    assert manifest.sampler is not None
    extra = manifest.extra

    def read(part: str) -> dict[str, Any]:
        return {**read_config(folder, "vae_decoder"), **extra["vae"]} if part == "vae" else read_config(folder, part)

    pad_ids = {name: int(spec["pad_id"]) for name, spec in extra["tokenizers"].items()}
    return _describe(family, read, manifest.sampler, pad_ids, tuple(int(side) for side in extra["latent_shape"]))


def _describe(family: Family, read: Configs, sampler: Sampler, pad_ids: Mapping[str, int], latent_shape: tuple[int, ...]) -> dict[str, Any]:
    transformer, vae = read("transformer"), read("vae")
    joint = int(transformer["joint_attention_dim"])
    encoders, patch = [], int(transformer["patch_size"])
    for number, (name, encoder) in enumerate(family.text_encoders.items(), 1):
        if name == family.droppable and not sampler.has_all_encoders:
            continue
        config = read(name)
        t5 = name == family.droppable
        outputs = {"t5": "last_hidden_state"} if t5 else clip_outputs(number, int(config["num_hidden_layers"]))
        encoders.append(
            {
                "component": name,
                "tokenizer": encoder.tokenizer,
                "length": sampler.tokens[encoder.tokens],
                "pad_id": pad_ids[encoder.tokenizer],
                "ids": "input_ids",
                "mask": None,
                "mask_value": None,
                "outputs": outputs,
                "width": int(config["d_model"] if t5 else config["hidden_size"]),
            }
        )
    t5_tokens: Any = "t5" if sampler.has_all_encoders else {"zeros": [sampler.tokens["t5"], joint]}
    clip = {"pad": {"concat": ["features_1", "features_2"], "axis": -1}, "to": joint}
    return {
        "encoders": encoders,
        "conditioning": {
            "encoder_hidden_states": {"concat": [clip, t5_tokens], "axis": 1},
            "pooled_projections": {"concat": ["pooled_1", "pooled_2"], "axis": -1},
        },
        "transformer": {
            "latents": "hidden_states",
            "timestep": "timestep",
            "timestep_scale": 1000.0,
            "timestep_offset": 0.0,
            "output": "out_hidden_states",
            "output_scale": 1.0,
            "patch": 0,
            "tokens": (latent_shape[1] // patch) * (latent_shape[2] // patch) + sum(sampler.tokens.values()),
            "width": int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
        },
        "vae": {
            "factor": 2 ** (len(vae["block_out_channels"]) - 1),
            "scaling_factor": vae["scaling_factor"],
            "shift_factor": vae["shift_factor"],
            "channels": int(vae["block_out_channels"][1]),
            "attention": bool(vae["mid_block_add_attention"]),
        },
        "latent_shape": list(latent_shape),
    }


def clip_outputs(number: int, layers: int) -> dict[str, str]:
    """Values of the pipeline's CLIP encoder `number`: the states before its last layer, and its projected pooled vector."""
    return {f"features_{number}": f"hidden_states.{layers - 1}", f"pooled_{number}": "text_embeds"}
