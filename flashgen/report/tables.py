"""The numbers of a bench as tables of text, which the page and the Markdown file share, and as data for plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashgen.report.read import Bench, Interval, Numbers, Result

DIGITS = 3  # significant digits of a number
DIGEST = 16  # characters of a digest


@dataclass(frozen=True)
class Table:
    """Text by row and column; a line break in a cell stands between a number and its interval."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def by_artifact(self) -> bool:
        """Whether each row belongs to one artifact, in the bench's order."""
        return self.head[0] == "artifact"


def table(title: str, first: str, rows: Sequence[tuple[str, Mapping[str, str]]], note: str = "") -> list[Table]:
    """A table of rows (name, cells by column) in a list, which is empty where no row has a cell; columns without text are left out."""
    columns = [c for c in dict.fromkeys(c for _, cells in rows for c in cells) if any(cells.get(c) for _, cells in rows)]
    if not columns:
        return []
    return [Table(title, [first, *columns], [[name, *(cells.get(c, "") for c in columns)] for name, cells in rows], note)]


def number(value: float | None, like: float | None = None, interval: Interval = None) -> str:
    """`value` with three significant digits, or with as many decimals as `like` would have; its interval in a second line."""
    if value is None:
        return ""
    like = value if like is None else like
    text = str(value)
    if math.isfinite(value):
        size = math.floor(math.log10(abs(like))) if like and math.isfinite(like) else 0
        text = f"{value:.{min(max(DIGITS - 1 - size, 0), 9)}f}"
    if interval is None:
        return text
    return f"{text}\n[{number(interval[0], like)}, {number(interval[1], like)}]"


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """(name, text) of every leaf of `value`, which is anything that JSON holds."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        value = ", ".join(text for inner in value for _, text in flat(inner))
    return [] if value is None else [(name, f"{value:.6g}" if isinstance(value, float) else str(value))]


def columns(values: Numbers, intervals: Mapping[str, Interval] | None = None, scale: float = 1) -> dict[str, str]:
    """Cells of numbers by name."""
    return {
        name.replace("_", " "): number(None if value is None else value / scale, interval=(intervals or {}).get(name))
        for name, value in values.items()
    }


def summary(bench: Bench) -> list[Table]:
    """One row per artifact: what it is, size, latency, memory, and every score."""

    def cells(result: Result) -> dict[str, str]:
        texts = {"engine": result.engine, "steps": result.steps}
        circumstances = {"device": result.device, "threads": result.threads, "px": result.size_px}
        total = number(result.latency_s.get("total_p50"), interval=result.latency_interval_s.get("total_p50"))
        row = {name: str(text) for name, text in texts.items() if text is not None}
        row |= {"MiB": number(result.size_mib), "total s": total, "peak MiB": number(result.peak_rss_mib)}
        for metric in bench.metrics:
            told = result.quality.get(metric)
            score = told if isinstance(told, str) else number(result.scores(metric).get("overall"), interval=result.interval(metric))
            row[metric + {True: " ↑", False: " ↓", None: ""}[bench.higher_is_better(metric)]] = score
        return row | {name: str(text) for name, text in circumstances.items() if text is not None}

    rows = [(label, cells(result)) for label, result in zip(bench.labels, bench.results, strict=True)]
    note = "Total is the median time of one picture. ↑ more is better, ↓ less is better; 95 % intervals are in brackets."
    if (noise := bench.machine.get("noise")) and isinstance(noise, dict) and noise.get("noisy") is True:
        note += " The machine was too noisy for exact latencies, see Machine."
    return table("Summary", "artifact", rows, note)


def measurements(bench: Bench) -> list[Table]:
    """Latency by phase, memory by phase, bytes by component, and fidelity to a reference, one row per artifact each."""
    pairs = list(zip(bench.labels, bench.results, strict=True))
    latency = [(label, columns(r.latency_s, r.latency_interval_s)) for label, r in pairs]
    fidelity = []
    for label, result in pairs:
        parts = result.fidelity or {}
        cells = {k: v if isinstance(v, str) else number(v.mean, interval=v.interval) for k, v in parts.items() if v is not None}
        fidelity.append((label, {name.replace("_", " "): text for name, text in cells.items()}))
    return [
        *table("Latency, seconds", "artifact", latency),
        *table("Peak memory by phase, MiB", "artifact", [(label, columns(r.peak_phase_mib)) for label, r in pairs]),
        *table("Size by component, MiB", "artifact", [(label, columns(r.bytes, scale=2**20)) for label, r in pairs]),
        *table("Fidelity to a reference", "artifact", fidelity, "Pictures with the same prompt and seed are compared."),
    ]


def parts(bench: Bench) -> list[Table]:
    """The parts of every score that has some, such as tasks: one table per metric."""
    tables = []
    for metric in bench.metrics:
        rows = [
            (label, columns(r.scores(metric), r.quality_interval.get(metric))) for label, r in zip(bench.labels, bench.results, strict=True)
        ]
        tables += [t for t in table(f"{metric} by task", "artifact", rows) if len(t.head) > 2]
    return tables


def lineage(bench: Bench) -> list[Table]:
    """The version of each artifact and those that it was made from: one table per artifact."""
    tables = []
    for label, result in zip(bench.labels, bench.results, strict=True):
        rows = []
        for ancestor in result.lineage:
            texts = ancestor.model_dump(exclude={"stage"}) | {"digest": (ancestor.digest or "")[:DIGEST] or None}
            rows.append((ancestor.stage or "unknown", {name: str(text) for name, text in texts.items() if text is not None}))
        note = f"Given as {result.artifact}. The newest version is first; bench.json has whole digests."
        tables += table(f"Lineage of {label}", "stage", rows, note)
    return tables


def reproduction(bench: Bench) -> list[Table]:
    """Where the scores come from, the settings with the seeds, and the machine with its versions."""
    judges = []
    for metric in bench.metrics:
        origin = next((r.quality_of[metric] for r in bench.results if metric in r.quality_of), None)
        if origin is not None:
            identity = "; ".join(f"{name} {text}".strip() for name, text in flat(origin.judge))
            better = "more" if origin.higher_is_better else "less"
            judges.append((metric, {"judge": identity, "pictures": str(origin.pictures or ""), "better": better}))
    seeds = [prompt.seed for prompt in bench.prompts]
    settings = [(name, {"value": text}) for name, text in flat(bench.settings)]
    if seeds:
        first = seeds[0]
        follow = seeds == list(range(first, first + len(seeds)))
        text = f"{first} to {seeds[-1]}, one per prompt" if follow and len(seeds) > 1 else ", ".join(map(str, dict.fromkeys(seeds)))
        settings = [("prompts", {"value": str(len(seeds))}), ("seeds of noise", {"value": text}), *settings]
    return [
        *table("Judges", "metric", judges),
        *table("Settings", "setting", settings),
        *table("Machine", "what", [(name, {"value": text}) for name, text in flat(bench.machine)]),
    ]


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, quality) that no other reaches at the same cost or less, in the order of cost; more quality is better."""
    best, indices = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            indices.append(index)
    return indices


