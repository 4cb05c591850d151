"""Measures memory, time and disk of every stage at SD3.5-Medium's size with random weights, each stage in a process of its own.

python -m benchmarks.fullsize artifacts/fullsize --page docs/fullsize.md

Peak memory is ru_maxrss of the stage's process (pages of mapped files that were read count too). Finished rows are saved in the folder, so
the same command resumes. Pictures are noise; memory, disk, time and numerics are real.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# This process stays small: a child's ru_maxrss starts with the memory that its parent had when the child was started.
RECIPE = ("--recipe", "sd35-medium-24gb")
ONE_ROUND = (
    "trajectory.iterations=0",
    "matching.iterations=1",
    "matching.fake_score_warmup=0",
    "matching.fake_score_updates=1",
    "matching.prompts=2",
)
BUNDLE_MIB = 1812  # 1.9 GB
PROMPT = "two red circles on a white background"


class Row(NamedTuple):
    """One stage: `command` are arguments of flashgen, or of this module if the first one starts with "-"."""

    stage: str
    bar_mib: int
    command: tuple[str, ...]
    out: str
    plan: tuple[str, ...] = ()
    seconds: int | None = None
    disk_mib: int | None = None


def rows(folder: Path) -> list[Row]:
    """The rows of the page, in the order in which stages need each other."""
    at = {name: str(folder / name) for name in ("random", "embeds", "student", "slim", "int4", "device", "device-1024")}
    at |= {f"{name}.png": str(folder / f"{name}.png") for name in ("device", "device-1024")}
    prompts = ("--set", f"prompts_file={folder / 'prompts.txt'}")
    one_round = [word for setting in (*ONE_ROUND, "matching.batch=1") for word in ("--set", f"distill.{setting}")]
    distill = ("distill", at["random"], *RECIPE, *prompts, *one_round, "--out", at["student"])
    many = (*distill, "--set", "distill.matching.prompts=64")
    slim = ("restructure-encoder", at["student"], "--mode", "prune", *RECIPE, "--out", at["slim"])
    int4 = ("quantize", at["slim"], *RECIPE, "--out", at["int4"])
    device = ("export", at["int4"], *RECIPE, "--out", at["device"])
    large = ("export", at["int4"], *RECIPE, "--set", "export.size_px=1024", "--out", at["device-1024"])
    draw = (PROMPT, "--engine", "onnxruntime", "-o")
    drawn, drawn_large = (("generate", at[name], *draw, at[f"{name}.png"]) for name in ("device", "device-1024"))
    return [
        Row("embed 64 prompts, three encoders", 12 << 10, ("-embed", at["random"], at["embeds"]), at["embeds"], ("embed", *many)),
        Row("distill, one round, LoRA roles, 512 px", 18 << 10, distill, at["student"], ("", *distill)),
        Row("restructure-encoder prune", 6 << 10, slim, at["slim"], ("", *slim)),
        Row("quantize INT4, data-free", 4 << 10, int4, at["int4"], ("", *int4), 600),
        Row("export ONNX INT4, all components", 8 << 10, device, at["device"], ("", *device), 900, BUNDLE_MIB),
        Row("generate 512 px, 4 steps, INT4", 3 << 10, drawn, drawn[-1], ("-needs", *drawn)),
        Row("export the same for 1024 px", 8 << 10, large, at["device-1024"], ("", *large), 900, BUNDLE_MIB),
        Row("generate 1024 px, tiled decode", 4 << 10, drawn_large, drawn_large[-1], ("-needs", *drawn_large)),
    ]  # fmt: skip


def embed(artifact: str, out: str) -> None:
    """Encode 64 training prompts into files, as distill does first."""
    from flashgen import worlds
    from flashgen.artifact.store import open_artifact
    from flashgen.models.pipeline import load_pipeline
    from flashgen.stages.inputs import sampler_of
    from flashgen.training.prompts import prompt_pool, training_prompts

    source, prompts = open_artifact(artifact), training_prompts(worlds.get("shapes"), None, 64, 1)
    prompt_pool(prompts, load_pipeline(source.path, weights="text"), sampler_of(source), Path(out))


def needs(artifact: str) -> None:
    """Print the bytes that generate --memory plans for one picture."""
    from flashgen.artifact.store import open_artifact
    from flashgen.device.memory import plan

    print(plan(open_artifact(artifact), "onnxruntime", 1, 1).peak)


def run(command: list[str]) -> tuple[float, float]:
    """(peak MiB, seconds) of a process and its children. Raises SystemExit when it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024), time.perf_counter() - started


def written_mib(path: Path) -> float:
    """MiB in `path` (a file, a folder, or the newest version in it) that no other version shares."""
    latest = path / "latest"
    files = [path] if path.is_file() else [p for p in (latest if latest.exists() else path).resolve().rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files if p.stat().st_nlink == 1) / 2**20


