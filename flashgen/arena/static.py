"""The page of one rater as one HTML file that needs no server, and the way back of its votes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from flashgen.arena.server import PAGE, page_html
from flashgen.arena.study import Study
from flashgen.arena.votes import NameTakenError, Row, Votes, opened, read
from flashgen.errors import ArtifactError, UsageError
from flashgen.progress import say, warn

LARGE_BYTES = 100 << 20


def export(study_folder: Path, file: Path) -> Path:
    """Write the page of the next free place in the plan as one self-contained HTML `file`; returns `file`.

    Every export takes another place, so give each rater a file of their own. Raises UsageError if `file` exists or cannot be written.
    """
    study = Study(study_folder)
    if file.exists():
        raise UsageError(f"{file} exists, and a page that was handed out must not change; name another file")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{file}: its folder does not exist; make it, or name another file")
    with opened(study) as votes:
        slot = votes.take_slot()
    data = study.page_data(slot)
    names = sorted({c[side] for c in data["comparisons"] for side in ("left", "right")})
    data["pictures"] = {name: f"data:image/png;base64,{base64.b64encode(study.picture_file(name).read_bytes()).decode()}" for name in names}
    island = json.dumps(data).replace("<", "\\u003c")  # so that no prompt ends the element
    style, script = ((PAGE / name).read_text() for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = page_html(study)
    for old, new in (
        ("<!-- policy -->", f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        ('<link rel="stylesheet" href="page.css">', f"<style>{style}</style>"),
        ('<script type="application/json" id="study"></script>', f'<script type="application/json" id="study">{island}</script>'),
        ('<script src="page.js" defer></script>', f"<script>{script}</script>"),
    ):
        assert page.count(old) == 1, old
        page = page.replace(old, new)
    file.write_text(page)
    if len(page) > LARGE_BYTES:
        warn(f"{file} has {len(page) >> 20} MiB, much for a browser; build a study with fewer comparisons (per_rater)")
    say(f"written: {file}, for one rater ({len(data['comparisons'])} comparisons); the page saves a file of votes, which comes back here")
    return file


def collect(study_folder: Path, files: Sequence[Path]) -> int:
    """Add the votes that exported pages saved in `files` to a study; returns the number of new votes.

    The same file again adds nothing. A cut file loses its last line only. Two raters of one name are told apart by a number. Raises
    ArtifactError for files that are no votes of this study; then nothing of that file is added.
    """
    study, new = Study(study_folder), 0
    with opened(study) as votes:
        for file in files:
            try:
                rows = read(file)
            except OSError as error:
                raise ArtifactError(f"{file} cannot be read ({error.strerror}); name a file of votes that a page saved") from error
            added = _add(study, votes, file, rows)
            say(f"{file}: {added} new votes")
            new += added
    return new


def _add(study: Study, votes: Votes, file: Path, rows: Sequence[Row]) -> int:
    try:
        head = rows[0]
        if head["study"] != study.id:
            raise ArtifactError(f"{file} has votes of another study ({head['study']}); collect the file into that one")
        plan = {c.id: c for c in study.plan(slot)} if 0 <= (slot := int(head["slot"])) < votes.slots else {}
        given = [(plan[row["comparison"]], str(row["choice"]), float(row["seconds"]), str(row["time"])) for row in rows[1:]]
        name, token = str(head["rater"]), str(head["token"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} is no file of votes of {study.folder} ({error!r}); save it again on the page and collect that"
        ) from error
    rater = None
    for number in range(1, 1000):
        try:
            rater = votes.join(name if number == 1 else f"{name[:50]} ({number})", token, slot)
            break
        except NameTakenError:
            continue
    assert rater is not None, "a thousand raters of one name"
    if rater.name != " ".join(name.split()):
        warn(f"{file}: another rater is called {name}; this one is now called {rater.name}")
    return sum(votes.vote(rater.name, comparison, choice, seconds, time) for comparison, choice, seconds, time in given)


def _hash(text: str) -> str:
    """Source expression of an inline element in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
