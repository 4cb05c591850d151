from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flashgen.arena.study import Settings, Study, build

PROMPT = '<script>alert("x")</script> & two red circles'


def write_bench(folder: Path, names: list[str], prompts: int, seeds: int = 1, size: int = 32) -> Path:
    """A bench folder; the pictures of artifact i have the colour i, and text chunks as `generate` writes them."""
    random = np.random.default_rng(0)
    items = [{"prompt": PROMPT if p == 0 else f"prompt {p}", "seed": s, "task": None} for p in range(prompts) for s in range(seeds)]
    results = []
    for number, name in enumerate(names):
        pictures = folder / "pictures" / f"{number:02d}-{name}"
        pictures.mkdir(parents=True)
        for item in range(len(items)):
            pixels = np.full((size, size, 3), (60 + 40 * number, item % 256, 90), np.uint8)
            pixels[: size // 2, : size // 2] = random.integers(0, 256, 3)
            info = PngInfo()
            info.add_text("artifact", f"digest-of-{name}")
            Image.fromarray(pixels).save(pictures / f"{item:04d}.png", pnginfo=info)
        results.append({"artifact": f"artifacts/{name}", "name": name, "pictures": str(pictures.relative_to(folder))})
    (folder / "bench.json").write_text(json.dumps({"version": 1, "prompts": items, "results": results}))
    return folder


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    def make(names: str = "alpha beta gamma", prompts: int = 12, seeds: int = 1, **settings: Any) -> Study:
        bench = write_bench(tmp_path / "bench", names.split(), prompts, seeds)
        return Study(build(bench, tmp_path / "study", Settings(**settings)))

    return make
