"""The exported page in headless Chromium, against Python. Needs the extra `web`, Chromium, and the page's packages in the cache."""

from __future__ import annotations

import copy
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from flashgen.artifact.draft import Origin, begin
from flashgen.artifact.files import link
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import MachineError
from flashgen.export.page import PACKAGES, fetch, write_page
from flashgen.noise import randn
from flashgen.recipe.schema import Recipe
from tests.device import handmade

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra web")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "two red circles on a white background"
BAR_DB = 60  # the promise is 35; random networks hear so little of a prompt that 35 would not tell it from another (46)
FINISHED = "#frame:not(.busy)"


@dataclass
class Site:
    """A served folder; `changes` replaces files by other bytes, None is 404."""

    folder: Path
    url: str = ""
    changes: dict[str, bytes | None] = field(default_factory=dict)

    def before_script(self, code: str) -> None:
        self.changes["flashgen.js"] = code.encode() + (self.folder / "flashgen.js").read_bytes()


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, site: Site) -> None:
        self.site = site
        super().__init__(*args, directory=site.folder)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        if name not in self.site.changes:
            return super().do_GET()
        content = self.site.changes[name]
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(name))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    try:
        for package in PACKAGES:
            fetch(package, offline=True)
    except MachineError as error:
        pytest.skip(str(error))
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def web(browser: Any, tiny_quantized: Artifact, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from tests import runs

    return runs.export(str(tiny_quantized.path), tmp_path_factory.mktemp("web") / "site", recipe, 0, False, target="web", offline=True)


@pytest.fixture
def serve() -> Iterator[Callable[[Artifact], Site]]:
    servers = []

    def start(artifact: Artifact) -> Site:
        site = Site(artifact.path)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, site=site))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        site.url = f"http://127.0.0.1:{server.server_port}/"
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    yield page
    page.close()


