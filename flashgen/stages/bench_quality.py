"""Numbers of the bench's pictures: those of judges, and the distance to the pictures of a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashgen.judges.base import Drawn, Judge, Judgement
from flashgen.metrics.latency import Pictures
from flashgen.metrics.worker import Job
from flashgen.pixels import Size
from flashgen.stages.bench_rows import Comparison, PlannedRow

NOT_JUDGED = {"composition": "not judged"}


def judge_rows(report: Mapping[str, Any], judges: Sequence[Judge], drawn: Sequence[Pictures]) -> None:
    """Fill in quality, its intervals and values. Rows that share pictures are judged once."""
    texts, seeds = ([p[key] for p in report["prompts"]] for key in ("prompt", "seed"))
    for judge in judges:
        judged: dict[int, Judgement] = {}
        for row, images in zip(report["results"], drawn, strict=True):
            if id(images) not in judged:
                judged[id(images)] = judge.judge(Drawn(images, texts, seeds))
            found = judged[id(images)]
            row["quality"][judge.metric] = {k: round(v, 4) for k, v in found.scores.items()}
            about = {"judge": judge.identity(), "pictures": len(images), "higher_is_better": judge.higher_is_better}
            row["quality_of"][judge.metric] = about
            row["quality_interval"][judge.metric] = _intervals(found, report["prompts"])
            if found.values is not None:
                row["values"][judge.metric] = [round(float(v), 6) for v in found.values]


def _intervals(found: Judgement, prompts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of the overall score and of those of tasks; empty where a picture has no number."""
    from flashgen.metrics.intervals import intervals

    if found.values is None:
        return {}
    tasks = [prompt["task"] for prompt in prompts]
    bounds = intervals(found.values, [prompt["prompt"] for prompt in prompts], tasks if None not in tasks else None)
    return {part: bound and (round(bound[0], 4), round(bound[1], 4)) for part, bound in bounds.items() if part in found.scores}


def compare_pictures(
    report: Mapping[str, Any], rows: Sequence[PlannedRow], references: Mapping[Size, Job], drawn: Sequence[Pictures], comparison: Comparison
) -> None:
    """Fill in `fidelity` of every row that has a reference of its size other than itself."""
    texts = [prompt["prompt"] for prompt in report["prompts"]]
    images_of = {row.job: images for row, images in zip(rows, drawn, strict=True)}
    for result, row, images in zip(report["results"], rows, drawn, strict=True):
        reference = images_of.get(references[row.size]) if references else None
        if reference is not None and reference is not images:
            from flashgen.metrics.fidelity import fidelity

            result["fidelity"] = {"reference": comparison.reference, **fidelity(images, reference, texts, comparison.lpips_weights)}
