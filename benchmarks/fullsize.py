"""SD3.5-Medium's shapes with random weights through every stage: memory, time and disk, each stage a process of its own.

python -m benchmarks.fullsize artifacts/fullsize --page docs/fullsize.md

Peak memory is ru_maxrss of the stage's process, as the kernel counted it (mapped files that were read count too). Finished rows are kept
in the folder and not measured again: the same command goes on. Pictures are noise; memory, disk, time and numerics are real.
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

# This process stays small: a child's ru_maxrss begins with what its parent had when it was started.
RECIPE = ("--recipe", "sd35-medium-24gb")
ONE_ROUND = (
    "trajectory.iterations=0",
    "matching.iterations=1",
    "matching.proxy_warmup=0",
    "matching.proxy_updates=1",
    "matching.prompts=2",
)
BUNDLE_MIB = 1812  # 1.9 GB
PROMPT = "two red circles on a white background"


class Row(NamedTuple):
    """One stage: `command` is flashgen's arguments, or those of this module where it begins with "-"."""

    stage: str
    bar_mib: int
    command: tuple[str, ...]
    out: str
    plan: tuple[str, ...] = ()
    seconds: int | None = None
    disk_mib: int | None = None


def rows(folder: Path, base: str) -> list[Row]:
    at = {name: str(folder / name) for name in ("random", "embeds", "student", "slim", "int4", "device", "device-1024")}
    at |= {f"{name}.png": str(folder / f"{name}.png") for name in ("device", "device-1024")}
    one_round = [word for setting in (*ONE_ROUND, "matching.batch=1") for word in ("--set", f"distill.{setting}")]
    distill = ("distill", at["random"], *RECIPE, *one_round, "--out", at["student"])
    many = (*distill, "--set", "distill.matching.prompts=64")
    slim = ("restructure-encoder", at["student"], "--mode", "prune", *RECIPE, "--out", at["slim"])
    int4 = ("quantize", at["slim"], *RECIPE, "--out", at["int4"])
    device = ("export", at["int4"], *RECIPE, "--out", at["device"])
    large = ("export", at["int4"], *RECIPE, "--set", "export.size_px=1024", "--out", at["device-1024"])
    drawn, drawn_large = (("generate", at[name], PROMPT, "-o", at[f"{name}.png"]) for name in ("device", "device-1024"))
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
    """64 training prompts into files, as distill does it first."""
    from flashgen.artifact.store import open_artifact
    from flashgen.models.sample import load_pipeline
    from flashgen.training.prompts import prompt_pool

    source = open_artifact(artifact)
    assert source.manifest.sampler is not None
    prompt_pool(load_pipeline(source.path, weights="text"), 64, 1, source.manifest.sampler.t5_tokens, Path(out))


def needs(artifact: str) -> None:
    """Prints the bytes that generate --memory counts for one picture."""
    from flashgen.artifact.store import open_artifact
    from flashgen.device.memory import plan

    print(plan(open_artifact(artifact), "onnxruntime", 1, 1).peak)


def run(command: list[str]) -> tuple[float, float]:
    """(peak MiB, seconds) of a process and its children; ends with an error when it does."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024), time.perf_counter() - started


def written_mib(path: Path) -> float:
    """Of the newest version in `path` (or of what it is), files that no other version shares."""
    latest = path / "latest"
    files = [path] if path.is_file() else [p for p in (latest if latest.exists() else path).resolve().rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files if p.stat().st_nlink == 1) / 2**20


def planned(row: Row, flashgen: list[str]) -> float | None:
    """Peak that --plan says, MiB: of one phase where the row is one."""
    if not row.plan:
        return None
    phase, *command = row.plan
    if phase == "-needs":
        done = subprocess.run([sys.executable, "-m", "benchmarks.fullsize", phase, command[1]], capture_output=True, text=True, check=True)
        return float(done.stdout) / 2**20
    done = subprocess.run([*flashgen, *command, "--plan", "--json"], capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["memory"]
    wanted: list[dict[str, int]] = [memory[phase]] if phase else list(memory.values())
    return max(sum(parts.values()) for parts in wanted) / 2**20


def measure(folder: Path, page: Path, base: str) -> None:
    flashgen = [sys.executable, "-m", "flashgen"]
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "rows.json"
    found: dict[str, Any] = {"machine": machine(), "command": f"python -m benchmarks.fullsize {folder} --page {page}", "rows": []}
    if kept.exists():
        found["rows"] = json.loads(kept.read_text())
    if not (folder / "random" / "latest").exists():
        run([*flashgen, "teacher", "random", "--like", base, "--out", str(folder / "random")])
    for row in rows(folder, base):
        kept_row = next((done for done in found["rows"] if done["stage"] == row.stage), None)
        if kept_row:
            try:
                plan = planned(row, flashgen)  # today's, beside what was measured
                kept_row["plan_mib"] = plan and round(plan)
            except subprocess.CalledProcessError:
                pass  # what it is made of is gone
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


def replace(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text + "\n")
    path.with_suffix(".tmp").replace(path)


def write(found: dict[str, Any], page: Path) -> None:
    lines = [
        "# Full size",
        "",
        "SD3.5-Medium's shapes with random weights through every stage, each measured in a process of its own (`ru_maxrss`).",
        "`make fullsize` makes this page; rows that are missing were not measured. Seconds are wall-clock and count what else ran.",
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
    from flashgen.stages.bench import machine as about

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
