"""A device artifact of no known family: small ONNX graphs, their description, and the same pictures in numpy.

It differs from SD3 in everything that a description can say: two encoders of one tokenizer, attention masks for an encoder and for the
transformer, packed latents, another time scale and sign, no square picture, a VAE factor of 4.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from flashgen.artifact.draft import Origin, begin
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact
from flashgen.noise import latents
from flashgen.pixels import Floats, Size, from_uint8, to_uint8

WORDS = ["[PAD]", "[UNK]", "[END]", "a", "red", "blue", "green", "circle", "square", "on", "two", "##s"]
PROMPTS = ["two red circles", "a blue square"]
SIZE = Size(64, 96)
PAD_ID, END_ID = 0, 2
SUBJECT, STYLE = 6, 4  # lengths of the two encoders' tokens
WIDTH, PATCH, FACTOR, CHANNELS = 8, 2, 4, 4
LATENT = (CHANNELS, SIZE.height // FACTOR, SIZE.width // FACTOR)
TOKENS, NUMBERS = LATENT[1] * LATENT[2] // PATCH**2, CHANNELS * PATCH**2
SCALE, OFFSET, SIGN = 2.0, 0.5, -1.0  # of the timestep and of the output
SCALING, SHIFT = 1.25, 0.1

DESCRIPTION: dict[str, Any] = {
    "encoders": [
        {
            "component": "subject_encoder", "tokenizer": "words", "length": SUBJECT, "pad_id": PAD_ID,
            "ids": "tokens", "mask": "attention", "outputs": {"subject": "states", "gist": "summary"},
            "mask_value": "subject_mask", "width": WIDTH,
        },
        {
            "component": "style_encoder", "tokenizer": "words", "length": STYLE, "pad_id": PAD_ID,
            "ids": "tokens", "mask": None, "outputs": {"style": "states"}, "mask_value": "style_mask", "width": WIDTH // 2,
        },
    ],
    "conditioning": {
        "text": {"concat": ["subject", {"pad": "style", "to": WIDTH}], "axis": 1},
        "text_mask": {"concat": ["subject_mask", "style_mask"], "axis": -1},
        "summary": {"concat": ["gist", {"pad": "gist", "to": WIDTH + 2}], "axis": -1},
        "extra": {"zeros": [2, WIDTH]},
    },
    "transformer": {
        "latents": "image", "timestep": "time", "timestep_scale": SCALE, "timestep_offset": OFFSET,
        "output": "noise_to_data", "output_scale": SIGN, "patch": PATCH, "tokens": TOKENS + SUBJECT + STYLE, "width": WIDTH,
    },
    "vae": {"factor": FACTOR, "scaling_factor": SCALING, "shift_factor": SHIFT, "channels": 3, "attention": False},
    "latent_shape": list(LATENT),
}  # fmt: skip


def weights(name: str, shape: Sequence[int], scale: float = 0.3) -> Floats:
    """Fixed random numbers for `name`."""
    seed = int.from_bytes(name.encode()[:8], "big")
    return (scale * np.random.default_rng(seed).standard_normal(tuple(shape))).astype(np.float32)


def save(path: Path, inputs: dict[str, Any], outputs: Sequence[str], nodes: Sequence[Any], constants: dict[str, NDArray[Any]]) -> None:
    """Write path/model.onnx; `inputs` are {name: shape}, of integers where the shape is a tuple."""
    kinds = {name: TensorProto.INT64 if isinstance(shape, tuple) else TensorProto.FLOAT for name, shape in inputs.items()}
    graph = helper.make_graph(
        list(nodes), path.name,
        [helper.make_tensor_value_info(name, kinds[name], list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    path.mkdir(exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path / "model.onnx")


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    """An ONNX node; `inputs` are separated by spaces."""
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer that adds [END]."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", END_ID)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_networks(folder: Path) -> None:
    """The five components and the tokenizer that `DESCRIPTION` names."""
    write_tokenizer(folder / "words")
    last, axes = np.array([-1]), np.array([1, 2])
    save(
        folder / "subject_encoder", {"tokens": ("B", SUBJECT), "attention": ("B", SUBJECT)}, ["states", "summary"],
        [
            node("Gather", "table tokens", "looked_up"), node("Cast", "attention", "floats", to=TensorProto.FLOAT),
            node("Unsqueeze", "floats last", "column"), node("Mul", "looked_up column", "states"),
            node("ReduceSum", "states one", "summary", keepdims=0),
        ],
        {"table": weights("subject", (len(WORDS), WIDTH)), "last": last, "one": np.array([1])},
    )  # fmt: skip
    save(
        folder / "style_encoder", {"tokens": ("B", STYLE)}, ["states"], [node("Gather", "table tokens", "states")],
        {"table": weights("style", (len(WORDS), WIDTH // 2))},
    )  # fmt: skip
    inputs = {
        "image": ["B", TOKENS, NUMBERS], "time": ["B"], "text": ["B", "L", WIDTH], "text_mask": ["B", "L"],
        "summary": ["B", 2 * WIDTH + 2], "extra": ["B", 2, WIDTH],
    }  # fmt: skip
    save(
        folder / "transformer", inputs, ["noise_to_data"],
        [
            node("Unsqueeze", "text_mask last", "column"), node("Mul", "text column", "masked"),
            node("ReduceSum", "masked axes", "text_sum", keepdims=0), node("ReduceSum", "extra axes", "extra_sum", keepdims=0),
            node("MatMul", "summary gist_weights", "gist"), node("Sum", "text_sum extra_sum gist", "text_all"),
            node("Mul", "time time_weight", "time_part"), node("Add", "text_all time_part", "bias"),
            node("Unsqueeze", "bias axes", "bias_3d"), node("Mul", "image gain", "scaled"), node("Add", "scaled bias_3d", "noise_to_data"),
        ],
        {
            "last": last, "axes": axes, "gist_weights": weights("gist", (2 * WIDTH + 2,)),
            "time_weight": np.array([0.1], np.float32), "gain": weights("gain", (TOKENS, NUMBERS), 1.0),
        },
    )  # fmt: skip
    save(
        folder / "vae_decoder", {"latent_sample": ["B", CHANNELS, "h", "w"]}, ["sample"],
        [node("Conv", "latent_sample kernel", "deep"), node("DepthToSpace", "deep", "sample", blocksize=FACTOR, mode="DCR")],
        {"kernel": weights("decode", (3 * FACTOR**2, CHANNELS, 1, 1), 0.15)},
    )  # fmt: skip
    save(
        folder / "vae_encoder", {"sample": ["B", 3, SIZE.height, SIZE.width]}, ["latent_parameters"],
        [node("SpaceToDepth", "sample", "deep", blocksize=FACTOR), node("Conv", "deep kernel", "latent_parameters")],
        {"kernel": weights("encode", (2 * CHANNELS, 3 * FACTOR**2, 1, 1))},
    )  # fmt: skip


def sampler(**changes: Any) -> Sampler:
    """Four steps without guidance."""
    plain = {"sigmas": [1.0, 0.9, 0.75, 0.5, 0.0], "shift": 3.0, "guidance": 1.0, "tokens": {"words": SUBJECT + STYLE}, "size_px": SIZE}
    return Sampler.model_validate({**plain, "trained_steps": [4], **changes})


def publish(out: Path, graph: dict[str, Any] | None = None, write: Any = write_networks, **changes: Any) -> Artifact:
    """The artifact with description `graph` (default: `DESCRIPTION`); `changes` are the sampler's."""
    draft = begin(out, Origin("device", "test", "handmade", None, {}, 0, []))
    write(draft.path)
    return draft.publish(sampler=sampler(**changes), extra={"graph": graph or copy.deepcopy(DESCRIPTION), "accuracy_level": 0})


