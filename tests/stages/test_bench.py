from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from flashgen.artifact.files import locked
from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError, MachineError, NumericsError, UsageError
from flashgen.metrics.baseline import check_comparable, compare, read_baseline
from flashgen.metrics.latency import Row, median_interval, picture_seconds
from flashgen.metrics.machine import NoiseMeter
from flashgen.metrics.report import contact_sheet, print_table, short_names
from flashgen.metrics.worker import Job
from flashgen.png import read_texts
from flashgen.recipe.schema import Recipe
from flashgen.runtime.memory import PhasePeaks, peak_rss_mib
from flashgen.stages import bench as stage
from flashgen.stages.bench_files import clear_pictures, output, scratch
from flashgen.stages.bench_rows import Comparison, Grid, plan_rows
from flashgen.worlds.shapes.scene import TASKS
from tests import runs

OLD_KEYS = {"artifact", "engine", "steps", "size_mib", "latency_s", "peak_rss_mib", "quality"}


def test_bench_measures_device_and_torch_artifacts_in_the_order_asked(
    tiny_int4_device: Artifact, tiny_teacher: Artifact, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refs, out = [str(tiny_teacher.path), str(tiny_int4_device.path)], tmp_path / "out"
    report = runs.bench(refs, out, recipe, seed=3)
    results = report["results"]
    assert [r["artifact"] for r in results] == refs
    assert [r["engine"] for r in results] == ["torch", "onnxruntime"]
    assert [r["steps"] for r in results] == [3, 4]
    for row, source in zip(results, (tiny_teacher, tiny_int4_device), strict=True):
        assert set(row) > OLD_KEYS
        latency = row["latency_s"]
        assert set(latency) == {"cold", "load", "encode", "step_p50", "step_p95", "decode", "total_p50"}
        assert 0 < latency["step_p50"] <= latency["step_p95"] and latency["total_p50"] >= row["steps"] * latency["step_p50"] * 0.5
        assert latency["cold"] > latency["load"] and row["pictures_measured"] >= recipe.bench.repeats
        assert all(low <= latency[name] <= high for name, (low, high) in row["latency_interval_s"].items())
        assert set(row["quality"]["composition"]) == set(row["quality_interval"]["composition"]) == {"overall", *TASKS}
        about = {"judge": {"metric": "composition", "world": "shapes"}, "pictures": 6, "higher_is_better": True}
        assert row["quality_of"] == {"composition": about}
        assert np.mean(row["values"]["composition"]) == pytest.approx(row["quality"]["composition"]["overall"], abs=1e-4)
        assert row["size_mib"] == pytest.approx(sum(f.size for f in source.manifest.files) / 2**20, abs=1e-3)
        assert sum(row["bytes"].values()) == source.size_bytes() and row["bytes"]["transformer"] > 1000
        assert row["lineage"][0]["digest"] == source.manifest.digest
        pictures = sorted((out / row["pictures"]).iterdir())
        texts = [read_texts(file) for file in pictures]
        assert [(t["prompt"], t["seed"], t["artifact"]) for t in texts] == [
            (p["prompt"], p["seed"], source.manifest.digest) for p in report["prompts"]
        ]
    assert [p["task"] for p in report["prompts"]] == list(TASKS)
    assert [entry["stage"] for entry in results[1]["lineage"]] == ["export", "quantize", "test"]
    assert results[1]["peak_rss_mib"] < 0.6 * results[0]["peak_rss_mib"]  # no torch in the device process
    assert json.loads((out / "bench.json").read_text()) == json.loads(json.dumps(report))
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 2 * 128
    captured = capsys.readouterr()
    assert captured.out == "" and "score" in captured.err
    table = [line for line in captured.err.splitlines() if not line.startswith(("warning", "written"))]
    assert max(map(len, table)) <= 80


def test_bench_draws_exported_artifacts_with_the_engines_that_are_named(tiny_int4_device: Artifact, recipe: Recipe) -> None:
    if find_spec("openvino") is None:
        with pytest.raises(MachineError, match=r"needs openvino, .*pip install \"flashgen\[openvino\]\""):
            runs.bench([tiny_int4_device.path], None, recipe, grid=Grid(engines=["openvino"]))
        return
    rows = runs.bench([tiny_int4_device.path], None, recipe, grid=Grid(engines=["openvino", "onnxruntime"]))["results"]
    assert [row["engine"] for row in rows] == ["openvino", "onnxruntime"] and rows[0]["latency_s"]["total_p50"] > 0


def test_rows_of_other_threads_share_pictures_and_rows_of_other_sizes_do_not(
    tiny_teacher: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    grid = Grid(threads=[1, 2], sizes=["64", "96x64"], steps=[2])
    rows = runs.bench([tiny_teacher.path], tmp_path, recipe, grid=grid)["results"]
    assert [(r["size_px"], r["threads"], r["steps"]) for r in rows] == [("64x64", 1, 2), ("64x64", 2, 2), ("96x64", 1, 2), ("96x64", 2, 2)]
    assert rows[0]["pictures"] == rows[1]["pictures"] != rows[2]["pictures"] == rows[3]["pictures"]
    with Image.open(tmp_path / rows[2]["pictures"] / "0000.png") as picture:
        assert picture.size == (96, 64)
    runs.bench([tiny_teacher.path], tmp_path, recipe, grid=Grid(steps=[1]))
    assert len([*tmp_path.glob("pictures/*/*.png")]) == 6  # those of the earlier bench are gone


def test_a_size_or_number_of_steps_that_one_artifact_cannot_draw_is_left_out_and_refused_when_no_row_is_left(
    tiny_teacher: Artifact, tiny_int4_device: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(grid: Grid, *sources: Artifact) -> list[tuple[str, str, int]]:
        rows = plan_rows([str(source.path) for source in sources], sources, grid, "cpu")
        return [(row.job.engine, str(row.size), row.steps) for row in rows]

    found = planned(Grid(sizes=["64", "96"], steps=[4, 2]), tiny_teacher, tiny_int4_device)
    assert found == [("torch", "64", 4), ("torch", "64", 2), ("torch", "96", 4), ("torch", "96", 2), ("onnxruntime", "64", 4)]
    told = capsys.readouterr().err
    assert "no row for --size 96: this export draws 64 px only" in told and "no row for --steps 2" in told
    for grid, sources, message in (
        (Grid(sizes=["96"]), (tiny_teacher, tiny_int4_device), "--size 96: this export draws 64 px only"),
        (Grid(sizes=["65"]), (tiny_teacher,), "--size 65: this model draws sides that are multiples"),
        (Grid(sizes=["big"]), (tiny_teacher,), "--size: 'big' is not a picture size"),
        (Grid(steps=[3]), (tiny_int4_device,), "--steps 3"),
        (Grid(engines=["torch"]), (tiny_teacher, tiny_int4_device), "is exported, so torch cannot draw it"),
        (Grid(engines=["onnxruntime"]), (tiny_teacher,), "--engine onnxruntime draws none of the artifacts"),
        (Grid(engines=["onnxruntime", "torch"]), (tiny_int4_device,), "--engine torch draws none of the artifacts"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            planned(grid, *sources)


def test_artifacts_of_different_worlds_are_measured_on_the_recipes_prompts(
    tiny_student: Artifact, outside_student: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a boat\na dog\n")
    own = recipe.model_copy(update={"prompts_file": tmp_path / "prompts.txt"})
    with pytest.raises(UsageError, match=r"belongs to no world .*--set prompts_file=FILE.*--recipe NAME\|FILE"):
        runs.bench([tiny_student.path, outside_student.path], None, recipe)
    (row,) = runs.bench([outside_student.path], tmp_path / "out", own)["results"]
    assert row["quality"] == {"composition": "not judged"} and row["quality_of"] == {} and row["fidelity"] is None
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width < 6 * 128  # two pictures


def test_pictures_are_compared_with_those_of_the_reference(
    tiny_student: Artifact, tiny_teacher: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    refs, rows = [str(tiny_teacher.path), str(tiny_student.path)], [tiny_teacher, tiny_student]
    found = runs.bench(refs, None, recipe, comparison=Comparison(reference=refs[0]))["results"]
    assert found[0]["fidelity"] is None and found[1]["fidelity"]["reference"] == refs[0]
    assert 0 < found[1]["fidelity"]["psnr_db"]["mean"] < 40
    with pytest.raises(UsageError, match="--reference elsewhere is none of the artifacts"):
        stage.reference_rows(plan_rows(refs, rows, Grid(), "cpu"), "elsewhere")
    smaller = plan_rows(refs[:1], rows[:1], Grid(sizes=["32"]), "cpu") + plan_rows(refs[1:], rows[1:], Grid(), "cpu")
    with pytest.raises(UsageError, match="is drawn at 32 px and student/v0001 at 64: give one --size"):
        stage.reference_rows(smaller, refs[0])


def test_seconds_of_a_picture_leave_warm_up_and_the_negative_prompt_out() -> None:
    laps = {
        "load": [1.0, 2.0],
        "text_encoder": [9.0, 0.1, 7.0],  # warm-up, the picture, the negative prompt
        "text_encoder_2": [9.0, 0.2, 7.0],
        "transformer": [9.0, 9.0, 1.0, 2.0],
        "vae_decoder": [9.0, 0.5],
    }
    encode, step, decode = picture_seconds(laps, steps=2)
    assert encode == pytest.approx(0.3) and (step, decode) == ([1.0, 2.0], 0.5)
    assert picture_seconds(laps | {"decode": [9.0, 0.6], "step": [9.0, 9.0, 3.0, 4.0]}, steps=2)[1:] == ([3.0, 4.0], 0.6)


def test_intervals_of_medians_hold_the_median_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.lognormal(0, 0.3, 20)) for _ in range(300)]
    assert 0.9 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.99
    pictures = rng.normal(0, 1, (20, 1)).repeat(8, 1)  # eight steps that are alike tell no more than one
    assert median_interval(pictures) == pytest.approx(median_interval(pictures[:, 0]))


def test_a_machine_is_noisy_when_the_kernel_or_the_rows_vary() -> None:
    meter = NoiseMeter()
    meter._kernel_s = [1.0, 1.01] * 20
    assert meter.report()["noisy"] is False
    assert "median latency of student" in meter.report(["student"])["why"][0]
    meter._kernel_s = [1.0, 1.0, 1.3] * 20
    assert meter.report()["why"] == ["the time of one fixed calculation varies by 30%"]


def test_work_of_other_processes_is_counted_and_that_of_rows_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    system = iter([{"user": 10.0, "steal": 1.0}, {"user": 14.0, "steal": 1.5}])

    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def cpu_times(self) -> Any:
            return SimpleNamespace(user=clock[self.pid], system=0.0)

    clock = {os.getpid(): 1.0, 7: 2.0}
    monkeypatch.setattr("psutil.cpu_times", lambda: SimpleNamespace(**next(system)))
    monkeypatch.setattr("psutil.Process", Process)
    meter = NoiseMeter()
    with meter.watching([7]):
        clock |= {os.getpid(): 1.5, 7: 4.0}
    assert meter._others_s == pytest.approx(1.5) and meter._steal_s == pytest.approx(0.5)
    assert meter.report()["noisy"] is True  # in no time at all


def test_peak_rss_sees_memory_that_was_given_back() -> None:
    before = peak_rss_mib() or 0.0
    np.ones(int((before + 50) * 2**17))
    assert (peak_rss_mib() or 0.0) > before + 40


def test_peaks_of_phases_are_their_own_and_the_process_keeps_its_peak() -> None:
    peaks = PhasePeaks()
    if not peaks._possible:
        pytest.skip("this system cannot set the peak back")
    mib = 2**17  # numbers of 8 bytes
    with peaks.phase("large"):
        np.ones(200 * mib)
    with peaks.phase("outer"):
        with peaks.phase("inner"):
            np.ones(100 * mib)
        np.ones(10 * mib)
    assert peaks.mib["inner"] == peaks.mib["outer"] and 80 < peaks.mib["large"] - peaks.mib["outer"] < 120
    whole = peaks.process_mib()
    assert whole is not None and whole >= peaks.mib["large"] > (peak_rss_mib() or 0) + 50


@pytest.mark.skipif(not Path("/usr/bin/time").exists(), reason="GNU time is not installed")
@pytest.mark.parametrize(("fixture", "engine"), [("tiny_int4_device", "onnxruntime"), ("tiny_student", "torch")])
def test_peak_memory_equals_that_of_gnu_time(fixture: str, engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    artifact: Artifact = request.getfixturevalue(fixture)
    assert artifact.manifest.sampler is not None
    job = Job(str(artifact.path), engine, tuple(artifact.manifest.sampler.sigmas))
    row = Row(job, 0, tmp_path / "row")
    row.start("a red circle", 0)
    row.round(["a red circle"] * 2)
    row.close()
    code = f"""
import json
from pathlib import Path
from flashgen.metrics.worker import Job, Session
session = Session(Job(**json.loads(Path({str(tmp_path / "row" / "job.json")!r}).read_text())))
session.laps.memory = None  # setting the peak back would change what time sees
session.memory._possible = False
for count in (1, 2):
    session.draw(["a red circle"] * count, [0] * count, 1)
"""
    done = subprocess.run(["/usr/bin/time", "-v", sys.executable, "-c", code], capture_output=True, text=True, check=True)
    match = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    assert match and row.rounds[-1]["peak_rss_mib"] == pytest.approx(int(match[1]) / 1024, rel=0.03)
    assert set(row.rounds[-1]["peak_phase_mib"]) == {"load", "encode", "step", "decode"}


def test_a_row_whose_process_dies_says_why_and_the_others_go_on(
    tiny_int4_device: Artifact, tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Row.start

    def start_and_kill(row: Row, prompt: str, seed: int) -> None:
        start(row, prompt, seed)
        if row.job.engine == "torch":
            assert row._process
            os.kill(row._process.pid, signal.SIGKILL)
            row._process.wait()

    monkeypatch.setattr(Row, "start", start_and_kill)
    report = runs.bench([tiny_student.path, tiny_int4_device.path], tmp_path, recipe)
    assert [row["artifact"] for row in report["results"]] == [str(tiny_int4_device.path)]
    (failed,) = json.loads((tmp_path / "bench.json").read_text())["failed"]
    assert failed["engine"] == "torch" and "was killed by signal 9; out of memory?" in failed["message"]
    with pytest.raises(MachineError, match="was killed by signal 9"):
        stage.check(report)
    with pytest.raises(MachineError, match="was killed by signal 9"):
        runs.bench([tiny_student.path], None, recipe)


def test_errors_of_the_measuring_process_come_back(tiny_int4_device: Artifact, tmp_path: Path) -> None:
    for job, seed, kind, message in (
        (Job(str(tmp_path / "nowhere"), "onnxruntime", (1.0, 0.0)), 0, ArtifactError, "nowhere"),
        (Job(str(tiny_int4_device.path), "onnxruntime", (1.0, 0.0)), -1, MachineError, r"ended with code 1 \(.*Error.*\)"),
    ):
        row = Row(job, 0, tmp_path / "row")
        row.start("a red circle", seed)
        row.round(["a red circle"])
        row.close()
        assert row.error is not None and not row.rounds
        with pytest.raises(kind, match=message):
            raise row.error


def test_wrong_arguments_are_usage_errors(tiny_int4_device: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        runs.bench([], None, recipe)
    with pytest.raises(UsageError, match="--per-task 0"):
        runs.bench([tiny_int4_device.path], None, recipe, per_task=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        runs.bench([tiny_int4_device.path], tmp_path / "file", recipe)


def baseline_of(**changes: Any) -> dict[str, Any]:
    """A report of one row and eight prompts."""
    names = ("encode", "step_p50", "decode", "total_p50")
    row = {
        "name": "student", "engine": "torch", "threads": 2, "size_px": "64x64", "steps": 4, "size_mib": 10.0, "peak_rss_mib": 100.0,
        "latency_s": dict.fromkeys(names, 1.0), "latency_interval_s": {name: [0.9, 1.05] for name in names},
        "quality": {"composition": {"overall": 0.5}, "fid": {"overall": 20.0}},
        "quality_of": {"composition": {"judge": 1, "higher_is_better": True}, "fid": {"judge": 2, "higher_is_better": False}},
        "values": {"composition": [0.0, 1.0] * 8},
    }  # fmt: skip
    machine = {"cpu": "x", "cores": 2, "usable_cores": 2}
    prompts = [{"prompt": f"a{i}", "seed": i} for i in range(16)]
    return {"version": 1, "machine": machine, "prompts": prompts, "results": [row | changes]}


def test_rows_are_worse_beyond_tolerance_interval_and_chance() -> None:
    old = baseline_of()
    slow = baseline_of()["results"][0]
    slow["latency_s"]["decode"], slow["latency_interval_s"]["decode"] = 1.2, [1.06, 1.3]
    overlapping = copy.deepcopy(slow)
    overlapping["latency_interval_s"]["decode"] = [1.04, 1.3]
    judged = baseline_of()["results"][0]["quality"]
    for row, tolerance, expected in (
        (baseline_of()["results"][0], 0.0, []),
        (slow, 0.1, ["decode 1000 -> 1200 ms, +20%"]),
        (slow, 0.25, []),
        (overlapping, 0.1, []),
        (baseline_of(peak_rss_mib=111.0, size_mib=12.0)["results"][0], 0.1, ["peak_rss_mib 100 -> 111 MiB", "size_mib 10 -> 12 MiB"]),
        (baseline_of(quality=judged | {"fid": {"overall": 23.0}})["results"][0], 0.1, ["fid 20 -> 23, +15%"]),
        (baseline_of(quality=judged | {"fid": {"overall": 17.0}})["results"][0], 0.1, []),
        (baseline_of(values={"composition": [0.0] * 16})["results"][0], 0.1, ["composition"]),
        (baseline_of(values={"composition": [0.0, 0.0] + [0.0, 1.0] * 7})["results"][0], 0.1, []),  # one picture is chance
        (baseline_of(values={"composition": [1.0] * 16})["results"][0], 0.1, []),
    ):
        worse, missing = compare([row], old, tolerance)
        assert len(worse) == len(expected) and not missing, worse
        assert all(part in what for part, what in zip(expected, worse, strict=True))
    assert compare([slow | {"threads": 1}], old, 0.1) == ([], ["student (torch, 1 threads, 64x64, 4 steps)"])
    other = baseline_of()["results"][0]
    other["quality_of"]["fid"] = {"judge": 3, "higher_is_better": False}
    assert compare([other], old, 0.1) == ([], ["fid of student (torch, 2 threads, 64x64, 4 steps)"])


def test_a_baseline_that_is_cut_foreign_or_of_another_machine_is_refused(tmp_path: Path) -> None:
    file, whole = tmp_path / "bench.json", json.dumps(baseline_of())
    for text, message in (
        (whole[:-40], "is no JSON, or was cut"),
        ('{"version": 2, "results": []}', "version is 2"),
        ("[1]", "version is None"),
        ('{"version": 1, "results": [{}]}', "is no bench.json of this flashgen"),
        (json.dumps(baseline_of(latency_interval_s={"decode": "x"})), "is no bench.json of this flashgen"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_baseline(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_baseline(tmp_path / "none.json")
    file.write_text(whole)
    read = read_baseline(file)
    check_comparable(file, read, read, {"student"})
    for report, name, message in (
        (read | {"machine": read["machine"] | {"cpu": "y"}}, "student", r"another machine \(cpu x; here: cpu y\)"),
        (read | {"prompts": read["prompts"][1:]}, "student", "other prompts or seeds"),
        (read, "teacher", "has no row of teacher; it has student"),
    ):
        with pytest.raises(UsageError, match=message):
            check_comparable(file, read, report, {name})


def test_a_report_that_is_worse_is_a_numerics_error() -> None:
    worse = {"file": "b.json", "tolerance": 0.1, "worse": ["student: decode 1 -> 2 ms"], "missing": []}
    report = {"failed": [], "machine": {"noise": {"noisy": True}}, "baseline": worse}
    with pytest.raises(NumericsError, match=r"worse than b.json .*noisy.*student: decode 1 -> 2 ms"):
        stage.check(report)


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
    name, size = "artifacts/a/very/long/path/of/an/artifact@v0001", {"size_mib": 15800.0, "size_px": "1024x1024"}
    row = {"artifact": name, "name": name, "engine": "onnxruntime", "threads": 64, "steps": 28, **size}
    row |= {"latency_s": latency, "peak_rss_mib": 18000.0, "quality": {"composition": {"overall": 0.9}}}
    print_table([row, row | {"threads": 2}, row | {"size_px": "512x512"}])
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    assert "12345.6" in "".join(lines) and "90.0" in "".join(lines)


@pytest.mark.parametrize(
    ("refs", "names"),
    [
        (["shapes", "artifacts/demo/student", "artifacts/demo/slim"], ["shapes", "student", "slim"]),
        (["a/student/v0001", "a/student/v0002", "a/slim"], ["student/v0001", "student/v0002", "slim"]),
        (["shapes", "a/shapes", "a/student"], ["shapes", "a/shapes", "a/student"]),  # two of one name
        (["a/student@v0002"], ["student@v0002"]),
        (["/a/student/v0002"], ["student/v0002"]),
        (["/x/student", "y/student"], ["/x/student", "y/student"]),
        (["/x/student", "/y/slim"], ["/x/student", "/y/slim"]),
        (["x/student", "y/slim"], ["x/student", "y/slim"]),
        (["shapes", "a/student@v0002"], ["shapes", "a/student@v0002"]),
    ],
)
def test_names_leave_out_the_folders_that_all_share(refs: list[str], names: list[str]) -> None:
    assert short_names(refs) == names


STARTED = """
import sys, time
from pathlib import Path
from flashgen.metrics.latency import Row
from flashgen.metrics.worker import Job
row = Row(Job(sys.argv[1], "onnxruntime", (1.0, 0.5, 0.0)), 1, Path(sys.argv[2]))
row.start("a red circle", 0)
print(row._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("busy", [False, True])
def test_a_measuring_process_ends_with_the_bench_and_removes_its_folder(busy: bool, tiny_device: Artifact, tmp_path: Path) -> None:
    program = STARTED.replace("time.sleep(60)", 'row.draw(["a red circle"] * 4000, [0] * 4000, 8)') if busy else STARTED
    folder = tmp_path / "flashgen-bench-1" / "0"
    arguments = [sys.executable, "-c", program, str(tiny_device.path), str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        worker = int(bench.stdout.readline())
        time.sleep(0.2)
        bench.kill()
    deadline = time.monotonic() + 20
    while (psutil.pid_exists(worker) or folder.parent.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(worker) and list(tmp_path.iterdir()) == []


def test_folders_of_benches_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("killed", "running", "starting"):
        (tmp_path / f"flashgen-bench-{name}" / "0").mkdir(parents=True)
    (tmp_path / "flashgen-bench-killed" / ".lock").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".lock").touch()
    (tmp_path / "flashgen-bench-link").symlink_to(tmp_path / "elsewhere")
    with locked(tmp_path / "flashgen-bench-running"), scratch() as folder:
        names = {path.name for path in tmp_path.iterdir()} - {folder.name}
    assert names == {"flashgen-bench-running", "flashgen-bench-starting", "flashgen-bench-link", "elsewhere"} and not folder.exists()


def test_one_bench_at_a_time_writes_to_a_folder_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures" / "00-student"
    pictures.mkdir(parents=True)
    for left in (pictures / ".0000.png.7.tmp", pictures / "0000.png", tmp_path / ".bench.json.7.tmp", tmp_path / ".mine.tmp"):
        left.touch()
    with output(tmp_path, None):
        clear_pictures(tmp_path)
        with pytest.raises(MachineError, match="another process is writing"), output(tmp_path, None):
            pass
    assert list(pictures.iterdir()) == [] and (tmp_path / ".mine.tmp").exists() and not (tmp_path / ".bench.json.7.tmp").exists()
