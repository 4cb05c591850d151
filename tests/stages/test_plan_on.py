"""`--plan --on`: plans for machines that are not this one, at SD3.5-Medium's real shapes, and micro-batches found by plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.models.footprint import Footprint
from flashgen.recipe.load import load
from flashgen.runtime.machines import ACCELERATORS, BY_MEMORY, DRIVER, PEAK_SHARE, PEAK_TFLOPS, Machine, bf16_peak, machine_named
from flashgen.stages import base
from flashgen.stages.base import Stage, prepare
from flashgen.stages.describe import describe
from flashgen.stages.distill import Distill
from flashgen.stages.planning import ROOM
from tests import runs
from tests.cli.command import flashgen, refused
from tests.stages.chain import Chain, micro
from tests.stages.sparse import sparse_teacher

DENSE, LORA = "sd35-medium", "sd35-medium-lora"


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """SD3.5-Medium's shapes, without weights, and a file of prompts beside it."""
    teacher = sparse_teacher(tmp_path_factory.mktemp("medium") / "teacher")
    prompts_of(teacher).write_text("".join(f"prompt {i}\n" for i in range(20)))
    return teacher


def prompts_of(teacher: Artifact) -> Path:
    return teacher.path.parents[1] / "prompts.txt"


def prepared(teacher: Artifact, recipe: str, on: str, *settings: str) -> Stage:
    choice = load(recipe, [f"prompts_file={prompts_of(teacher)}", *settings])
    return prepare(Distill, {"teacher": teacher.path}, choice, on=machine_named(on))


def planned(teacher: Artifact, recipe: str, on: str, *settings: str) -> dict[str, Any]:
    return describe(prepared(teacher, recipe, on, *settings), Path("out"))


@pytest.mark.parametrize(
    ("text", "processes", "gigabytes", "like"),
    [
        ("24GB", 1, 24, "rtx3090"),
        ("8x80GB", 8, 80, "a100"),
        ("RTX4090", 1, 24, "rtx4090"),
        ("8xh100", 8, 80, "h100"),
        ("64GB", 1, 64, "l40s"),
    ],
)
def test_machines_are_read_by_name_and_by_memory(text: str, processes: int, gigabytes: int, like: str) -> None:
    machine = machine_named(text)
    assert (machine.processes, machine.bytes, machine.like, machine.accelerated) == (processes, gigabytes * 1e9, like, True)
    assert machine.peak == {"bf16": bf16_peak(ACCELERATORS[like][1]), "fp32": PEAK_TFLOPS[ACCELERATORS[like][1]] * 1e12 / 2}


@pytest.mark.parametrize("text", ["", "0x24GB", "0GB", "8x", "x24GB", "24", "a100s", "8 x 80GB x"])
def test_other_words_for_a_machine_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"as in 24GB, 8x80GB or 8xh100 \(rtx3090, "):
        machine_named(text)


def test_a_size_stands_for_its_slowest_accelerator() -> None:
    for size, name in BY_MEMORY.items():
        assert PEAK_TFLOPS[ACCELERATORS[name][1]] == min(PEAK_TFLOPS[device] for gb, device in ACCELERATORS.values() if gb == size)


def test_full_training_fits_80_gb_with_at_most_24_bytes_per_weight_and_its_average_on_the_cpu(medium: Artifact) -> None:
    count = Footprint(medium).transformer.count
    plan = planned(medium, DENSE, "8x80GB")
    train, host = plan["memory"]["train"], plan["host_memory"]["train"]
    held = sum(train[name] for name in ("teacher", "student and fake score", "gradients", "optimizers"))
    assert 20 * count < held <= 24 * count and train["teacher"] == 2 * count
    assert "average" not in train and 8 * 0.9 * count < host["average (CPU)"] < 8 * count and "program" in host
    assert plan["fits"] and not plan["sharded"] and plan["memory_bytes"] < 75e9 and plan["machine_bytes"] == 80e9
    assert train["driver"] == DRIVER and plan["memory_bytes"] == pytest.approx(sum(train.values()), abs=len(train))
    assert "--multi_gpu --num_processes 8" in plan["launch"] and "lacking" not in plan
    alone = planned(medium, DENSE, "80GB")
    assert alone["fits"] and alone["memory_bytes"] < 75e9 and alone["hours"] == pytest.approx(8 * plan["hours"], rel=1e-2)
    assert alone["launch"] == "flashgen distill ..."


def test_hours_follow_from_the_stated_share_of_the_peak(medium: Artifact) -> None:
    stage = prepared(medium, DENSE, "8xh100")
    plan, said = stage.plan(), describe(stage, Path("out"))
    assert plan is not None
    peak = {number: 8 * PEAK_SHARE * value for number, value in machine_named("8xh100").peak.items()}
    seconds = sum(2 * amount / peak[number] for number, amount in plan.work.items() if number in peak)
    assert said["seconds"] == pytest.approx(seconds, rel=1e-3) and said["hours"] == pytest.approx(seconds / 3600, abs=0.01)
    assert 2 * sum(plan.work.values()) > 5e19  # 50 EFLOP
    assert "40% of the peak of 8 x h100, 989.4 TFLOP/s in bf16" in said["assumption"] and "nobody has measured" in said["assumption"]
    assert "of 8 x a100, 312 TFLOP/s" in planned(medium, DENSE, "8x80GB")["assumption"]


