"""The files that `benchmarks.mutations` damages: tiny artifacts and state, and how each is read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import diffusers  # noqa: F401  children are forked from a process that has everything
import numpy as np
import onnxruntime  # noqa: F401  children are forked from a process that has everything
import torch
import transformers  # noqa: F401  children are forked from a process that has everything
from PIL import Image
from typer.testing import CliRunner

from flashgen.arena.study import Settings, Study, build
from flashgen.arena.votes import counted, opened
from flashgen.artifact.files import sha256
from flashgen.artifact.manifest import content_digest
from flashgen.cli.app import app
from flashgen.models import pipeline, sample  # noqa: F401  children are forked from a process that has everything
from flashgen.png import read_picture, read_texts, texts, write_png
from flashgen.recipe.load import load
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.cache import write_states
from flashgen.training.checkpoint import Checkpoint

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "v0.2"
PROMPT = "two red circles on a white background"


class Ended(Exception):
    """A command ended with exit code `code` and said `text` on stderr."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(frozen=True)
class Target:
    """`make` writes whole files into a folder, `read` gives bytes that follow from them, or raises; `files` are those to damage.

    `is_vouched`: another result than that of the whole files is a fault. `seal` makes damaged files consistent, as a stranger would.
    """

    name: str
    count: int
    make: Callable[[Path], object]
    read: Callable[[Path], bytes]
    is_vouched: bool = True
    seal: Callable[[Path], None] | None = None
    suffixes: tuple[str, ...] = ("",)
    is_fast: bool = True

    def files(self, folder: Path) -> list[str]:
        """The files to damage, relative to `folder`; those of a name come once for a small and a large one alike."""
        found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(self.suffixes))
        return [path.relative_to(folder).as_posix() for path in found]


def command(*arguments: str | Path) -> None:
    """Run `flashgen ARGUMENTS` in this process. Raises Ended unless it ends with 0."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise Ended(result.exit_code, result.stderr)


def drawn(folder: Path) -> bytes:
    """The pixels of a picture that the version `folder` draws."""
    out = folder.with_name("picture.png")
    out.unlink(missing_ok=True)
    kind = ("--engine", "onnxruntime") if (folder / "vae_decoder").is_dir() or (folder / "vae_decoder.onnx").exists() else ()
    try:
        command("generate", folder, PROMPT, "--seed", "7", *kind, "-o", out)
    except Ended as ended:
        if out.exists():
            raise RuntimeError("a picture in spite of an error") from ended
        raise
    with Image.open(out) as image:
        return np.asarray(image).tobytes()


def reseal(version: Path) -> None:
    """Let the manifest list the files as they are and seal it again."""
    raw = json.loads((version / "manifest.json").read_text())
    for file in raw["files"]:
        if (path := version / file["path"]).is_file():
            file |= {"size": path.stat().st_size, "sha256": sha256(path)}
    raw["digest"] = content_digest(raw)
    (version / "manifest.json").write_text(json.dumps(raw))


def make_version(name: str) -> Callable[[Path], object]:
    """Copies the version of a fixture."""
    return lambda folder: shutil.copytree(FIXTURES / name / "v0001", folder)


def make_external(folder: Path) -> None:
    """A device artifact whose transformer keeps its weights in a file of their own."""
    import onnx_ir as ir

    make_version("device-student")(folder)
    model = folder / "transformer" / "model.onnx"
    graph = ir.load(model)
    ir.save(graph, model, external_data="model.onnx_data")
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"].append({"path": "transformer/model.onnx_data", "size": 0, "sha256": "0" * 64})
    (folder / "manifest.json").write_text(json.dumps(raw))
    reseal(folder)


def make_plain(folder: Path) -> None:
    """A plain diffusers folder."""
    make_version("student")(folder)
    (folder / "manifest.json").unlink()


def imported(folder: Path) -> bytes:
    """Digest of the import of a plain folder."""
    return published(folder, "teacher", "import")


def quantized(folder: Path) -> bytes:
    """Digest of what `quantize` publishes."""
    return published(folder, "quantize", "--recipe", "shapes-demo", "--set", "quantize.method=rtn", "--set", "bench.per_task=0")


def exported(folder: Path) -> bytes:
    """Digest of what `export` publishes."""
    return published(folder, "export", "--recipe", "shapes-demo")


def published(folder: Path, *arguments: str) -> bytes:
    """Names and digests of the weights that a stage publishes from `folder`."""
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    command(*arguments, folder, "--out", out)
    raw = json.loads((out / "latest" / "manifest.json").read_text())
    return json.dumps(sorted([f["path"], f["sha256"]] for f in raw["files"] if f["path"].endswith((".safetensors", ".onnx")))).encode()


def make_recipe(folder: Path) -> None:
    """The recipe of the demo as JSON, which is YAML."""
    folder.mkdir()
    recipe = load("shapes-demo").model_dump(mode="json", exclude_unset=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))


def state_of(folder: Path) -> dict[str, torch.nn.Module]:
    """Contents of the checkpoint in `folder`."""
    torch.manual_seed(0)
    return {"student": torch.nn.Linear(8, 64), "ema": torch.nn.Linear(8, 64)}


def make_checkpoint(folder: Path) -> None:
    """A training's checkpoint."""
    saved = Checkpoint(folder, state_of(folder), CheckpointRecipe())
    saved.save(7, [{"loss": 0.5}])
    saved.close()