def draw(tab: Any, prompt: str, seed: int) -> Image.Image:
    """The picture that the page offers for download."""
    tab.fill("#prompt", prompt)
    tab.fill("#seed", str(seed))
    tab.click("#draw")
    tab.locator(FINISHED).first.wait_for()
    assert tab.text_content("#error") == ""
    with tab.expect_download() as download:
        tab.click("#download")
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def psnr_db(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return 10 * np.log10(255**2 / error) if error else 99.0


def test_browser_draws_what_python_draws_and_asks_nobody_else(web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    site = serve(web)
    asked: list[str] = []
    tab.context.on("request", lambda request: asked.append(request.url))
    tab.goto(site.url)
    seed = 2**63 + 12345
    image = draw(tab, PROMPT, seed)
    expected = DevicePipeline(web).sample([PROMPT], [seed])[0]
    assert expected.std() > 5, "a flat picture would prove nothing"
    assert psnr_db(np.asarray(image.convert("RGB")), expected) >= BAR_DB
    texts = {"prompt": PROMPT, "seed": str(seed), "artifact": web.manifest.digest}
    assert {k: image.text[k] for k in texts} == texts  # type: ignore[attr-defined]
    assert web.manifest.sampler is not None
    sigmas = [round(sigma, 9) for sigma in web.manifest.sampler.sigmas]
    assert json.loads(image.text["sigmas"]) == sigmas  # type: ignore[attr-defined]
    assert len(asked) > 15 and all(url.startswith((site.url, "blob:", "data:")) for url in asked)


def test_noise_equals_python(web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    tab.goto(serve(web).url)
    for seed in (0, 1, 2**32 + 7, 2**64 - 1):
        found = tab.evaluate(f"import('./noise.js').then((m) => Array.from(m.randn(20000, {seed}n)))")
        np.testing.assert_allclose(np.array(found), randn((20000,), seed), atol=1e-6, rtol=0)


def variant(web: Artifact, out: Path, external: bool = False, **changes: Any) -> Artifact:
    """The same networks under another sampler; `external` puts the transformer's weights into a file of their own."""
    assert web.manifest.sampler is not None
    sampler = Sampler.model_validate(web.manifest.sampler.model_dump() | changes)
    graph = copy.deepcopy(web.manifest.extra["graph"])
    if not sampler.has_all_encoders:  # the last encoder's tokens are zeros
        del graph["encoders"][-1]
        clip = graph["conditioning"]["encoder_hidden_states"]["concat"][0]
        graph["conditioning"]["encoder_hidden_states"]["concat"][1] = {"zeros": [sampler.tokens["t5"], clip["to"]]}
    encoders = {encoder["component"] for encoder in web.manifest.extra["graph"]["encoders"]} - {e["component"] for e in graph["encoders"]}
    draft = begin(out, Origin("device", "test", web.manifest.family, None, {}, 0, []))
    for file in web.manifest.files:
        if file.path.partition("/")[0] not in encoders:
            link(web.path / file.path, draft.path / file.path)
    if external:
        model = draft.path / "transformer" / "model.onnx"
        model.unlink()
        ir.save(ir.load(web.path / "transformer" / "model.onnx"), model, external_data="model.onnx_data")
        assert (model.parent / "model.onnx_data").is_file()
    return draft.publish(sampler=sampler, extra=web.manifest.extra | {"graph": graph})


VARIANTS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 4.5},
    "zeroed, repaired": {"encoder": "zeros", "scales": [(1.02, 0.9), (0.97, 1.1), (1.0, 1.05), (0.9, 1.0)]},
    "pruned, external weights": {"encoder": "prune", "tokens": {"clip": 16, "t5": 0}, "external": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_browser_follows_the_manifest(name: str, web: Artifact, tmp_path: Path, serve: Callable[[Artifact], Site], tab: Any) -> None:
    device = variant(web, tmp_path / "site", **VARIANTS[name])
    expected = DevicePipeline(device).sample([PROMPT], [3])[0]
    assert psnr_db(expected, DevicePipeline(web).sample([PROMPT], [3])[0]) < BAR_DB, "the variant makes no difference"
    tab.goto(serve(device).url)
    assert psnr_db(np.asarray(draw(tab, PROMPT, 3).convert("RGB")), expected) >= BAR_DB


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_browser_draws_any_description(guidance: float, browser: Any, tmp_path: Path, serve: Callable[[Artifact], Site], tab: Any) -> None:
    """A picture that is not square, of masked prompts and packed latents (tests/device/handmade.py)."""

    def write(folder: Path) -> None:
        handmade.write_networks(folder)
        write_page(folder, offline=True)

    device = handmade.publish(tmp_path / "site", write=write, guidance=guidance)
    tab.goto(serve(device).url)
    image = draw(tab, "two red circles", 2**63 + 5)
    assert "96 × 64 px" in tab.text_content("#facts")  # noqa: RUF001
    assert (image.width, image.height) == (96, 64)
    expected = DevicePipeline(device).sample(["two red circles"], [2**63 + 5])[0]
    difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # sums over the prompt may differ in their last bit
    assert psnr_db(expected, DevicePipeline(device).sample(["a blue square"], [2**63 + 5])[0]) < 40, "the prompt makes no difference"


def test_ids_equal_python_on_odd_prompts(web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    from tokenizers import Tokenizer

    tab.goto(serve(web).url)
    prompts = [
        "",
        " a  red\tcircle\n",
        "naïve CAFÉ e\u0301 ÅNGSTRÖM straße İ ﬁ ½",
        "東京 🐈\u200d⬛ Привет שלום",
        "don't we'll x2 3.5 @#$ <|endoftext|> </s>",
    ]
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        found = tab.evaluate(
            """async ([file, prompts]) => {
                const { Tokenizer } = await import("./vendor/tokenizers.min.js");
                const tokenizer = new Tokenizer(await (await fetch(file)).json(), {});
                return prompts.map((prompt) => tokenizer.encode(prompt).ids);
            }""",
            [f"{name}/tokenizer.json", prompts],
        )
        python = Tokenizer.from_file(str(web.path / name / "tokenizer.json"))
        assert found == [python.encode(prompt).ids for prompt in prompts], name


def test_long_prompt_is_drawn_with_a_warning_that_has_the_cut_text(web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    prompt = "two red circles " * 4 + "above three yellow stars left of a purple heart"
    tab.goto(serve(web).url)
    for seed in (1, 2):  # the second picture takes the text as it was encoded for the first
        image = draw(tab, prompt, seed)
        warning = tab.text_content("#warning")
        assert "The prompt is too long" in warning and "purple heart”" in warning and "tokenizer_2 (16 of" in warning
        assert psnr_db(np.asarray(image.convert("RGB")), DevicePipeline(web).sample([prompt], [seed])[0]) >= BAR_DB


NO_MEMORY = "WebAssembly.Memory = class { constructor() { throw new RangeError('could not allocate memory'); } };"
FAULTS: dict[str, tuple[Callable[[Site], object], str]] = {
    "no manifest": (lambda s: s.changes.update({"manifest.json": None}), "manifest.json is missing on the server (HTTP 404)"),
    "broken manifest": (lambda s: s.changes.update({"manifest.json": b"{"}), "manifest.json is not valid JSON"),
    "no network": (lambda s: s.changes.update({"transformer/model.onnx": None}), "transformer/model.onnx is missing on the server"),
    "cut network": (
        lambda s: s.changes.update({"vae_decoder/model.onnx": b"cut"}),
        "vae_decoder/model.onnx is not the exported file (3 b",
    ),
    "no worker": (lambda s: s.changes.update({"flashgen.js": None}), "flashgen.js did not start: it or a module that it imports is"),
    "no module": (lambda s: s.changes.update({"graph.js": None}), "flashgen.js did not start: it or a module that it imports is"),
    "no runtime": (
        lambda s: s.changes.update({"vendor/ort-wasm-simd-threaded.js": None}),
        "vendor/ort-wasm-simd-threaded.js is missing on the server",
    ),
    "no WebAssembly": (lambda s: s.before_script("delete globalThis.WebAssembly;"), "This browser has no WebAssembly with SIMD"),
    "no memory": (lambda s: s.before_script(NO_MEMORY), "This browser tab ran out of memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_a_sentence_on_the_page(fault: str, web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    site = serve(web)
    change, sentence = FAULTS[fault]
    change(site)
    tab.goto(site.url)
    tab.click("#draw")
    tab.locator(FINISHED).first.wait_for()
    assert sentence in tab.text_content("#error")
    assert tab.text_content("#draw") == "Draw"


GPU = "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: () => ASKED } });"
SMALL = """const Whole = WebAssembly.Memory;
WebAssembly.Memory = class extends Whole { constructor(settings) {
  if (settings.maximum > 16384) throw new RangeError('could not allocate memory');
  super(settings);
} };"""
HOSTILE = {
    "an adapter that never comes": GPU.replace("ASKED", "new Promise(() => {})"),
    "an adapter that throws": GPU.replace("ASKED", "{ throw new Error('no GPU'); }"),
    "little shared memory": SMALL,
}


@pytest.mark.parametrize("browser_with", HOSTILE)
def test_a_browser_that_refuses_draws_with_what_it_gives(
    browser_with: str, web: Artifact, serve: Callable[[Artifact], Site], tab: Any
) -> None:
    site = serve(web)
    site.before_script(HOSTILE[browser_with])
    tab.goto(site.url)
    image = draw(tab, PROMPT, 3)
    assert "WebAssembly" in tab.text_content("#facts")
    assert psnr_db(np.asarray(image.convert("RGB")), DevicePipeline(web).sample([PROMPT], [3])[0]) >= BAR_DB


def test_page_without_its_script_says_what_to_do(web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    site = serve(web)
    site.changes["page.js"] = None
    tab.goto(site.url)
    assert "run python3 -m http.server in this folder" in tab.text_content("#status")


def test_little_memory_and_bad_input_are_said_before_any_drawing(web: Artifact, serve: Callable[[Artifact], Site], tab: Any) -> None:
    site = serve(web)
    site.before_script("Object.defineProperty(navigator, 'deviceMemory', { value: 2 ** -14 });")
    tab.goto(site.url)
    tab.locator("#warning:not([hidden])").wait_for()
    assert "this device reports 0.1 MB: drawing may fail" in tab.text_content("#warning")
    for prompt, seed, sentence in ((" ", "1", "The prompt is empty"), ("a", "-1", "whole number"), ("a", str(2**64), "whole number")):
        tab.fill("#prompt", prompt)
        tab.fill("#seed", seed)
        tab.click("#draw")
        assert sentence in tab.text_content("#error")