def planned(row: Row, flashgen: list[str]) -> float | None:
    """Peak of --plan in MiB, for the row's phase or for all."""
    if not row.plan:
        return None
    phase, *command = row.plan
    if phase == "-needs":
        done = subprocess.run([sys.executable, "-m", "benchmarks.fullsize", phase, command[1]], capture_output=True, text=True, check=True)
        return float(done.stdout) / 2**20
    done = subprocess.run([*flashgen, *command, "--plan", "--json"], capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["memory"]
    phases: list[dict[str, int]] = [memory[phase]] if phase else list(memory.values())
    return max(sum(parts.values()) for parts in phases) / 2**20


def measure(folder: Path, page: Path, base: str) -> None:
    """Measure the missing rows, saving each at once, and write the page."""
    flashgen = [sys.executable, "-m", "flashgen"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"a photograph of thing {number}\n" for number in range(64)))
    kept = folder / "rows.json"
    found: dict[str, Any] = {"machine": machine(), "command": f"python -m benchmarks.fullsize {folder} --page {page}", "rows": []}
    if kept.exists():
        found["rows"] = json.loads(kept.read_text())
    if not (folder / "random" / "latest").exists():
        run([*flashgen, "teacher", "random", "--like", base, "--out", str(folder / "random")])
    for row in rows(folder):
        kept_row = next((done for done in found["rows"] if done["stage"] == row.stage), None)
        if kept_row:
            try:
                plan = planned(row, flashgen)  # of the present code, beside what was measured
                kept_row["plan_mib"] = plan and round(plan)
            except subprocess.CalledProcessError:
                pass  # its inputs are gone
            continue
        shutil.rmtree(row.out, ignore_errors=True)  # what an interrupted measurement left
        plan = planned(row, flashgen)
        own = [sys.executable, "-m", "benchmarks.fullsize"] if row.command[0].startswith("-") else flashgen
        peak, seconds = run([*own, *row.command])
        facts: dict[str, Any] = {"stage": row.stage, "peak_rss_mib": round(peak), "bar_mib": row.bar_mib, "plan_mib": plan and round(plan)}
        facts |= {"seconds": round(seconds), "bar_s": row.seconds, "disk_mib": round(written_mib(Path(row.out)))}
        facts |= {"bar_disk_mib": row.disk_mib, "command": " ".join(row.command)}
        found["rows"].append(facts)
        replace(kept, json.dumps(found["rows"], indent=1))
        print(json.dumps(facts), file=sys.stderr, flush=True)
    write(found, page)


def page_of(name: str) -> Path:
    """Where the page `name` of this kind of processor is written, beside those of other kinds."""
    from flashgen.runtime.processor import this_processor

    return Path(f"docs/{name}-{this_processor().kind or 'other'}.md")


def replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    path.with_suffix(".tmp").write_text(text + "\n")
    path.with_suffix(".tmp").replace(path)


def write(found: dict[str, Any], page: Path) -> None:
    """Write the page and its numbers."""
    lines = [
        "# Full size",
        "",
        "Every stage at SD3.5-Medium's size with random weights, each measured in a process of its own (`ru_maxrss`).",
        "`make fullsize` writes this page; missing rows were not measured. Seconds are wall time, slowed by other programs that ran.",
        "",
        f"Machine: {found['machine']}.",
        "",
        "| stage | peak MiB | bar MiB | plan MiB | plan / peak | seconds | bar s | disk written MiB | bar MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        ratio = f"{r['plan_mib'] / r['peak_rss_mib']:.2f}" if r["plan_mib"] else ""
        cells = (
            r["stage"],
            r["peak_rss_mib"],
            r["bar_mib"],
            r["plan_mib"],
            ratio,
            r["seconds"],
            r["bar_s"] or "",
            r["disk_mib"],
            r["bar_disk_mib"] or "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"* {r['stage']}: `{r['command']}`{'; ' + r['note'] if r.get('note') else ''}" for r in found["rows"])]
    replace(page.with_suffix(".json"), json.dumps(found, indent=1))
    replace(page, "\n".join(lines))


def machine() -> str:
    """The machine and the number of threads."""
    from flashgen.metrics.machine import fingerprint as about

    found = about()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{found['cpu']}, {found['cores']} cores, {memory:.0f} GB, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)"


if __name__ == "__main__":
    if sys.argv[1:2] == ["-embed"]:
        embed(*sys.argv[2:])
    elif sys.argv[1:2] == ["-needs"]:
        needs(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("folder", type=Path)
        parser.add_argument("--page", type=Path, required=True)
        parser.add_argument("--like", default="sd35-medium")
        given = parser.parse_args()
        measure(given.folder, given.page, given.like)