# ---- the same in numpy, written for this family


def token_ids(prompt: str, length: int) -> tuple[list[int], list[int]]:
    """Ids and mask of a prompt of known words."""
    pieces = [piece for word in prompt.split() for piece in ([word] if word in WORDS else [word[:-1], "##s"])]
    ids = [*[WORDS.index(piece) for piece in pieces][: length - 1], END_ID]
    return ids + [PAD_ID] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids))


def text_bias(prompt: str) -> float:
    """What the prompt adds to every number of the transformer's output."""
    ids, mask = token_ids(prompt, SUBJECT)
    subject = weights("subject", (len(WORDS), WIDTH))[ids] * np.array(mask, np.float32)[:, None]
    style_ids, style_mask = token_ids(prompt, STYLE)
    style = weights("style", (len(WORDS), WIDTH // 2))[style_ids] * np.array(style_mask, np.float32)[:, None]
    gist = np.concatenate([subject.sum(0), subject.sum(0), [0, 0]])
    return float(subject.sum() + style.sum() + gist @ weights("gist", (2 * WIDTH + 2,)))


def packed_gain() -> Floats:
    """The transformer's weights per token, on the latents that they belong to."""
    gain, out = weights("gain", (TOKENS, NUMBERS), 1.0), np.empty(LATENT, np.float32)
    per_row = LATENT[2] // PATCH
    for token in range(TOKENS):
        top, left = PATCH * (token // per_row), PATCH * (token % per_row)
        out[:, top : top + PATCH, left : left + PATCH] = gain[token].reshape(CHANNELS, PATCH, PATCH)
    return out


def decoded(z: Floats) -> Floats:
    """Decoder output [3, H, W] of one picture's latents."""
    deep: Floats = np.einsum("oc,chw->ohw", weights("decode", (3 * FACTOR**2, CHANNELS, 1, 1), 0.15)[..., 0, 0], z / SCALING + SHIFT)
    return deep.reshape(FACTOR, FACTOR, 3, *z.shape[1:]).transpose(2, 3, 0, 4, 1).reshape(3, z.shape[1] * FACTOR, z.shape[2] * FACTOR)


def encoded(picture: NDArray[np.uint8]) -> Floats:
    """Latents [C, h, w] of a picture [H, W, 3]."""
    x = from_uint8(picture)[0].reshape(3, LATENT[1], FACTOR, LATENT[2], FACTOR).transpose(2, 4, 0, 1, 3).reshape(-1, *LATENT[1:])
    mean: Floats = np.einsum("oc,chw->ohw", weights("encode", (2 * CHANNELS, 3 * FACTOR**2, 1, 1))[:CHANNELS, :, 0, 0], x)
    return (mean - SHIFT) * SCALING


def pictures(
    prompts: Sequence[str], seeds: Sequence[int], *, weight: float = 1.0, negative: str = "", init: NDArray[np.uint8] | None = None,
    sigmas: Sequence[float] = (1.0, 0.9, 0.75, 0.5, 0.0), scales: Sequence[tuple[float, float]] | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Pictures [N, H, W, 3], in float64."""
    drawn = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        x = latents(LATENT, [seed])[0].astype(float)
        if init is not None:
            x = (1 - sigmas[0]) * encoded(init) + sigmas[0] * x
        bias = text_bias(prompt) if weight == 1 else (1 - weight) * text_bias(negative) + weight * text_bias(prompt)
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            v = SIGN * (x * packed_gain() + bias + 0.1 * (SCALE * sigma + OFFSET))
            a, b = scales[i] if scales else (1, 1)
            x = a * x + b * (sigma_next - sigma) * v
        drawn.append(decoded(x))
    return to_uint8(np.stack(drawn))
