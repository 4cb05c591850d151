"""`bench --baseline FILE`: rows compared with those of an earlier bench.json.

A row is compared with the row of the same name, engine, threads, size and steps. It is worse

* in latency (encode, step_p50, decode, total_p50) when the median grew by more than the tolerance and the intervals do not overlap,
* in memory (peak_rss_mib, peak_device_mib) and size (size_mib) when the number grew by more than the tolerance,
* in quality when the mean difference over the same prompts and seeds is below 0 with its whole 95 % interval; where a judge gives no
  number per picture, when the score fell by more than the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashgen.errors import UsageError

VERSION = 1
KEY = ("name", "engine", "threads", "size_px", "steps")
MACHINE = ("cpu", "cores", "usable_cores")
MEMORY = ("peak_rss_mib", "peak_device_mib", "size_mib")
Report = Mapping[str, Any]


def read_baseline(path: Path) -> dict[str, Any]:
    """The content of a bench.json. Raises UsageError for a file that is missing, cut or of another kind."""
    where, mend = f"--baseline {path}", "give the bench.json of: flashgen bench ARTIFACT... --out DIR"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror}); {mend}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON, or was cut ({error}); {mend}") from error
    version = report.get("version") if isinstance(report, dict) else None
    if version != VERSION:
        raise UsageError(f"{where}: version is {version!r}, this flashgen compares {VERSION}; {mend}")
    try:
        for row in report["results"]:
            _ = [row[key] for key in KEY], row["quality"], row["quality_of"], row["values"], row["size_mib"]
            _ = [float(row["latency_s"][name]) + sum(interval) for name, interval in row["latency_interval_s"].items()]
        _ = [(prompt["prompt"], prompt["seed"]) for prompt in report["prompts"]], [report["machine"][key] for key in MACHINE]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where} is no bench.json of this flashgen ({type(error).__name__}: {error}); {mend}") from error
    return dict(report)


def check_comparable(path: Path, baseline: Report, report: Report, names: set[str]) -> None:
    """Raises UsageError when `baseline` has another machine or other prompts than `report`, or knows none of the artifacts `names`."""
    where = f"--baseline {path}"
    if other := [key for key in MACHINE if baseline["machine"][key] != report["machine"][key]]:
        found, here = (", ".join(f"{key} {source['machine'][key]}" for key in other) for source in (baseline, report))
        raise UsageError(f"{where} was measured on another machine ({found}; here: {here}); measure a baseline here, with --out DIR")
    before, after = ([(p["prompt"], p["seed"]) for p in source["prompts"]] for source in (baseline, report))
    if before != after:
        raise UsageError(f"{where} has pictures of other prompts or seeds; give the --seed, --per-task and prompts of its command")
    known = {str(row["name"]) for row in baseline["results"]}
    if not names & known:
        raise UsageError(f"{where} has no row of {', '.join(sorted(names))}; it has {', '.join(sorted(known)) or 'none'}")


def row_name(row: Report) -> str:
    """A row in words."""
    return f"{row['name']} ({row['engine']}, {row['threads']} threads, {row['size_px']}, {row['steps']} steps)"


def compare(results: Sequence[Report], baseline: Report, tolerance: float) -> tuple[list[str], list[str]]:
    """(what got worse, what `baseline` does not have), in words."""
    earlier = {tuple(row[key] for key in KEY): row for row in baseline["results"]}
    worse, unknown = [], []
    prompts = [prompt["prompt"] for prompt in baseline["prompts"]]
    for row in results:
        old = earlier.get(tuple(row[key] for key in KEY))
        if old is None:
            unknown.append(row_name(row))
            continue
        found = [*_slower(row, old, tolerance), *_larger(row, old, tolerance), *_worse_in_quality(row, old, tolerance, prompts)]
        worse += [f"{row_name(row)}: {what}" for what in found]
        unknown += [f"{metric} of {row_name(row)}" for metric in row["quality_of"] if not _same_judge(metric, row, old)]
    return worse, unknown


def _slower(row: Report, old: Report, tolerance: float) -> list[str]:
    found = []
    for name, (low, _) in row["latency_interval_s"].items():
        before, after = old["latency_s"][name], row["latency_s"][name]
        if after > before * (1 + tolerance) and low > old["latency_interval_s"][name][1]:
            found.append(_change(name, 1000 * before, 1000 * after, " ms"))
    return found


def _larger(row: Report, old: Report, tolerance: float) -> list[str]:
    pairs = [(name, old.get(name), row.get(name)) for name in MEMORY]
    return [_change(name, a, b, " MiB") for name, a, b in pairs if a and b and b > a * (1 + tolerance)]


def _worse_in_quality(row: Report, old: Report, tolerance: float, prompts: list[str]) -> list[str]:
    from flashgen.metrics.intervals import difference_intervals

    found = []
    for metric, about in row["quality_of"].items():
        if not _same_judge(metric, row, old):
            continue
        sign = 1.0 if about["higher_is_better"] else -1.0
        before, after = old["quality"][metric]["overall"], row["quality"][metric]["overall"]
        if metric in row["values"] and len(old["values"].get(metric, ())) == len(prompts):
            pairs = [(sign * b, sign * a) for b, a in zip(old["values"][metric], row["values"][metric], strict=True)]
            bound = difference_intervals([a for _, a in pairs], [b for b, _ in pairs], prompts)["overall"]
            is_worse = bound is not None and bound[1] < 0
        else:
            is_worse = sign * (after - before) < -tolerance * abs(before)
        if is_worse:
            found.append(_change(metric, before, after, ""))
    return found


def _same_judge(metric: str, row: Report, old: Report) -> bool:
    """Whether both numbers come from the same judge and number of pictures."""
    return bool(row["quality_of"][metric] == old["quality_of"].get(metric))


def _change(name: str, before: float, after: float, unit: str) -> str:
    share = f", {after / before - 1:+.0%}" if before else ""
    return f"{name} {before:.4g} -> {after:.4g}{unit}{share}"
