"""Commands that `benchmarks.crash` interrupts: all stages with tiny networks, pictures in a folder, votes, statistics, a bench."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flashgen.artifact import manifest
from flashgen.artifact.store import open_artifact, read_latest, versions

MICRO = (
    "distill.trajectory.prompts=160", "distill.trajectory.teacher_steps=4", "distill.trajectory.iterations=4", "distill.trajectory.batch=4",
    "distill.on_policy.iterations=2", "distill.on_policy.prompts=16", "distill.on_policy.batch=4", "distill.matching.batch=4",
    "distill.matching.iterations=3", "distill.matching.fake_score_warmup=0", "distill.matching.prompts=16",
    "finetune.matching.iterations=2", "finetune.matching.fake_score_warmup=1", "finetune.matching.prompts=16", "finetune.matching.batch=4",
    "restructure.iterations=3", "restructure.embedding=3", "restructure.prompts=16", "restructure.batch=4", "restructure.floor=0",
    "quantize.method=gptq", "quantize.group=16", "quantize.low_rank_tolerance=0.9", "quantize.prompts=4", "quantize.budget=4.5",
    "teacher.autoencoder.steps=2", "teacher.autoencoder.batch=4", "teacher.encoders.steps=2", "teacher.encoders.batch=4",
    "teacher.flow.steps=2", "teacher.flow.batch=4", "teacher.flow.samples=64", "teacher.flow.compile=false",
    "finetune.merge_high=[0.7]", "checkpoint.every_s=0.001", "checkpoint.share=1", "bench.per_task=0", "log.trackers=[]",
)  # fmt: skip
BENCH = ("bench.per_task=1", "bench.repeats=1", "bench.warmup=0")
NUM_PICTURES, NUM_VOTES = 24, 40


@dataclass(frozen=True)
class Case:
    """A command by its name: `run(out)` is called in a child, `check(out)` raises unless what `out` holds is whole, whenever the child
    ended, and `result(out)` is what every finished run must give: digests by file."""

    name: str
    run: Callable[[Path], None]
    check: Callable[[Path], None]
    result: Callable[[Path], dict[str, str]]


def command(*arguments: str | Path, recipe: tuple[str, ...] = ()) -> Callable[[Path], None]:
    """`flashgen ARGUMENTS -o OUT`, called in this process."""

    def run(out: Path) -> None:
        from flashgen.cli.app import main

        settings = [word for setting in recipe for word in ("--set", setting)]
        sys.argv = ["flashgen", *map(str, arguments), "-o", str(out), *settings]
        main()

    return run


def check_versions(out: Path) -> None:
    """Every published version verifies, and `latest` names one of them."""
    for version in versions(out):
        open_artifact(version, verify=True)
    read_latest(out)


def latest_files(out: Path) -> dict[str, str]:
    """sha256 of the latest version's files but its log, which has wall-clock times."""
    return {file.path: file.sha256 for file in open_artifact(out, verify=True).manifest.files if file.path != "stats.jsonl"}


def check_pictures(out: Path) -> None:
    """Every picture can be decoded."""
    for file in [out] if out.is_file() else out.glob("*.png"):
        with Image.open(file) as image:
            image.load()


