"""From votes to a ranking: Elo with intervals for people and for each judge apart, the raters' consistency, votes still needed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from flashgen.arena import bradley_terry
from flashgen.arena.bradley_terry import ELO, Floats
from flashgen.arena.study import Study
from flashgen.arena.votes import JUDGE, Row, counted
from flashgen.errors import ArtifactError
from flashgen.progress import say, warn

LEVEL = 0.95
MIN_GOLD = 0.7  # share of gold pairs that a rater must get right
BASE_ELO = 1000.0  # mean of the artifacts


def analyse(
    study_folder: Path, keep_failed: bool = False, precision_elo: float = 25.0, replicates: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Rank the artifacts of a study by its votes; writes STUDY/analysis.json, prints a table on stderr and returns the analysis.

    Raters who pick the spoiled picture in more than 30 % of their gold pairs are left out unless `keep_failed`. Repeats and gold pairs
    measure raters and do not count for the ranking. `votes_needed` is for an interval of +-`precision_elo` on each difference.
    Raises ArtifactError without votes, or if no votes connect the artifacts.
    """
    study = Study(study_folder)
    rows = counted(study)
    everyone = sorted({row["rater"] for row in rows})
    raters = [describe_rater(name, [row for row in rows if row["rater"] == name]) for name in everyone if not name.startswith(JUDGE)]
    failed = {rater["rater"] for rater in raters if not rater["passed_gold"]}
    for rater in raters:
        rater["left_out"] = rater["rater"] in failed and not keep_failed
    out = {rater["rater"] for rater in raters if rater["left_out"]}
    if out and len(out) == len(raters):
        raise ArtifactError(
            f"every rater of {study_folder} failed the gold pairs ({', '.join(sorted(out))}); look at the votes, or keep failed raters"
        )
    random = np.random.default_rng(seed)
    people = [row for row in rows if not row["rater"].startswith(JUDGE) and row["rater"] not in out and row["kind"] == "pair"]
    judges = [name for name in everyone if name.startswith(JUDGE)]
    result = {
        "version": 1,
        "study": study.id,
        "question": study.settings.question,
        "level": LEVEL,
        "precision_elo": precision_elo,
        "raters": raters,
        "people": rank(study, people, precision_elo, replicates, random) if people else None,
        "judges": {name: rank(study, [row for row in rows if row["rater"] == name], precision_elo, replicates, random) for name in judges},
    }
    (study_folder / "analysis.json").write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print_tables(result)
    return result


def describe_rater(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One rater's votes: gold pairs passed, repeats answered the same way (each [number, of]), share of votes for the left picture."""
    main = {(row["item"], frozenset((row["left"], row["right"]))): _winner(row) for row in rows if row["kind"] == "pair"}
    repeats = [row for row in rows if row["kind"] == "repeat" and _key(row) in main]
    gold = [row for row in rows if row["kind"] == "gold"]
    right = sum(bool(_winner(row)) for row in gold)
    decided = [row for row in rows if row["kind"] != "gold" and row["choice"] != "tie"]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "rater": name,
        "votes": len(rows),
        "gold": [right, len(gold)],
        "passed_gold": right >= MIN_GOLD * len(gold),
        "repeats": [sum(_winner(row) == main[_key(row)] for row in repeats), len(repeats)],
        "left_share": round(sum(row["choice"] == "left" for row in decided) / len(decided), 4) if decided else None,
        "tie_share": round(sum(row["choice"] == "tie" for row in rows) / len(rows), 4),
        "median_seconds": round(float(np.median(seconds)), 2) if seconds else None,
    }


