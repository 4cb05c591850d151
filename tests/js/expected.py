"""Numbers that Python computes and the page's JavaScript must reproduce: python -m tests.js.expected writes expected.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flashgen.device.graph import Graph, pack
from flashgen.flow.ode import euler, guide
from flashgen.noise import randn
from flashgen.pixels import Floats, to_uint8
from tests.device.handmade import DESCRIPTION

FILE = Path(__file__).with_name("expected.json")
SEEDS = (0, 1, 2**32 + 7, 2**64 - 1)
SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.0]
SCALES = [(1.02, 0.9), (0.97, 1.1), (1.0, 1.05), (0.9, 1.0)]


def expected() -> dict[str, Any]:
    """Inputs and results of every function of graph.js and noise.js that computes numbers."""
    graph = Graph.model_validate({**DESCRIPTION, "latent_shape": [4, 4, 6]})
    random = np.random.default_rng(0)
    shapes = {"subject": (2, 6, 8), "style": (2, 4, 4), "gist": (2, 8), "subject_mask": (2, 6), "style_mask": (2, 4)}
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    conditioning = graph.condition(values, 2)
    x = randn((1, 4, 4, 6), 3)
    sample = random.uniform(-1.2, 1.2, (1, 3, 2, 5)).astype(np.float32)
    sample[0, :, 0] = np.array([-1, 1, 1 / 255, 3 / 255, -1 / 255])  # halves are rounded to even
    return {
        "description": graph.model_dump(),
        "noise": {str(seed): numbers(randn((24,), seed)) for seed in SEEDS},
        "values": {name: array(value) for name, value in values.items()},
        "conditioning": {name: array(value) for name, value in conditioning.items()},
        "latents": numbers(x),
        "tokens": numbers(pack(x, 2)),
        "feeds": {name: array(value) for name, value in graph.feeds(np.concatenate([x, x]), 0.9, conditioning).items()},
        "sigmas": SIGMAS,
        "scales": SCALES,
        "drawn": {"plain": numbers(draw(graph, x, 1.0, None)), "guided": numbers(draw(graph, x, 3.5, SCALES))},
        "sample": numbers(sample),
        "pixels": to_uint8(sample)[0].tolist(),
    }


def draw(graph: Graph, x: Floats, weight: float, scales: list[tuple[float, float]] | None) -> Floats:
    """Final latents of a transformer whose output is 0.5 image + time + row, in float32."""

    def velocity(x: Floats, sigma: float, _: int) -> Floats:
        feeds = graph.feeds(x if weight == 1 else np.concatenate([x, x]), sigma, {})
        image, time = feeds["image"], feeds["time"][:, None, None]
        v = graph.velocity(image * np.float32(0.5) + time + np.arange(len(image), dtype=np.float32)[:, None, None])
        return v if weight == 1 else guide(v[:1], v[1:], weight)

    return euler(x, velocity, SIGMAS, scales)


def array(value: Floats) -> dict[str, Any]:
    return {"data": numbers(value), "dims": list(value.shape)}


def numbers(value: Floats) -> list[float]:
    return [float(number) for number in value.ravel()]


def text() -> str:
    """Content of expected.json."""
    return json.dumps(expected(), separators=(",", ":")) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
