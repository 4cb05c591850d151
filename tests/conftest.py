"""Tiny real artifacts, made once a session by the real stages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tracing import traced_once
from flashgen.artifact.draft import Origin, begin
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path
from flashgen.flow.grid import shifted_grid
from flashgen.models.pipeline import Pipeline
from flashgen.recipe.compression import ExportRecipe, QuantizeRecipe
from flashgen.recipe.schema import Recipe
from flashgen.stages import trainings
from tests import runs


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is none of the tests' business, but for the libraries of the web page, which may not be there to download."""
    root, packages = tmp_path_factory.mktemp("cache"), cache_path("npm")
    if packages.is_dir():
        (root / "flashgen").mkdir()
        (root / "flashgen" / "npm").symlink_to(packages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    tiny = Recipe(name="test", quantize=QuantizeRecipe(group=16), export=ExportRecipe(accuracy_level=0))
    return tiny.model_copy(update={"bench": tiny.bench.model_copy(update={"per_task": 1, "repeats": 2, "warmup": 1, "extra_s": 0.0})})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system, driven by playwright; skips without either."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra web")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions that torch.compile was given. They are traced as for a compiler, but not compiled, which takes minutes and is torch's
    to test."""
    found, compile_ = list[str](), torch.compile

    def trace(function: Any, **options: Any) -> Any:
        found.append(function.__qualname__)
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    trainings._compiled.cache_clear()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield found
    trainings._compiled.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def pipe() -> Pipeline:
    """A tiny SD3 pipeline with random weights, in memory, in eval mode."""
    from flashgen.families.sd3.build import build_pipeline
    from flashgen.families.sd3.specs import SPECS

    tiny = build_pipeline(SPECS["tiny"], 0)
    for network in tiny.networks():
        network.eval()
    return tiny


def make_pipeline_artifact(
    out: Path, *, kind: str, sampler: Sampler, seed: int = 0, world: str | None = "shapes", words: Sequence[str] | None = None
) -> Artifact:
    """A tiny SD3 pipeline with random weights, published as `kind`; `words` are its vocabulary."""
    from flashgen.families.sd3.build import build_pipeline
    from flashgen.families.sd3.specs import SPECS
    from flashgen.families.sd3.tokenizers import COMMON_WORDS
    from flashgen.models.save import save_pipeline

    draft = begin(out, Origin(kind, "test", "sd3", world, {}, seed, []))  # type: ignore[arg-type]
    pipe = build_pipeline(SPECS["tiny"], seed, words or COMMON_WORDS)
    if not sampler.has_all_encoders:
        pipe.parts |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe.vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    save_pipeline(draft.path, pipe)
    return draft.publish(sampler=sampler)


def tiny_sampler(**changes: object) -> Sampler:
    plain = {"sigmas": shifted_grid(4, 3.0), "shift": 3.0, "guidance": 1.0, "encoder": "full", "tokens": {"clip": 16, "t5": 16}}
    return Sampler.model_validate({**plain, "size_px": 64, "trained_steps": [4], **changes})


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_pipeline_artifact(tmp_path_factory.mktemp("artifacts") / "student", kind="student", sampler=tiny_sampler())


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    sampler = tiny_sampler(sigmas=shifted_grid(3, 3.0), guidance=4.5, trained_steps=[])
    return make_pipeline_artifact(tmp_path_factory.mktemp("artifacts") / "teacher", kind="teacher", sampler=sampler, seed=1)


@pytest.fixture(scope="session")
def outside_student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A student that belongs to no world: no default recipe, no prompts, no judge."""
    return make_pipeline_artifact(tmp_path_factory.mktemp("artifacts") / "student", kind="student", sampler=tiny_sampler(), world=None)


@pytest.fixture(scope="session")
def outside_teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A teacher that belongs to no world."""
    sampler = tiny_sampler(sigmas=shifted_grid(3, 3.0), guidance=4.5, trained_steps=[])
    return make_pipeline_artifact(tmp_path_factory.mktemp("artifacts") / "teacher", kind="teacher", sampler=sampler, seed=1, world=None)


@pytest.fixture(scope="session")
def tiny_device(tiny_student: Artifact, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return runs.export(str(tiny_student.path), tmp_path_factory.mktemp("artifacts") / "device", recipe, 0, False)


@pytest.fixture(scope="session")
def tiny_quantized(tiny_student: Artifact, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return runs.quantize(str(tiny_student.path), tmp_path_factory.mktemp("artifacts") / "int4", recipe, 0, False)


@pytest.fixture(scope="session")
def tiny_int4_device(tiny_quantized: Artifact, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return runs.export(str(tiny_quantized.path), tmp_path_factory.mktemp("artifacts") / "int4-device", recipe, 0, False)


@pytest.fixture(scope="session", autouse=True)
def traces_are_kept() -> Iterator[None]:
    """Dozens of tests export the same networks, and tracing is most of an export."""
    from flashgen.export import graph, write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "trace", traced_once(graph.trace))
        yield