def rank(study: Study, rows: Sequence[Row], precision_elo: float, replicates: int, random: np.random.Generator) -> dict[str, Any]:
    """Elo per artifact and per difference with intervals, from votes on main comparisons. Raises ArtifactError if no votes connect them."""
    names = study.artifacts
    by_rater = group(rows, [row["rater"] for row in rows], names)
    by_prompt = group(rows, [study.prompts[row["item"]] for row in rows], names)
    counts = by_rater.sum(0)
    connected, parts = bradley_terry.is_connected(counts)
    if not connected:
        sets = " and ".join("{" + ", ".join(names[i] for i in part) + "}" for part in parts)
        raise ArtifactError(
            f"no vote compares an artifact of {sets} with one of another set, so they have no common scale; collect more votes"
        )
    result = bradley_terry.fit(counts)
    clusters = [groups for groups in (by_rater, by_prompt) if len(groups) > 1]
    spread = bradley_terry.covariance(counts, clusters, replicates, random)
    freedom = min((len(groups) for groups in clusters), default=int(counts.sum())) - 1
    notes = []
    if bool(result.is_regularised):
        notes.append("an artifact won or lost everything: its Elo is finite only through a normal prior (standard deviation 521 Elo)")
    if len(by_rater) == 1:
        notes.append("one rater: intervals hold for this rater, not for others")
    if len(by_prompt) == 1:
        notes.append("one prompt: intervals hold for this prompt, not for others")
    width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * ELO if freedom > 0 else math.inf
    elos = ELO * result.theta
    ranking = []
    for i in np.argsort(-elos, kind="stable"):
        tally = _tally(counts[i, :, 0], counts[:, i, 0], counts[i, :, 1] + counts[:, i, 1])
        ranking.append({"artifact": names[i], **_estimate(BASE_ELO + elos[i], width * math.sqrt(max(0.0, spread[i, i]))), **tally})
    differences = []
    for a, b in study.pairs:
        half = width * math.sqrt(max(0.0, spread[a, a] + spread[b, b] - 2 * spread[a, b]))
        needed = math.ceil(counts.sum() * max(0.0, (half / precision_elo) ** 2 - 1)) if math.isfinite(half) else None
        tally = _tally(counts[a, b, 0], counts[b, a, 0], counts[a, b, 1] + counts[b, a, 1])
        differences.append({"a": names[a], "b": names[b], **_estimate(elos[a] - elos[b], half), **tally, "votes_needed": needed})
    return {
        "votes": len(rows),
        "raters": len(by_rater),
        "prompts": len(by_prompt),
        "ties": int(counts[..., 1].sum()),
        "tie_parameter": round(float(result.nu), 6),
        "elo": ranking,
        "differences": differences,
        "notes": notes,
    }


def group(rows: Sequence[Row], labels: Sequence[str], names: Sequence[str]) -> Floats:
    """Counts [G, K, K, 2] of `bradley_terry` per group of votes with one label."""
    number = {name: i for i, name in enumerate(names)}
    groups = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    counts = np.zeros((len(groups), len(names), len(names), 2))
    for row, label in zip(rows, labels, strict=True):
        left, right = number[row["left"]], number[row["right"]]
        if row["choice"] == "tie":
            counts[groups[label], min(left, right), max(left, right), 1] += 1
        else:
            winner, loser = (left, right) if row["choice"] == "left" else (right, left)
            counts[groups[label], winner, loser, 0] += 1
    return counts


def print_tables(result: dict[str, Any]) -> None:
    """Print the rankings and the raters on stderr."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True)
    parties = {"people": result["people"], **result["judges"]}
    for who, ranking in parties.items():
        if ranking is None:
            continue
        title = f"{escape(who)}: {ranking['votes']} votes, {ranking['raters']} raters, {ranking['prompts']} prompts"
        table = Table("artifact", title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for head in ("Elo", "95 % interval", "won", "lost", "tied"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in ranking["elo"]:
            table.add_row(escape(row["artifact"]), f"{row['elo']:.0f}", _range(row), str(row["won"]), str(row["lost"]), str(row["tied"]))
        console.print(table)
        for row in ranking["differences"]:
            votes = row["votes_needed"]
            more = "enough votes" if votes == 0 else f"{'unknown' if votes is None else votes} more votes"
            line = f"{row['a']} - {row['b']}: {row['elo']:+.0f} Elo {_range(row)}; for +-{result['precision_elo']:.0f} Elo: {more}"
            console.print(line, markup=False, highlight=False)
        for note in ranking["notes"]:
            warn(f"{who}: {note}")
    if result["raters"]:
        same, asked = (sum(rater["repeats"][i] for rater in result["raters"]) for i in (0, 1))
        say(f"raters: {len(result['raters'])}; repeats answered the same way: {same} of {asked}")
    for rater in result["raters"]:
        if not rater["passed_gold"]:
            fate = "left out" if rater["left_out"] else "counted all the same"
            warn(f"{rater['rater']} got {rater['gold'][0]} of {rater['gold'][1]} gold pairs right and is {fate}")


def _range(row: dict[str, Any]) -> str:
    return "unknown" if row["interval"] is None else "[{:.0f}, {:.0f}]".format(*row["interval"])


def _estimate(elo: float, half: float) -> dict[str, Any]:
    interval = [round(float(elo - half), 2), round(float(elo + half), 2)] if math.isfinite(half) else None
    return {"elo": round(float(elo), 2), "interval": interval}


def _tally(won: Floats, lost: Floats, tied: Floats) -> dict[str, int]:
    return {"won": int(np.sum(won)), "lost": int(np.sum(lost)), "tied": int(np.sum(tied))}


def _key(row: Row) -> tuple[int, frozenset[str | None]]:
    return row["item"], frozenset((row["left"], row["right"]))


def _winner(row: Row) -> str | None:
    """Name of the preferred artifact; empty for a tie, None for the spoiled picture."""
    return "" if row["choice"] == "tie" else row[row["choice"]]