def resumed(folder: Path) -> bytes:
    """Step, metrics and weights that a training resumes with."""
    state = state_of(folder)
    with torch.no_grad():
        for network in state.values():
            network.weight.zero_()  # type: ignore[operator]  # a Linear has it
    saved = Checkpoint(folder, state, CheckpointRecipe())
    where = saved.load()
    saved.close()
    if where == (0, []):
        return b"from the start, which is said"
    return repr(where).encode() + b"".join(value.numpy().tobytes() for n in state.values() for value in n.state_dict().values())


def cached(folder: Path) -> bytes:
    """States that a cache holds, computed where it does not."""

    def compute(rows: slice) -> list[list[torch.Tensor]]:
        return [[torch.arange(rows.start, rows.stop)[:, None].float() * torch.linspace(1, 2, 40)]]

    states, mappings = write_states(folder, {"states.bin": 1}, 24, (40,), 8, compute, "states")
    value = states[0].clone().numpy().tobytes()
    del states, mappings
    return value


def make_study(folder: Path) -> None:
    """A study with a dozen votes."""
    bench = folder.with_name("bench")
    rng = np.random.default_rng(0)
    items = [{"prompt": f"prompt {i}", "seed": 0, "task": None} for i in range(6)]
    for name in "ab":
        (bench / name).mkdir(parents=True)
        for i in range(len(items)):
            write_png(bench / name / f"{i:04d}.png", rng.integers(0, 256, (16, 16, 3), np.uint8), {})
    results = [{"artifact": name, "name": name, "pictures": name} for name in "ab"]
    (bench / "bench.json").write_text(json.dumps({"version": 1, "prompts": items, "results": results}))
    build(bench, folder, Settings())
    study = Study(folder)
    with opened(study) as votes:
        for comparison in study.plan(votes.join("Anna", "a" * 32).slot):
            votes.vote("Anna", comparison, "left", 1.0)
    votes_of(folder)


def votes_of(folder: Path) -> bytes:
    """The votes that count. Raises Ended if some are lost and that is said, and RuntimeError if others were never cast."""
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        rows = [json.dumps(row, sort_keys=True) for row in counted(Study(folder))]
    cast = folder / "cast.json"
    if not cast.exists():
        cast.write_text(json.dumps(sorted(rows)))
    before = json.loads(cast.read_text())
    if not set(rows) <= set(before):
        raise RuntimeError("votes that nobody cast")
    if len(rows) < len(before) and "is incomplete or damaged" in stderr.getvalue():
        raise Ended(3, "error: " + stderr.getvalue().splitlines()[0])
    return "\n".join(sorted(rows)).encode()


def make_png(folder: Path) -> None:
    """A picture of `generate`."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    write_png(folder / "a.png", pixels, texts(PROMPT, 7, [1.0, 0.5, 0.0], "a" * 64))


def seen(folder: Path) -> bytes:
    """Options and pixels of a picture."""
    options, pixels = read_texts(folder / "a.png"), read_picture(folder / "a.png")
    return json.dumps(options, sort_keys=True).encode() + pixels.tobytes()


def targets() -> list[Target]:
    """All targets."""
    weights = (".safetensors", ".json")
    return [
        Target("student", 160, make_version("student"), drawn),
        Target("device", 180, make_external, drawn),
        Target("student, sealed again", 100, make_version("student"), drawn, False, reseal),
        Target("device, sealed again", 120, make_external, drawn, False, reseal),
        Target("quantize", 25, make_version("student"), quantized, suffixes=weights, is_fast=False),
        Target("export", 10, make_version("quantized"), exported, suffixes=weights, is_fast=False),
        Target("import", 60, make_plain, imported, False, is_fast=False),
        Target("recipe", 150, make_recipe, lambda folder: load(folder / "recipe.yaml").model_dump_json().encode(), False),
        Target("checkpoint", 100, make_checkpoint, resumed),
        Target("cache", 80, lambda folder: cached(folder), cached),
        Target("votes", 110, make_study, votes_of, suffixes=("votes.jsonl",)),
        Target("study", 50, make_study, votes_of, False, suffixes=("study.json",)),
        Target("picture", 120, make_png, seen),
    ]
