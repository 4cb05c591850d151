"""Many pictures into a folder: batch by batch, resumed, nothing twice, memory flat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashgen.artifact.files import locked
from flashgen.artifact.store import Artifact
from flashgen.device import memory
from flashgen.errors import MachineError, UsageError
from tests import runs

COUNT = 3000


def command(artifact: Artifact, prompts: Path, out: Path) -> list[str]:
    options = ["--size", "16", "--steps", "1", "--batch", "50", "--device", "cpu", "--json"]
    return [sys.executable, "-m", "flashgen", "generate", str(artifact.path), "--prompt-file", str(prompts), "-o", str(out), *options]


def finished(artifact: Artifact, prompts: Path, out: Path) -> dict[str, Any]:
    done = subprocess.run(command(artifact, prompts, out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_three_thousand_pictures_survive_two_kills_and_need_no_more_memory_than_fifty(tiny_teacher: Artifact, tmp_path: Path) -> None:
    texts = [f"a red circle number {index}" for index in range(COUNT)]
    prompts, few, out = tmp_path / "prompts.txt", tmp_path / "few.txt", tmp_path / "out"
    prompts.write_text("\n".join(texts))
    few.write_text("\n".join(texts[:50]))
    written: dict[str, float] = {}
    for at_least in (200, 1200):
        running = subprocess.Popen(command(tiny_teacher, prompts, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("0*.png"))) < at_least:
            assert running.poll() is None
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        for path in out.glob("0*.png"):
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns  # never drawn again
    result = finished(tiny_teacher, prompts, out)
    names = sorted(path.name for path in out.iterdir() if path.name != ".lock")
    assert names == [f"{index:06d}.png" for index in range(COUNT)] + ["pictures.jsonl"]
    assert all((out / name).stat().st_mtime_ns == when for name, when in written.items()) and len(written) < COUNT
    for index in (0, 777, COUNT - 1):
        with Image.open(out / names[index]) as image:
            assert image.size == (16, 16) and image.info["prompt"] == texts[index] and int(image.info["seed"]) == index
    assert result["peak_rss_mib"] < finished(tiny_teacher, few, tmp_path / "few")["peak_rss_mib"] + 64


def test_a_folder_of_other_pictures_is_refused(tiny_student: Artifact, tmp_path: Path) -> None:
    first = runs.generate(tiny_student.path, ["a cat", "a dog"], tmp_path / "out")
    assert [path.name for path in first] == ["000000.png", "000001.png"]
    assert runs.generate(tiny_student.path, ["a cat", "a dog"], tmp_path / "out") == first
    for prompts, seed in ((["a cat", "a fox"], 0), (["a cat", "a dog"], 1), (["a cat"], 0)):
        with pytest.raises(UsageError, match="holds pictures of another artifact, or of other prompts, seeds or settings; name another"):
            runs.generate(tiny_student.path, prompts, tmp_path / "out", seed)
    (tmp_path / "out" / "pictures.jsonl").unlink()
    with pytest.raises(UsageError, match=r"holds pictures and no pictures\.jsonl"):
        runs.generate(tiny_student.path, ["a cat"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"--preview is for pictures beside a file; give --out FILE\.png"):
        runs.generate(tiny_student.path, ["a cat"], tmp_path / "new", preview=True)


def test_a_damaged_picture_is_drawn_again_and_a_second_run_is_refused(tiny_student: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = runs.generate(tiny_student.path, ["a cat", "a dog", "a fox"], out)
    before = {path: path.read_bytes() for path in files}
    os.truncate(files[0], 0)
    files[1].write_bytes(before[files[1]][:300] + b"noise" + before[files[1]][305:])
    unharmed = files[2].stat().st_mtime_ns
    with locked(out), pytest.raises(MachineError, match="another process is writing to"):
        runs.generate(tiny_student.path, ["a cat", "a dog", "a fox"], out)
    runs.generate(tiny_student.path, ["a cat", "a dog", "a fox"], out)
    assert {path: path.read_bytes() for path in files} == before and files[2].stat().st_mtime_ns == unharmed


def test_the_memory_of_a_folder_is_that_of_a_batch(tiny_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, plan = list[int](), memory.plan

    def counted(source: Artifact, name: str, count: int, batch: int, budget: float | None = None, **asked: bool) -> memory.Plan:
        planned.append(count)
        return plan(source, name, count, batch, budget, **asked)

    monkeypatch.setattr(memory, "plan", counted)
    for out, count in ((tmp_path / "out", 2), (tmp_path / "out.png", 5)):
        runs.generate(tiny_device.path, ["a cat"] * 5, out, batch=2, engine="onnxruntime", memory="4GB")
        assert planned == [count]
        planned.clear()
