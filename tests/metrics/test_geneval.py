"""GenEval's folder layout and its result file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashgen.errors import UsageError
from flashgen.judges.base import Drawn
from flashgen.judges.command import CommandJudge
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


DETECTOR = """
import argparse, json, pathlib
import numpy as np
from PIL import Image
parser = argparse.ArgumentParser()
parser.add_argument("images", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--model-path")
options = parser.parse_args()
with options.outfile.open("w") as file:
    for image in options.images.glob("*/samples/*.png"):
        metadata = json.loads((image.parent.parent / "metadata.jsonl").read_text())
        correct = bool(np.asarray(Image.open(image))[0, 0, 0] % 96 == 0)
        print(json.dumps({"filename": str(image), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct}), file=file)
"""


def test_the_documented_program_is_a_judge(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    program = page.partition("### GenEval")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "detector.py").write_text(DETECTOR)
    commands = {"/opt/geneval/venv/bin/python": sys.executable, "/opt/geneval/evaluation/evaluate_images.py": tmp_path / "detector.py"}
    for name, here in {**commands, "#!/usr/bin/env python3": f"#!{sys.executable}"}.items():
        assert name in program
        program = program.replace(name, str(here))
    (tmp_path / "geneval.py").write_text(program)
    (tmp_path / "geneval.py").chmod(0o755)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in METADATA))
    judgement = CommandJudge(f"{tmp_path / 'geneval.py'} {tmp_path / 'metadata.jsonl'}", 60.0).judge(DRAWN)
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
