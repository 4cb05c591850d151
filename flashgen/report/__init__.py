"""The report of `flashgen bench`: OUT/bench.json and OUT/pictures as one HTML file and as Markdown, for people to read."""

from __future__ import annotations

from pathlib import Path


def write_report(out: Path) -> None:
    """Write report.html and report.md into `out`, from bench.json and the pictures there.

    Optional parts that bench.json does not have are left out. Raises ArtifactError for a bench.json or a picture that is missing, cut or
    foreign.
    """
    from flashgen.artifact.files import write_whole
    from flashgen.report.markdown import markdown
    from flashgen.report.page import page
    from flashgen.report.pictures import choose, embed
    from flashgen.report.read import read_bench

    bench = read_bench(out)
    shown = choose(bench)
    pictures = embed(out, bench, shown)
    write_whole(out / "report.html", page(bench, shown, pictures).encode())
    write_whole(out / "report.md", markdown(bench, shown, pictures).encode())
