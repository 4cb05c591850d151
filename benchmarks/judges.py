"""Shows each judge wrong pictures, and writes docs/judges.json and the table in docs/judges.md.

    python -m benchmarks.judges --page docs/judges.md

The embedded teacher draws every prompt twice. Judged are its pictures with half the steps (`few steps`) and four wrong sets. The judges are
those that need no downloaded weights: the world's, `teacher`, and `command:` with a program of a few lines, the mean saturation.
"""

from __future__ import annotations

import argparse
import json
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashgen import worlds
from flashgen.artifact.store import open_artifact
from flashgen.judges.base import Drawn, Judgement, Pictures
from flashgen.judges.command import CommandJudge
from flashgen.judges.teacher import TeacherJudge
from flashgen.metrics.intervals import intervals
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import sample
from flashgen.stages.bench import machine

SEED, START, END = 4000, "<!-- table of benchmarks/judges.py -->\n", "<!-- end of the table -->\n"
PROGRAM = f"""#!{sys.executable}
import json, pathlib, sys
import numpy as np
from PIL import Image

def colourfulness(path):
    picture = np.asarray(Image.open(path), float)
    return float(((picture.max(2) - picture.min(2)) / np.maximum(picture.max(2), 1)).mean())

values = [colourfulness(path) for path in sorted(pathlib.Path(sys.argv[-1]).glob("*.png"))]
print(json.dumps({{"overall": sum(values) / len(values), "values": values, "metric": "mean_saturation"}}))
"""


def pictures(per_task: int) -> tuple[list[str], list[int], dict[str, Pictures]]:
    """(prompts, seeds, sets of pictures by name); every prompt has two seeds, one behind the other. `teacher` is the reference."""
    world = worlds.get("shapes")
    prompts = [prompt for prompt in dict.fromkeys(world.prompts(SEED, per_task)) for _ in range(2)]
    seeds = list(range(len(prompts)))
    source = open_artifact(str(world.teacher()))
    pipe, sampler = load_pipeline(source.path), source.manifest.sampler
    assert sampler is not None
    few = [*sampler.sigmas[:-1:2], sampler.sigmas[-1]]
    right = sample(pipe, sampler, prompts, seeds)
    return prompts, seeds, {
        "teacher": right,
        "few steps": sample(pipe, sampler, prompts, seeds, sigmas=few),
        "another prompt's": np.roll(right, 2 * (len(right) // 4), 0),
        "one picture per prompt": np.repeat(right[::2], 2, 0),
        "noise": np.random.default_rng(0).integers(0, 256, right.shape, np.uint8),
        "black": np.zeros_like(right),
    }  # fmt: skip


def rows_of(prompts: list[str], seeds: list[int], sets: dict[str, Pictures]) -> list[dict[str, Any]]:
    """Scores of every set by every judge, with an interval of `overall`."""

    def teachers(asked: Sequence[str], noise: Sequence[int]) -> Pictures:
        assert (list(asked), list(noise)) == (prompts, seeds)
        return sets["teacher"]

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "score.py")
        program.write_text(PROGRAM)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        teacher, command, world = TeacherJudge(teachers, "shapes"), CommandJudge(str(program)), worlds.get("shapes")
        judges: dict[str, Callable[[Drawn], Judgement]] = {
            "world": lambda drawn: world.judge(drawn.pictures, drawn.prompts),
            "teacher": teacher.judge,
            "command": command.judge,
        }
        rows = []
        for name, shown in sets.items():
            for judge, call in judges.items():
                judgement = call(Drawn(shown, prompts, seeds))
                assert judgement.values is not None
                interval = intervals(judgement.values, prompts)["overall"]
                rows.append({"pictures": name, "judge": judge, "scores": judgement.scores, "mean": judgement.mean, "interval": interval})
    return rows


def table(rows: list[dict[str, Any]], count: int) -> str:
    """Markdown: one line per set of pictures."""

    def cell(name: str, judge: str) -> str:
        row = next(row for row in rows if (row["pictures"], row["judge"]) == (name, judge))
        low, high = row["interval"]
        return f"{row['mean']:.3f} ({low:.3f} to {high:.3f})"

    def part(name: str, key: str) -> str:
        row = next(row for row in rows if (row["pictures"], row["judge"]) == (name, "teacher"))
        return f"{row['scores'][key]:.2f}" if key in row["scores"] else "-"

    lines = [
        f"{count} pictures per set; mean per picture with its 95 % interval over prompts.",
        "",
        "| pictures | `world`, share that passes (more is better) | `teacher`, distance (less is better) | diversity "
        "| saturation | sharpness | `command:`, mean saturation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["pictures"] for row in rows):
        parts = " | ".join(part(name, key) for key in ("diversity", "saturation", "sharpness"))
        lines.append(f"| {name} | {cell(name, 'world')} | {cell(name, 'teacher')} | {parts} | {cell(name, 'command')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--page", type=Path, required=True, help="page whose table is replaced; the raw rows go beside it as .json")
    parser.add_argument("--per-task", type=int, default=4, help="prompts per task, each drawn twice")
    given = parser.parse_args()
    prompts, seeds, sets = pictures(given.per_task)
    rows = rows_of(prompts, seeds, sets)
    command = f"python -m benchmarks.judges --page {given.page} --per-task {given.per_task}"
    given.page.with_suffix(".json").write_text(json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n")
    before, rest = given.page.read_text().split(START)
    given.page.write_text(before + START + table(rows, len(prompts)) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
