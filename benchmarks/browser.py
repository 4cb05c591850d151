"""Compares an artifact of `flashgen export --target web` in headless Chromium, on WebAssembly, with Python: pictures and times.

python -m benchmarks.browser artifacts/web [--screenshot docs/web.png]
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.bars import psnr
from flashgen import worlds
from flashgen.artifact.store import open_artifact
from flashgen.device.sampler import DevicePipeline
from flashgen.noise import randn

PICTURES = 12
NOISE = 65536  # numbers, as many as a 1024 px latent of SD3.5 has


class Quiet(SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def draw(page: Page, prompt: str, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The picture offered for download, and the page's own laps in ms."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.click("#draw")
    page.locator("#frame:not(.busy)").wait_for()
    failed = page.text_content("#error")
    assert not failed, failed
    with page.expect_download() as download:
        page.click("#download")
    image = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    return np.asarray(image.convert("RGB")), json.loads(page.get_attribute("#picture", "data-laps") or "")


def noise_error(page: Page) -> float:
    """Largest difference between the page's noise and Python's."""
    seeds = (0, 1, 2**40 + 5, 2**64 - 1)
    numbers = "import('./noise.js').then((m) => Array.from(m.randn({}, {}n)))"
    return max(float(np.abs(np.array(page.evaluate(numbers.format(NOISE, seed))) - randn((NOISE,), seed)).max()) for seed in seeds)


def measure(page: Page, url: str, artifact: Path) -> dict[str, float]:
    """Numbers to print, by name."""
    source = open_artifact(artifact)
    prompts = worlds.get("shapes").prompts(4, PICTURES // 6)
    expected = DevicePipeline(source).sample(prompts, list(range(PICTURES)))
    page.goto(url)
    page.locator("#facts:not(:empty)").wait_for()
    drawn, laps = zip(*(draw(page, prompt, seed) for seed, prompt in enumerate(prompts)), strict=True)
    steps = [step for lap in laps[1:] for step in lap["transformer"]]
    return {
        "lowest PSNR against Python, dB": min(map(psnr, drawn, expected)),
        "noise, largest difference from Python": noise_error(page),
        "first picture, s": laps[0]["total"] / 1000,
        "later pictures, new prompt, median s": float(np.median([lap["total"] for lap in laps[1:]])) / 1000,
        "loading networks, part of that, median s": float(np.median([lap["load"] for lap in laps[1:]])) / 1000,
        "step, median ms": float(np.median(steps)),
        "folder, MB": source.size_bytes() / 1e6,
        "networks, part of that, MB": sum(f.size for f in source.manifest.files if "model.onnx" in f.path) / 1e6,
    }


def main() -> None:
    """Serve the artifact, draw in Chromium and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--screenshot", type=Path, help="of the page after the last picture")
    given = parser.parse_args()
    folder = open_artifact(given.artifact).path
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 820})
        for name, value in measure(page, f"http://127.0.0.1:{server.server_port}/?engine=wasm", folder).items():
            print(f"{name:40s} {value:10.4g}")
        if given.screenshot:
            page.screenshot(path=given.screenshot)
        browser.close()


if __name__ == "__main__":
    main()