def files(out: Path) -> dict[str, str]:
    """sha256 of every file that is not hidden."""
    paths = [path for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def cast_votes(study: Path) -> Callable[[Path], None]:
    """Votes on a copy of `study`; each one is listed in `acknowledged` behind the call that recorded it."""

    def run(out: Path) -> None:
        from flashgen.arena.study import Study
        from flashgen.arena.votes import opened

        if not out.exists():
            shutil.copytree(study, out.with_name("copy"), dirs_exist_ok=True)
            out.with_name("copy").rename(out)
        with opened(Study(out)) as votes, (out / "acknowledged").open("a") as acknowledged:
            plan = votes.study.plan(votes.join("Anna", "a" * 32).slot)[:NUM_VOTES]
            for number, comparison in enumerate(plan):
                votes.vote("Anna", comparison, "left" if number % 3 else "right", 1.0, "2026-01-01T00:00:00+00:00")
                acknowledged.write(comparison.id + "\n")
                acknowledged.flush()

    return run


def check_votes(out: Path) -> None:
    """No vote is lost that was acknowledged."""
    from flashgen.arena.votes import read

    if (out / "acknowledged").exists() and (out / "study.json").exists():
        recorded = {row.get("comparison") for row in read(out / "votes.jsonl")}
        lost = set((out / "acknowledged").read_text().split("\n")[:-1]) - recorded
        assert not lost, f"{len(lost)} acknowledged votes are lost"


def votes_of(out: Path) -> dict[str, str]:
    """Choice by comparison."""
    from flashgen.arena.study import Study
    from flashgen.arena.votes import counted

    return {str(row["comparison"]): str(row["choice"]) for row in counted(Study(out))}


def statistics(weights: Path, pictures: Path) -> Callable[[Path], None]:
    """Statistics of the reference of a Frechet judge, written to the file `out`."""

    def run(out: Path) -> None:
        from flashgen.judges.frechet import FrechetJudge

        FrechetJudge(str(weights), pictures).save_reference(out)

    return run


def check_statistics(out: Path) -> None:
    """The file is missing or whole."""
    if out.exists():
        with np.load(out) as values:
            assert set(values) == {"mu", "sigma", "metric", "weights"}


def check_bench(out: Path) -> None:
    """The report is missing or whole, and so is every picture."""
    if (out / "bench.json").exists():
        json.loads((out / "bench.json").read_text())
    for file in out.rglob("*.png"):
        check_pictures(file)


def measured_pictures(out: Path) -> dict[str, str]:
    """The pictures of a bench; what it measures is never the same twice."""
    return {name: digest for name, digest in files(out).items() if name.startswith("pictures/")}


def prepare(root: Path) -> None:
    """Inputs that no case makes: a plain diffusers folder, a study, pictures and weights of a judge."""
    import torch
    import transformers

    from flashgen.arena.study import Settings, build
    from flashgen.stages.base import run
    from flashgen.stages.inputs import RecipeChoice
    from flashgen.stages.teacher import Random

    teacher = run(Random, {}, root / "teacher", RecipeChoice(), like="tiny", of_world="shapes")
    shutil.copytree(teacher.path, root / "plain", ignore=shutil.ignore_patterns(manifest.NAME, "README.md"))
    random, bench = np.random.default_rng(0), root / "pictures"
    for name in "ab":
        (bench / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(bench / name / f"{number:04d}.png")
    prompts = [{"prompt": f"prompt {number}", "seed": 0, "task": None} for number in range(12)]
    results = [{"artifact": name, "name": name, "pictures": name} for name in "ab"]
    (bench / "bench.json").write_text(json.dumps({"version": 1, "prompts": prompts, "results": results}))
    build(bench, root / "study", Settings())
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=56)
    transformers.Dinov2Model(config).save_pretrained(root / "dinov2")
    (root / "prompts.txt").write_text("".join(f"a red circle number {number}\n" for number in range(NUM_PICTURES)))


def cases(root: Path) -> list[Case]:
    """All cases in the order in which their results are the inputs of others: the result of case NAME is in root/NAME/out."""
    outputs = {name: root / name / "out" for name in ("distill", "finetune", "restructure-encoder", "quantize", "export")}
    stages = {
        "teacher random": command("teacher", "random", "--like", "tiny", "--world", "shapes"),
        "teacher import": command("teacher", "import", root / "plain", "--world", "shapes"),
        "teacher train": command("teacher", "train", recipe=MICRO),
        "distill": command("distill", root / "teacher", recipe=MICRO),
        "finetune": command("finetune", outputs["distill"], recipe=MICRO),
        "restructure-encoder": command("restructure-encoder", outputs["finetune"], "--mode", "prune", recipe=MICRO),
        "quantize": command("quantize", outputs["restructure-encoder"], recipe=MICRO),
        "export": command("export", outputs["quantize"], recipe=MICRO),
    }
    drawn = command("generate", root / "teacher", "--steps", "2", "--prompt-file", root / "prompts.txt", "--batch", "4")
    bench = command("bench", outputs["distill"], recipe=BENCH)
    return [
        Case("votes", cast_votes(root / "study"), check_votes, votes_of),
        Case("statistics", statistics(root / "dinov2", root / "pictures" / "a"), check_statistics, files),
        Case("generate", drawn, check_pictures, files),
        *(Case(name, run, check_versions, latest_files) for name, run in stages.items()),
        Case("bench", bench, check_bench, measured_pictures),
    ]