def test_adapters_fit_24_gb_with_a_whole_batch_of_16(medium: Artifact) -> None:
    plan = planned(medium, LORA, "24GB", "compute.micro_batch=16")
    assert plan["fits"] and plan["micro_batch"] == 16 and plan["recipe"]["distill"]["matching"]["batch"] == 16
    assert "average" in plan["memory"]["train"]  # adapters' averages stay beside them
    assert planned(medium, LORA, "rtx4090")["hours"] < planned(medium, LORA, "24GB")["hours"]


def test_trajectories_are_planned_as_they_pass(medium: Artifact) -> None:
    few, many = (planned(medium, LORA, "24GB", f"compute.micro_batch={size}")["memory"]["trajectories"] for size in (2, 4))
    assert many["activations"] == 2 * few["activations"]
    part = planned(medium, LORA, "24GB", "compute.micro_batch=0")["memory"]["trajectories"]
    assert part["activations"] == 64 * few["activations"]  # 128 prompts together


def test_networks_are_shared_out_where_only_that_fits(medium: Artifact) -> None:
    plan = planned(medium, DENSE, "8x40GB", "distill.matching.node_adversarial=[0]")
    assert plan["fits"] and plan["sharded"] and "recipes/accelerate/fsdp2.yaml --num_processes 8" in plan["launch"]
    train, alone = plan["memory"]["train"], planned(medium, DENSE, "80GB")["memory"]["train"]
    for part in ("teacher", "gradients", "optimizers"):
        assert 8 * train[part] == pytest.approx(alone[part], rel=1e-6)
    assert "average" in train  # not on the CPU: each process keeps its part


@pytest.mark.parametrize("name", ["finetune", "restructure", "quantize"])
def test_later_stages_are_planned_for_other_machines(name: str, chain: Chain) -> None:
    recipe, on = micro("finetune.merge_high=[0.7]", "quantize.method=gptq"), machine_named("2x24GB")
    plan = describe(prepare(runs.stage(name), {"student": chain.student.path}, recipe, on=on), Path("out"))
    assert plan["fits"] and plan["machine"] == "2x24GB" and plan["seconds"] >= 0
    phase = "calibrate" if name == "quantize" else "train"
    assert "program" not in plan["memory"][phase] and "program" in plan["host_memory"][phase]
    assert plan["processes"] == (1 if name == "quantize" else 2)  # quantize shares nothing out
    if phase == "train":
        assert plan["micro_batch"] == 2 and "average (CPU)" in plan["host_memory"]["train"]  # half of a batch of 4


def test_a_plan_that_does_not_fit_is_printed_and_ends_with_5_and_advice(medium: Artifact, tmp_path: Path) -> None:
    words = ("distill", medium.path, "--recipe", DENSE, "--set", f"prompts_file={prompts_of(medium)}", "-o", tmp_path / "out", "--json")
    done = flashgen(*words, "--plan", "--on", "rtx4090")
    plan = json.loads(done.stdout)
    assert done.exit_code == 5 and not plan["fits"] and plan["hours"] > 0
    assert "distill needs" in done.stderr and "22.4 are there; use --recipe sd35-medium" in done.stderr and plan["lacking"] in done.stderr
    assert flashgen(*words, "--plan", "--on", "8xa100").exit_code == 0
    assert "cannot be shared by 3 processes" in refused(2, *words, "--plan", "--on", "3x80GB")
    assert "add --plan" in refused(2, *words, "--on", "rtx4090")
    assert "--on abc: write a number" in refused(2, *words, "--plan", "--on", "abc")
    assert "write a number" in refused(2, *words, "--plan", "--on", "9" * 5000 + "xh100")
    assert "write a number" in refused(2, *words, "--plan", "--on", "9" * 500 + "GB")
    assert not (tmp_path / "out").exists()


def test_an_automatic_micro_batch_is_the_largest_power_of_two_that_fits(medium: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for on in ("64GB", "80GB", "141GB"):
        stage = prepared(medium, DENSE, on, "compute.micro_batch=auto")
        size, room = stage.micro_batch, ROOM * float(stage.machine.bytes or 0)
        fitting, larger = stage.plan_with(size), stage.plan_with(2 * size)
        assert fitting is not None and larger is not None and larger.peak > room
        assert fitting.peak <= room or size == 1
        assert size & (size - 1) == 0 and f"distill: compute.micro_batch=auto is {size}\n" in capsys.readouterr().err
        sizes[on] = size
    assert sizes["64GB"] < sizes["80GB"] < sizes["141GB"]
    fixed = prepared(medium, DENSE, "80GB", "compute.micro_batch=4")
    assert fixed.micro_batch == 4 and fixed.settings() == prepared(medium, DENSE, "80GB", "compute.micro_batch=auto").settings()


def test_an_automatic_micro_batch_is_everything_on_a_cpu_with_room(
    tiny_teacher: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load("shapes-demo", ["compute.micro_batch=auto"])
    assert prepare(Distill, {"teacher": tiny_teacher.path}, recipe, device="cpu").micro_batch == 0
    assert "auto is all samples of a process" in capsys.readouterr().err
    whole = prepare(Distill, {"teacher": tiny_teacher.path}, recipe, device="cpu").plan_with(0)
    assert whole is not None
    monkeypatch.setattr(base, "this_machine", lambda device: Machine(0.99 * whole.peak / ROOM))
    assert 0 < prepare(Distill, {"teacher": tiny_teacher.path}, recipe, device="cpu").micro_batch < 128