def scatters(bench: Bench) -> list[dict[str, Any]]:
    """Per metric, quality against latency and against size: {metric, cost, up, points, frontier}; JSON without NaN."""
    plots = []
    for metric in bench.metrics:
        up = bench.higher_is_better(metric) is not False
        for cost in ("seconds per picture", "MiB"):
            points: list[dict[str, Any]] = []
            for letter, result in zip(bench.letters, bench.results, strict=True):
                seconds = cost == "seconds per picture"
                x = result.latency_s.get("total_p50") if seconds else result.size_mib
                y = result.scores(metric).get("overall")
                if x is None or y is None or not math.isfinite(x) or not math.isfinite(y):
                    continue
                x_interval = finite(result.latency_interval_s.get("total_p50")) if seconds else None
                y_interval = finite(result.interval(metric))
                points.append({"letter": letter, "name": result.name, "x": x, "y": y, "xs": x_interval, "ys": y_interval})
            if points:
                best = frontier([(p["x"], p["y"] if up else -p["y"]) for p in points])
                plots.append({"metric": metric, "cost": cost, "up": up, "points": points, "frontier": best})
    return plots


def frontier_text(plot: dict[str, Any]) -> str:
    """Names on the frontier of one of the `scatters`."""
    names = ", ".join(f"{plot['points'][i]['letter']} {plot['points'][i]['name']}" for i in plot["frontier"])
    return f"the frontier, where no artifact is better at the same cost or less: {names}"


def bars(bench: Bench) -> list[dict[str, Any]]:
    """Per metric with parts, a bar per part and artifact: {metric, up, parts, bars}; JSON without NaN."""
    plots = []
    for metric in bench.metrics:
        rows = [
            {"letter": letter, "name": r.name, "part": part.replace("_", " "), "x": x, "xs": finite(r.interval(metric, part))}
            for letter, r in zip(bench.letters, bench.results, strict=True)
            for part, x in r.scores(metric).items()
            if x is not None and math.isfinite(x)
        ]
        names = list(dict.fromkeys(row["part"] for row in rows))
        if len(names) > 1:
            plots.append({"metric": metric, "up": bench.higher_is_better(metric) is not False, "parts": names, "bars": rows})
    return plots


def finite(interval: Interval) -> Interval:
    """`interval`, or None where an end is not finite."""
    return interval if interval is not None and all(map(math.isfinite, interval)) else None
