"""The report as one HTML file: tables and pictures for every browser, plots, zoom and slider for those that run scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import flashgen
from flashgen.report.pictures import Pictures
from flashgen.report.read import Bench
from flashgen.report.tables import Table, bars, flat, frontier_text, lineage, measurements, parts, reproduction, scatters, summary

FOLDER = Path(__file__).parent
LIBRARIES = ("d3", "plot")
KEYS = 10  # colours of artifacts in page.css; the letters tell more artifacts apart
NUMBER = re.compile(r"-?[\d.]+(\n\[.*\])?|inf|nan|")


def page(bench: Bench, shown: list[int], pictures: Pictures) -> str:
    """Text of report.html, with the pictures of the prompts `shown`."""
    scattered, barred = scatters(bench), bars(bench)
    sections = {
        "Summary": "".join(_table(t, "Summary") for t in summary(bench)),
        "Quality against cost": _scatters(bench, scattered),
        "Tasks": _bars(bench, barred) + "".join(_table(t) for t in parts(bench)),
        "Pictures": _swipe(bench, shown, pictures) + _gallery(bench, shown, pictures),
        "Measurements": "".join(_table(t) for t in measurements(bench)),
        "Lineage": "".join(_table(t) for t in lineage(bench)),
        "How to reproduce": _command(bench) + "".join(_table(t) for t in reproduction(bench)),
    }
    sections = {title: content for title, content in sections.items() if content}
    ids = {title: title.lower().replace(" ", "-") for title in sections}
    codes = [(FOLDER / "vendor" / f"{name}.min.js").read_text(encoding="utf-8") for name in LIBRARIES]
    codes.append((FOLDER / "page.js").read_text(encoding="utf-8"))
    names = ", ".join(dict.fromkeys(result.name for result in bench.results))
    machine = dict(flat(bench.machine))
    machine["cores"] = f"{machine['cores']} cores" if "cores" in machine else ""
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        hashes=" ".join(f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in codes),
        title=escape(f"flashgen bench: {names}"),
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        heading=escape(names),
        machine=escape(" · ".join(text for name in ("cpu", "cores", "system") if (text := machine.get(name)))),
        command=_command(bench),
        nav="".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections),
        sections="\n".join(f'<section id="{ids[title]}"><h2>{title}</h2>\n{content}</section>' for title, content in sections.items()),
        version=flashgen.__version__,
        licences=escape("\n".join((FOLDER / "vendor" / f"{name}.LICENSE").read_text(encoding="utf-8") for name in LIBRARIES)),
        data=island({"scatters": scattered, "bars": barred, "letters": bench.letters}),
        scripts="\n".join(f"<script>{code}</script>" for code in codes),
    )


def island(data: Any) -> str:
    """`data` as JSON that can stand inside a script element: no text in it ends the element or begins a comment."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _command(bench: Bench) -> str:
    return f'<pre class="command" tabindex="0" aria-label="Command"><code>{escape(bench.command)}</code></pre>' if bench.command else ""


def _key(artifact: int, label: str) -> str:
    """The coloured letter of an artifact, and its name."""
    letter, _, name = label.partition(" ")
    return f'<b class="key" style="--key:var(--key{artifact % KEYS})">{letter}</b> {escape(name)}'


def _keys(bench: Bench) -> str:
    return f'<p class="keys">{"".join(f"<span>{_key(i, label)}</span>" for i, label in enumerate(bench.labels))}</p>'


