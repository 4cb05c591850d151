"""GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval): its folder layout for pictures, and the scores in its result file.

The prompts are the user's copy of its evaluation_metadata.jsonl; its detector runs apart. Rows come as `stages.rows.jsonl_rows` gives them:
(place for messages, object of one line).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashgen.errors import UsageError
from flashgen.judges.base import Drawn, Judgement

Rows = Iterable[tuple[str, Mapping[str, Any]]]


def layout(metadata: Rows, prompts: Sequence[str], where: str = "prompts_file") -> tuple[list[str], list[Mapping[str, Any]]]:
    """(file, metadata) of each picture: row i of `metadata` is folder `0000i`, and its pictures are samples/0000.png, 0001.png, ...

    Raises UsageError for a row without prompt and tag, and for a prompt that no row has.
    """
    rows: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for number, (place, row) in enumerate(metadata):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "tag")):
            raise UsageError(f"{where}{place} has no 'prompt' and 'tag'; name GenEval's prompts/evaluation_metadata.jsonl")
        rows.setdefault(row["prompt"].strip(), (number, row))
    files, samples = [], dict[str, int]()
    for prompt in prompts:
        if prompt not in rows:
            raise UsageError(f"{where} has no row for the prompt {prompt!r}; draw the prompts of this file")
        samples[prompt] = samples.get(prompt, -1) + 1
        files.append(f"{rows[prompt][0]:05d}/samples/{samples[prompt]:04d}.png")
    return files, [rows[prompt][1] for prompt in prompts]


def write_pictures(folder: Path, drawn: Drawn, metadata: Rows, where: str = "prompts_file") -> list[str]:
    """Write `drawn` for `evaluate_images.py FOLDER`; returns each picture's file in `folder`. Raises UsageError as `layout` does."""
    files, rows = layout(metadata, drawn.prompts, where)
    for file, row, picture in zip(files, rows, drawn.pictures, strict=True):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(row))
        Image.fromarray(picture).save(path)
    return files


def read_results(results: Rows, files: Sequence[str], where: str = "results.jsonl") -> Judgement:
    """The judgement in the result file of `evaluate_images.py`, for the pictures that `write_pictures` wrote to `files`.

    `values` has 1 for a correct picture, else 0; scores are the share of correct pictures per task (`tag`), and `overall`, the mean over
    the tasks (summary_scores.py). Raises UsageError for a row without these fields and for a picture without a row.
    """
    verdicts: dict[str, tuple[str, float]] = {}
    for place, row in results:
        name, tag, correct = (row.get(key) for key in ("filename", "tag", "correct"))
        if not isinstance(name, str) or not isinstance(tag, str) or correct not in (0, 1):
            raise UsageError(
                f"{where}{place} has no 'filename', 'tag' and 'correct'; name the file that GenEval's evaluate_images.py wrote"
            )
        verdicts["/".join(name.replace("\\", "/").split("/")[-3:])] = tag, float(correct)
    missing = [file for file in files if file not in verdicts]
    if missing or not files:
        raise UsageError(
            f"{where} has no result for {len(missing)} of {len(files)} pictures, such as {missing[:1]}; evaluate the whole folder"
        )
    tasks: dict[str, list[float]] = {}
    for file in files:
        tag, value = verdicts[file]
        tasks.setdefault(tag, []).append(value)
    scores = {tag: float(np.mean(values)) for tag, values in tasks.items()}
    return Judgement(np.array([verdicts[file][1] for file in files]), {"overall": float(np.mean(list(scores.values()))), **scores})
