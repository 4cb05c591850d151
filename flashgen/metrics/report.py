"""Pages for people: contact sheets and the bench table."""

from __future__ import annotations

import io
import os.path
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.files import write_whole
from flashgen.artifact.store import VERSION
from flashgen.progress import say

SMALL_PX = 256  # pictures up to this side are shown at twice their size
MARGIN, HEAD, GUTTER = 4, 44, 92  # pixels: between pictures, for prompts above, for labels on the left


def short_names(refs: list[str]) -> list[str]:
    """`refs` without the folders that all paths share, as long as the names stay different; a world's name is no path.

    Of a single path that is its last part, with the artifact's folder where that is a version.
    """
    paths = [PurePath(ref) for ref in refs]
    folders = [path.parent for path in paths if len(path.parts) > 1]
    if len(refs) == 1:
        parts = paths[0].parts
        return [str(PurePath(*parts[-2 if VERSION.fullmatch(paths[0].name) else -1 :])) if parts else refs[0]]
    if len(folders) < 2 or len({folder.is_absolute() for folder in folders}) > 1:
        return refs
    shared = os.path.commonpath(folders)
    if shared == os.sep:
        return refs
    names = [str(path.relative_to(shared)) if len(path.parts) > 1 else str(path) for path in paths]
    return names if len(set(names)) == len(set(refs)) else refs


def contact_sheet(rows: list[list[NDArray[np.uint8]]], labels: list[str], path: Path, prompts: list[str]) -> None:
    """Write a PNG with one row per label and one column per prompt; small pictures are enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    side = max(max(image.shape[:2]) for row in rows for image in row)
    scale = 2 if side <= SMALL_PX else 1
    cell = side * scale
    font = ImageFont.load_default(10)
    sheet = Image.new("RGB", (GUTTER + len(prompts) * (cell + MARGIN), HEAD + len(rows) * (cell + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, max(12, cell // 6))[:3]
        draw.text((GUTTER + column * (cell + MARGIN), 2), "\n".join(lines), "black", font, spacing=2)
    for index, (label, row) in enumerate(zip(labels, rows, strict=True)):
        top = HEAD + index * (cell + MARGIN)
        draw.text((4, top + cell // 2 - 12), "\n".join(textwrap.wrap(label, 15)), "black", font, spacing=2)
        for column, image in enumerate(row[: len(prompts)]):
            height, width = image.shape[0] * scale, image.shape[1] * scale
            scaled = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(scaled, (GUTTER + column * (cell + MARGIN), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_whole(path, buffer.getbuffer())


def row_labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of every row, with the threads and sizes where those of one artifact differ."""
    labels = []
    for row in results:
        alike = [other for other in results if other["artifact"] == row["artifact"]]
        more = [f"{row['threads']} thr"] if len({other["threads"] for other in alike if other["engine"] == row["engine"]}) > 1 else []
        more += [row["size_px"]] if len({other["size_px"] for other in alike}) > 1 else []
        labels.append(", ".join([row["name"], *more]))
    return labels


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the bench rows on stderr, at most 80 columns wide; composition in percent, else the first score that every row has."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    judged = [name for name in results[0]["quality"] if all(isinstance(row["quality"].get(name), Mapping) for row in results)]
    metric = judged[0] if judged else "composition"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("artifact", max_width=22, overflow="fold")
    score_head = "score %" if metric == "composition" else "score"
    for head in ("engine", "steps", "MiB", "load s", "step ms", "total s", "peak MiB", score_head):
        table.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
    for label, row in zip(row_labels(results), results, strict=True):
        latency, score = row["latency_s"], row["quality"].get(metric)
        overall = score["overall"] if isinstance(score, Mapping) else None
        table.add_row(
            label,
            {"onnxruntime": "ort"}.get(row["engine"], row["engine"]),
            str(row["steps"]),
            f"{row['size_mib']:.1f}",
            f"{latency['load']:.2f}",
            f"{1000 * latency['step_p50']:.1f}",
            f"{latency['total_p50']:.2f}",
            "-" if row["peak_rss_mib"] is None else f"{row['peak_rss_mib']:.0f}",
            "-" if overall is None else f"{100 * overall:.1f}" if metric == "composition" else f"{overall:.4g}",
        )
    console = Console(stderr=True)
    console.width = min(console.width, 80)
    console.print(table)
    if metric != "composition":
        say(f"score: {metric}")
