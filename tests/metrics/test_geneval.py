"""GenEval's folder layout and its result file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashgen.errors import UsageError
from flashgen.judges.base import Drawn
from flashgen.metrics.geneval import read_results, write_pictures

PROMPTS = ["a photo of a bench", "a photo of two clocks", "a photo of a cow"]
TAGS = ["single_object", "counting", "single_object"]
METADATA = [
    ("", {"tag": tag, "include": [{"class": "x", "count": 1}], "prompt": prompt}) for tag, prompt in zip(TAGS, PROMPTS, strict=True)
]
ORDER = [2, 0, 0, 1]  # prompts of the pictures
DRAWN = Drawn(np.arange(4 * 4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 4, 3), [PROMPTS[i] for i in ORDER], [0, 0, 1, 0])


def evaluated(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows as evaluate_images.py writes them; a picture is correct if its first pixel is even."""
    rows = []
    for sub in sorted(folder.iterdir(), reverse=True):
        assert sub.name.isdigit()
        metadata = json.loads((sub / "metadata.jsonl").read_text())
        for image in (sub / "samples").iterdir():
            assert re.match(r"\d+\.png", image.name)
            correct = bool(np.asarray(Image.open(image))[0, 0, 0] % 96 == 0)
            rows.append(("", {"filename": str(image), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct}))
    return rows


def test_pictures_are_laid_out_as_geneval_reads_them_and_scores_come_back_in_their_order(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, DRAWN, METADATA)
    assert files == ["00002/samples/0000.png", "00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png"]
    for file, picture in zip(files, DRAWN.pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / file)), picture)
    assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == METADATA[1][1]
    judgement = read_results(evaluated(tmp_path), files)
    assert judgement.values is not None and judgement.values.tolist() == [1, 0, 1, 0]
    assert judgement.scores == {"overall": pytest.approx(1 / 3), "single_object": pytest.approx(2 / 3), "counting": 0}


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"set\.jsonl, line 2 has no 'prompt' and 'tag'; name GenEval's"):
        write_pictures(tmp_path, DRAWN, [METADATA[0], (", line 2", {"prompt": "a cat"})], "set.jsonl")
    with pytest.raises(UsageError, match="has no row for the prompt 'a photo of a cow'"):
        write_pictures(tmp_path, DRAWN, METADATA[:2])
    files = write_pictures(tmp_path, DRAWN, METADATA)
    with pytest.raises(UsageError, match=r"r\.jsonl, line 1 has no 'filename', 'tag' and 'correct'"):
        read_results([(", line 1", {"filename": "x", "tag": "y"})], files, "r.jsonl")
    with pytest.raises(UsageError, match=r"has no result for 1 of 4 pictures, such as \['00001/samples/0000\.png'\]"):
        read_results([row for row in evaluated(tmp_path) if "00001" not in row[1]["filename"]], files)