def _table(t: Table, under: str = "") -> str:
    """`t` as HTML; its title is shown unless the heading `under` says the same."""
    numeric = [" class=number" * all(NUMBER.fullmatch(row[column]) for row in t.rows) for column in range(len(t.head))]
    head = "".join(f'<th scope="col"{number}>{escape(name)}</th>' for name, number in zip(t.head, numeric, strict=True))
    rows = []
    for index, row in enumerate(t.rows):
        first = _key(index, row[0]) if t.by_artifact else escape(row[0])
        cells = [f'<th scope="row">{first}</th>']
        for column, text in enumerate(row[1:], 1):
            value, _, interval = text.partition("\n")
            small = f"<small>{escape(interval)}</small>" if interval else ""
            cells.append(f"<td{numeric[column]}>{escape(value)}{small}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = escape(t.title)
    note = f'<p class="soft">{escape(t.note)}</p>' if t.note else ""
    return (
        f'{"" if t.title == under else f"<h3>{title}</h3>"}{note}<div class="scroll" role="region" aria-label="{title}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _plot(kind: str, index: int, title: str, caption: str) -> str:
    return (
        f'<figure class="plot" data-kind="{kind}" data-index="{index}"><h3>{escape(title)}</h3>'
        f'<div role="img" aria-label="{escape(title)}; the tables have the numbers"><noscript>Plots need JavaScript; the tables have the '
        f"numbers.</noscript></div><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _scatters(bench: Bench, plots: list[dict[str, Any]]) -> str:
    figures = [_plot("scatters", i, f"{p['metric']} against {p['cost']}", f"Dashed: {frontier_text(p)}.") for i, p in enumerate(plots)]
    return f'{_keys(bench)}<div class="plots">{"".join(figures)}</div>' if figures else ""


def _bars(bench: Bench, plots: list[dict[str, Any]]) -> str:
    figures = [
        _plot("bars", i, p["metric"], f"{'More' if p['up'] else 'Less'} is better. Thin lines are intervals.") for i, p in enumerate(plots)
    ]
    return f'{_keys(bench)}<div class="plots">{"".join(figures)}</div>' if figures else ""


def _swipe(bench: Bench, shown: list[int], pictures: Pictures) -> str:
    """The slider over two pictures; the script shows it and takes the pictures from the gallery."""
    if len(bench.results) < 2 or not pictures.sources:
        return ""
    artifacts = [f'<option value="{i}">{escape(label)}</option>' for i, label in enumerate(bench.labels)]
    prompts = "".join(f'<option value="{i}">{i}: {escape(bench.prompts[i].prompt)}</option>' for i in shown)
    return (
        '<div id="swipe" hidden><h3>Two artifacts, one prompt and seed</h3><div class="choices">'
        f'<label>Left <select name="left">{"".join(artifacts)}</select></label>'
        f'<label>Right <select name="right">{"".join(artifacts)}</select></label>'
        f'<label>Prompt <select name="prompt">{prompts}</select></label></div>'
        '<div class="stage"><img class="right" alt=""><img class="left" alt=""><span class="line"></span>'
        '<b class="left tag key"></b><b class="right tag key"></b></div>'
        '<label class="cut">Drag over the picture or move this <input type="range" min="0" max="100" value="50" step="1"></label></div>'
    )


def _gallery(bench: Bench, shown: list[int], pictures: Pictures) -> str:
    """Each prompt with the pictures of all artifacts; every picture is a link to its original."""
    if not pictures.sources:
        return ""
    blocks = []
    for prompt in shown:
        about = bench.prompts[prompt]
        figures = [_picture(bench, pictures, artifact, prompt) for artifact in range(len(bench.results))]
        task = f"{escape(about.task)} · " if about.task else ""
        blocks.append(
            f'<section class="row"><h4>{escape(about.prompt)}</h4><p class="soft">{task}seed {about.seed}</p>'
            f'<div class="pictures">{"".join(figures)}</div></section>'
        )
    count = f"{len(shown)} of {len(bench.prompts)} prompts" if len(shown) < len(bench.prompts) else f"All {len(shown)} prompts"
    note = f"{count}, pictures {pictures.format}; the originals are in pictures/. "
    note += "A picture opens in full size; there, the arrow keys lead to other artifacts and prompts."
    return f'<h3>All artifacts side by side</h3><p class="soft">{note}</p>{_keys(bench)}<div id="gallery">{"".join(blocks)}</div>'


def _picture(bench: Bench, pictures: Pictures, artifact: int, prompt: int) -> str:
    result, label = bench.results[artifact], bench.labels[artifact]
    values = [f"{m} {v[prompt]:.3g}" for m, v in result.values.items() if prompt < len(v) and v[prompt] is not None]
    caption = f"{_key(artifact, label)}<small>{escape(', '.join(values))}</small>"
    key = artifact, prompt
    if key not in pictures.sources:
        return f'<figure><div class="missing">no picture</div><figcaption>{caption}</figcaption></figure>'
    width, height = pictures.sides[key]
    alt = escape(f"{label}: {bench.prompts[prompt].prompt}")
    small = " class=small" if max(width, height) <= 256 else ""
    return (
        f'<figure><a href="{escape(pictures.links[key])}" data-artifact="{artifact}" data-prompt="{prompt}">'
        f'<img{small} loading="lazy" decoding="async" width="{width}" height="{height}" alt="{alt}" src="{pictures.sources[key]}"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
