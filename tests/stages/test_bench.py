from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError, MachineError, UsageError
from flashgen.metrics.latency import Job, measure_apart, summarise
from flashgen.metrics.report import contact_sheet, print_table, short_names
from flashgen.recipe.schema import Recipe
from flashgen.runtime.memory import peak_rss_mib
from flashgen.runtime.timing import Laps
from flashgen.worlds.shapes.scene import TASKS
from tests import runs


def test_bench_measures_device_and_torch_artifacts_in_the_order_asked(
    tiny_int4_device: Artifact, tiny_teacher: Artifact, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refs = [str(tiny_teacher.path), str(tiny_int4_device.path)]
    results = runs.bench(refs, tmp_path / "out", recipe, seed=3)["results"]
    assert [r["artifact"] for r in results] == refs
    assert [r["engine"] for r in results] == ["torch", "onnxruntime"]
    assert [r["steps"] for r in results] == [3, 4]
    for row, source in zip(results, (tiny_teacher, tiny_int4_device), strict=True):
        assert set(row) == {"artifact", "engine", "steps", "size_mib", "latency_s", "peak_rss_mib", "quality"}
        latency = row["latency_s"]
        assert set(latency) == {"load", "encode", "step_p50", "step_p95", "decode", "total_p50"}
        assert 0 < latency["step_p50"] <= latency["step_p95"] and latency["total_p50"] >= row["steps"] * latency["step_p50"] * 0.5
        assert set(row["quality"]["composition"]) == {"overall", *TASKS}
        assert row["size_mib"] == pytest.approx(sum(f.size for f in source.manifest.files) / 2**20, abs=1e-3)
    assert results[1]["peak_rss_mib"] < 0.6 * results[0]["peak_rss_mib"]  # no torch in the device process
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["results"] == results
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 2 * 128
    captured = capsys.readouterr()
    assert captured.out == "" and "score" in captured.err
    assert max(map(len, captured.err.splitlines()[:-1])) <= 80


def test_bench_draws_exported_artifacts_with_the_engine_that_is_named(tiny_int4_device: Artifact, recipe: Recipe) -> None:
    if find_spec("openvino") is None:
        with pytest.raises(MachineError, match=r"needs openvino, .*pip install \"flashgen\[openvino\]\""):
            runs.bench([tiny_int4_device.path], None, recipe, engine="openvino")
        return
    (row,) = runs.bench([tiny_int4_device.path], None, recipe, engine="openvino")["results"]
    assert row["engine"] == "openvino" and row["latency_s"]["total_p50"] > 0


def test_artifacts_of_different_worlds_are_measured_on_the_recipes_prompts(
    tiny_student: Artifact, outside_student: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a boat\na dog\n")
    own = recipe.model_copy(update={"prompts_file": tmp_path / "prompts.txt"})
    with pytest.raises(UsageError, match=r"belongs to no world .*--set prompts_file=FILE.*--recipe NAME\|FILE"):
        runs.bench([tiny_student.path, outside_student.path], None, recipe)
    (row,) = runs.bench([outside_student.path], tmp_path / "out", own)["results"]
    assert row["quality"] == {"composition": "not judged"}
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width < 6 * 128  # two pictures


def test_summary_leaves_warm_up_and_later_laps_out() -> None:
    laps = Laps()
    laps.seconds.update(
        load=[1.0, 2.0],
        text_encoder=[9.0, 0.1, 0.2, 0.3, 7.0],  # warm-up, three pictures, the negative prompt
        text_encoder_2=[9.0, 0.1, 0.1, 0.1, 7.0],
        transformer=[9.0, 9.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 50.0],
        vae_decoder=[9.0, 0.5, 0.5, 0.5, 50.0],
    )
    found = summarise(laps, steps=2, warmup=1, repeats=3)
    assert found == {
        "load": 3.0,
        "encode": pytest.approx(0.3),
        "step_p50": 1.5,
        "step_p95": 2.0,
        "decode": 0.5,
        "total_p50": pytest.approx(3.8),
    }


def test_peak_rss_sees_memory_that_was_given_back() -> None:
    before = peak_rss_mib() or 0.0
    np.ones(int((before + 50) * 2**17))
    assert (peak_rss_mib() or 0.0) > before + 40


def test_errors_of_the_measuring_process_come_back(tiny_int4_device: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        measure_apart(Job(str(tmp_path / "nowhere"), ["a"], [0], 0, 1, 1), tmp_path / "a")
    with pytest.raises(MachineError, match="ended with code 1"):
        measure_apart(Job(str(tiny_int4_device.path), ["a"], [-1], 0, 1, 1), tmp_path / "b")


def test_wrong_arguments_are_usage_errors(tiny_int4_device: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        runs.bench([], None, recipe)
    with pytest.raises(UsageError, match="--per-task 0"):
        runs.bench([tiny_int4_device.path], None, recipe, per_task=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        runs.bench([tiny_int4_device.path], tmp_path / "file", recipe)


def test_contact_sheet_has_every_picture_enlarged_without_smoothing(tmp_path: Path) -> None:
    rows = [[np.full((64, 64, 3), 60 * r + 20 * c, np.uint8) for c in range(3)] for r in range(2)]
    contact_sheet(rows, ["teacher, 28 steps", "student"], tmp_path / "deep" / "sheet.png", ["a", "b", "a long prompt " * 5])
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    for value in (20 * c + 60 * r for r in range(2) for c in range(3)):
        if value:  # text is black
            assert (pixels == value).all(-1).sum() >= 128 * 128


def test_table_fits_80_columns_when_names_are_long(capsys: pytest.CaptureFixture[str]) -> None:
    latency = {"load": 123.4, "encode": 1.0, "step_p50": 12.3456, "step_p95": 13.0, "decode": 1.0, "total_p50": 345.6}
    row = {"artifact": "artifacts/a/very/long/path/of/an/artifact@v0001", "engine": "onnxruntime", "steps": 28, "size_mib": 15800.0}
    print_table([{**row, "latency_s": latency, "peak_rss_mib": 18000.0, "quality": {"composition": {"overall": 0.9}}}])
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    assert "12345.6" in "".join(lines) and "90.0" in "".join(lines)


@pytest.mark.parametrize(
    ("refs", "names"),
    [
        (["shapes", "artifacts/demo/student", "artifacts/demo/slim"], ["shapes", "student", "slim"]),
        (["a/student/v0001", "a/student/v0002", "a/slim"], ["student/v0001", "student/v0002", "slim"]),
        (["shapes", "a/shapes", "a/student"], ["shapes", "a/shapes", "a/student"]),  # two of one name
        (["/x/student", "y/student"], ["/x/student", "y/student"]),
        (["/x/student", "/y/slim"], ["/x/student", "/y/slim"]),
        (["x/student", "y/slim"], ["x/student", "y/slim"]),
        (["shapes", "a/student@v0002"], ["shapes", "a/student@v0002"]),
    ],
)
def test_names_leave_out_the_folders_that_all_share(refs: list[str], names: list[str]) -> None:
    assert short_names(refs) == names
