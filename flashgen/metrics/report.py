"""What people look at: contact sheets and the bench table."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGIN, HEAD, GUTTER = 4, 44, 92  # pixels: between pictures, for prompts above, for labels on the left


def contact_sheet(rows: list[list[NDArray[np.uint8]]], labels: list[str], path: Path, prompts: list[str]) -> None:
    """A PNG with one row a label and one column a prompt; small pictures are enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    side = max(image.shape[0] for row in rows for image in row)
    cell = side * (2 if side <= 256 else 1)
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
            scaled = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(scaled, (GUTTER + column * (cell + MARGIN), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def print_table(results: list[dict[str, Any]]) -> None:
    """The bench rows on stderr, at most 80 columns wide; composition in percent."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("artifact", max_width=22, overflow="fold")
    for name in ("engine", "steps", "MiB", "load s", "step ms", "total s", "peak MiB", "score %"):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for row in results:
        latency, score = row["latency_s"], row["quality"].get("composition", {}).get("overall")
        table.add_row(
            row["artifact"],
            {"onnxruntime": "ort"}.get(row["engine"], row["engine"]),
            str(row["steps"]),
            f"{row['size_mib']:.1f}",
            f"{latency['load']:.2f}",
            f"{1000 * latency['step_p50']:.1f}",
            f"{latency['total_p50']:.2f}",
            f"{row['peak_rss_mib']:.0f}",
            "-" if score is None else f"{100 * score:.1f}",
        )
    console = Console(stderr=True)
    console.width = min(console.width, 80)
    console.print(table)
