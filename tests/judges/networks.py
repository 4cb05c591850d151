"""Networks of judges with random weights, written in the real classes' layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from flashgen.families.sd3.tokenizers import clip_tokenizer
from flashgen.judges.weights import image_processor

LENGTH = 16  # tokens that the tiny text encoder reads
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def write_clip(folder: Path) -> Path:
    """A CLIPModel with its tokenizer and image processor, as its hub repositories have them."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(LENGTH)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 8}, projection_dim=8)
    model = transformers.CLIPModel(config)
    model.text_projection.weight.data *= -1  # so that cosines are positive
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor()(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    """A Dinov2Model of 16 dimensions with patches of 56 px."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=56)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def inception_state(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Random weights of FID's network, by numpy so that they are the same everywhere; activations keep their scale."""
    rng, state = np.random.default_rng(0), dict[str, Tensor]()
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            continue
        values: NDArray[Any] = rng.standard_normal(shape, np.float32)
        if name.endswith(("conv.weight", "fc.weight")):
            values *= np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + np.abs(values) / 8
        else:
            values /= 8
        state[name] = torch.from_numpy(np.asarray(values, np.float32))
    return state
