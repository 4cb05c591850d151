"""Draws an exported artifact's pictures with optimum's ORTDiffusionPipeline.

Runs in optimum's own environment, which lacks most of flashgen's dependencies.

python -m benchmarks.in_optimum ARTIFACT PICTURES.npy PROMPT...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline

from flashgen.noise import latents


def main(folder: Path, out: Path, prompts: list[str]) -> None:
    """Write pictures, uint8 [B, H, W, 3]; picture i is drawn from seed i."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sampler, shape, factor = manifest["sampler"], manifest["extra"]["latent_shape"], manifest["extra"]["graph"]["vae"]["factor"]
    pipe = ORTDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler.set_shift(1.0)
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            prompt,
            latents=torch.from_numpy(latents(tuple(shape), [seed])),
            sigmas=sampler["sigmas"][:-1],
            guidance_scale=sampler["guidance"],
            max_sequence_length=sampler["tokens"]["t5"],
            height=shape[1] * factor,
            width=shape[2] * factor,
            output_type="np",
        ).images[0]
        for seed, prompt in enumerate(prompts)
    ]
    np.save(out, np.round(np.stack(pictures) * 255).astype(np.uint8))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
