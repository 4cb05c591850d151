"""The report as Markdown, with links to the pictures beside it."""

from __future__ import annotations

import html
import re

from flashgen.report.pictures import Pictures
from flashgen.report.read import Bench
from flashgen.report.tables import Table, frontier_text, lineage, measurements, parts, reproduction, scatters, summary


def markdown(bench: Bench, shown: list[int], pictures: Pictures) -> str:
    """Text of report.md: the tables of the page, and the pictures of the prompts `shown`."""
    blocks = ["# flashgen bench", "The same with plots, zoom and a slider: [report.html](report.html); as data: [bench.json](bench.json)."]
    blocks += [block for t in [*summary(bench), *measurements(bench), *parts(bench)] for block in _table(t)]
    blocks += [f"{escape(plot['metric'])} against {plot['cost']}: {escape(frontier_text(plot))}." for plot in scatters(bench)]
    if pictures.links:
        rows = []
        for prompt in shown:
            about = bench.prompts[prompt]
            text = f"{escape(about.prompt)}<br>seed {about.seed}"
            cells = [
                f"![{escape(f'{label}: {about.prompt}')}]({pictures.links[artifact, prompt]})"
                if (artifact, prompt) in pictures.links
                else ""
                for artifact, label in enumerate(bench.labels)
            ]
            rows.append([text, *cells])
        blocks += ["## Pictures", f"{len(shown)} of {len(bench.prompts)} prompts; all pictures are in pictures/."]
        blocks += [_grid(["prompt", *map(escape, bench.labels)], rows)]
    blocks += [block for t in [*lineage(bench), *reproduction(bench)] for block in _table(t)]
    if bench.command:
        blocks += ["## Command", "\n".join(f"    {line}" for line in bench.command.splitlines())]
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """`text` as Markdown shows it letter by letter, in one line."""
    text = re.sub(r"([\\`*_{}\[\]|~$#!])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\s*[\r\n\u2028\u2029]+\s*", "<br>", text.strip())


def _table(t: Table) -> list[str]:
    rows = [list(map(escape, row)) for row in t.rows]
    return [f"## {escape(t.title)}", *([escape(t.note)] if t.note else []), _grid(list(map(escape, t.head)), rows)]


def _grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
