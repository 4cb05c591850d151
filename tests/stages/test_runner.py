"""The runner: what every stage gets from it, on a small real stage."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flashgen.artifact.store import Artifact, open_artifact, versions
from flashgen.errors import ArtifactError, MachineError, NumericsError, UsageError
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import Stage, execute, prepare, run
from flashgen.stages.describe import describe
from flashgen.stages.inputs import RecipeChoice
from flashgen.stages.planning import Plan
from tests.artifact.making import publish
from tests.stages.copying import WEIGHTS, Copy

RECIPE = Recipe(name="test")


@pytest.fixture
def student(tmp_path: Path) -> Artifact:
    return publish(tmp_path / "student", world="shapes")


@pytest.fixture(autouse=True)
def nothing_made() -> Iterator[None]:
    Copy.made.clear()
    yield
    Copy.error, Copy.refusal, Copy.needs = None, None, None


def copied(student: Artifact, out: Path, seed: int = 0, force: bool = False, recipe: Recipe = RECIPE) -> Artifact:
    return run(Copy, {"student": student.path}, out, recipe, seed, force)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file but the lock's, which stays where a run was refused."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_run_publishes_what_the_stage_made_and_where_it_came_from(student: Artifact, tmp_path: Path) -> None:
    made = copied(student, tmp_path / "out", seed=3)
    manifest = made.manifest
    assert made.path == tmp_path / "out" / "v0001" and (made.path / WEIGHTS).read_text() == "weightsx"
    assert (manifest.kind, manifest.stage, manifest.family, manifest.world) == ("student", "copy", "sd3", "shapes")
    assert (manifest.recipe, manifest.seed, manifest.metrics) == ({"bits": 4}, 3, {"letters": 1})
    assert manifest.extra["note"] == "copied" and [(p.role, p.digest) for p in manifest.parents] == [("student", student.manifest.digest)]
    assert open_artifact(made.path, verify=True) == made and not (tmp_path / "out" / ".work").exists()


def test_a_finished_run_is_up_to_date_until_something_changes(
    student: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = copied(student, out)
    assert copied(student, out) == first and len(Copy.made) == 1
    assert capsys.readouterr().err.count("is up to date (--force makes a new version)") == 1
    assert copied(student, out, force=True).path.name == "v0002"
    assert copied(student, out, seed=1).path.name == "v0003"
    assert copied(student, out, recipe=load("shapes-demo", ["quantize.bits=8"])).path.name == "v0004"
    assert copied(publish(tmp_path / "student", "other", world="shapes"), out).path.name == "v0005"
    assert [v.name for v in versions(out)] == [f"v000{i}" for i in range(1, 6)] and open_artifact(first.path, verify=True) == first


def test_a_name_of_the_recipe_that_nothing_depends_on_changes_nothing(student: Artifact, tmp_path: Path) -> None:
    first = copied(student, tmp_path / "out")
    assert copied(student, tmp_path / "out", recipe=Recipe(name="another")) == first


@pytest.mark.parametrize(
    "error", [NumericsError("nan"), KeyboardInterrupt(), OSError("disk"), MemoryError()], ids=lambda e: type(e).__name__
)
def test_a_run_resumes_after_any_error_and_leaves_the_versions_alone(error: BaseException, student: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = copied(student, out)
    Copy.error = error
    with pytest.raises(type(error)):
        copied(student, out, seed=1)
    assert versions(out) == [before.path] and open_artifact(out, verify=True) == before
    assert (out / ".work" / "staging").exists() == isinstance(error, KeyboardInterrupt)  # after an error the disk may be full
    Copy.error = None
    after = copied(student, out, seed=1)  # the lock is free, and the unfinished version is gone
    assert after.path.name == "v0002" and [f.path for f in after.manifest.files] == ["README.md", WEIGHTS]
    assert Copy.made == [[], [], ["checkpoint"]]


def test_a_full_disk_is_named_whatever_library_meets_it(student: Artifact, tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")):
        Copy.error = error
        with pytest.raises(MachineError, match=rf"the disk of {tmp_path / 'out'} is full \(.*\); free some, then the same command resumes"):
            copied(student, tmp_path / "out")


def test_what_a_kill_inside_a_write_leaves_is_removed(student: Artifact, tmp_path: Path) -> None:
    Copy.error = NumericsError("nan")
    for _ in range(2):
        with pytest.raises(NumericsError):
            copied(student, tmp_path / "out")
        work = next((tmp_path / "out" / ".work").glob("*/checkpoint")).parent
        left = [path.name for path in work.glob(".*")]
        (work / ".unit-000.pt.17.tmp").write_text("half")
    assert left == []


def test_a_resumed_run_says_so(student: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Copy.error = NumericsError("nan")
    for _ in range(2):
        with pytest.raises(NumericsError):
            copied(student, tmp_path / "out")
    assert f"copy: resuming from {tmp_path / 'out' / '.work'}" in capsys.readouterr().err


# refusals leave nothing


REFUSALS: dict[str, Exception] = {
    "usage": UsageError("no"),
    "machine": MachineError("small"),
    "os": OSError("io"),
    "bug": ZeroDivisionError(),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("where", ["refusal", "needs"])
def test_a_refused_run_leaves_out_as_it_was(where: str, name: str, student: Artifact, tmp_path: Path) -> None:
    out, error = tmp_path / "out", REFUSALS[name]
    setattr(Copy, where, error)
    with pytest.raises(type(error)):
        copied(student, out)
    assert not out.exists() and Copy.made == []
    setattr(Copy, where, None)
    Copy.error = NumericsError("nan")
    with pytest.raises(NumericsError):
        copied(student, out)
    Copy.error, before = None, listing(out)
    setattr(Copy, where, error)
    with pytest.raises(type(error)):
        copied(student, out)
    assert listing(out) == before and "checkpoint" in {Path(path).name for path in before}
    setattr(Copy, where, None)
    copied(student, out)  # not locked
    assert Copy.made == [[], ["checkpoint"]]


def test_an_empty_folder_that_was_there_stays(student: Artifact, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Copy.needs = MachineError("small")
    with pytest.raises(MachineError):
        copied(student, tmp_path / "out")
    assert (tmp_path / "out").is_dir() and listing(tmp_path / "out") == {}


def test_a_plan_that_fits_is_checked_with_the_files_of_an_earlier_run_counted(student: Artifact, tmp_path: Path) -> None:
    out, small = tmp_path / "out", Plan({"work": {"weights": 1.0}}, disk=1.0)
    Copy.needs = Plan({"work": {"weights": 1.0}}, disk=1 << 60)
    with pytest.raises(MachineError, match="MiB of disk"):
        copied(student, out)
    Copy.needs = Plan({"load": {"student": 2.0**50}, "draw": {"vae": 2.0**60, "cache": 1.0}}, disk=0, advice={"draw": "draw less"})
    with pytest.raises(MachineError, match=r"copy needs .* GiB of memory in its phase 'draw' \(GiB: vae .*, cache 0\.0\).*; draw less$"):
        copied(student, out)
    assert not out.exists()
    Copy.needs = small
    copied(student, out)


def test_nothing_is_asked_of_the_machine_when_nothing_is_to_be_done(student: Artifact, tmp_path: Path) -> None:
    first = copied(student, tmp_path / "out")
    Copy.needs = MachineError("small")
    assert copied(student, tmp_path / "out") == first


@pytest.mark.parametrize("blocked", ["file", "v0001"])
def test_an_out_that_cannot_hold_versions_is_refused(blocked: str, student: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" if blocked == "file" else student.path
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="name a folder that may hold versions"):
        copied(student, out)
    assert listing(tmp_path) == before


# one writer at a time


def test_a_thread_that_writes_to_the_same_folder_is_refused(student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave, outcome = threading.Event(), threading.Event(), list[object]()
    make = Copy.make

    def slow(self: Copy, draft: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return make(self, draft)

    monkeypatch.setattr(Copy, "make", slow)
    thread = threading.Thread(target=lambda: outcome.append(copied(student, tmp_path / "out")))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(MachineError, match="another process is writing to"):
        copied(student, tmp_path / "out", seed=1)
    leave.set()
    thread.join()
    assert [a.path.name for a in outcome if isinstance(a, Artifact)] == ["v0001"]
    assert copied(student, tmp_path / "out", seed=1).path.name == "v0002"


def test_the_lock_is_free_after_an_exception_in_another_thread(student: Artifact, tmp_path: Path) -> None:
    Copy.error = OSError("io")
    errors: list[BaseException] = []

    def failing() -> None:
        try:
            copied(student, tmp_path / "out")
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=failing)
    thread.start()
    thread.join()
    Copy.error = None
    assert len(errors) == 1 and copied(student, tmp_path / "out").path.name == "v0001"


def test_a_second_process_is_refused_and_resumes_after_the_firsts_kill(student: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.stages.copying", str(student.path), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "making\n"
        before = listing(out)
        with pytest.raises(MachineError, match="another process is writing"):
            copied(student, out)
        assert listing(out) == before
        process.kill()
    copied(student, out)
    assert Copy.made == [["checkpoint"]]


# preparing


def test_inputs_are_opened_with_the_kinds_that_the_stage_takes(student: Artifact, tmp_path: Path) -> None:
    teacher = publish(tmp_path / "teacher", kind="teacher")
    with pytest.raises(ArtifactError, match="is a teacher, this needs a student"):
        prepare(Copy, {"student": teacher.path}, RECIPE)
    with pytest.raises(ArtifactError, match="no artifact at"):
        prepare(Copy, {"student": tmp_path / "none"}, RECIPE)


def test_a_worlds_name_is_its_teacher_only_where_a_teacher_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashgen import worlds
    from flashgen.stages.inputs import open_input

    publish(tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    embedded = worlds.get("shapes").teacher()
    assert open_input("shapes", ("teacher",)).path == open_input("shapes").path == embedded
    assert open_input("shapes", ("student",)).path == open_input("./shapes").path == Path("shapes/v0001")
    with pytest.raises(ArtifactError, match="is a student, this needs a teacher"):
        open_input("./shapes", ("teacher",))


def test_the_recipe_is_the_worlds_unless_one_is_named(student: Artifact, tmp_path: Path) -> None:
    assert prepare(Copy, {"student": student.path}, RecipeChoice()).recipe == load("shapes-demo")
    set_ = RecipeChoice(overrides=("quantize.bits=8",))
    assert prepare(Copy, {"student": student.path}, set_).settings() == {"bits": 8}
    outside = publish(tmp_path / "outside")
    with pytest.raises(UsageError, match=r"belongs to no world, so it has no default recipe; give one with --recipe"):
        prepare(Copy, {"student": outside.path}, set_)
    named = RecipeChoice("shapes", ("quantize.bits=8",))
    assert prepare(Copy, {"student": outside.path}, named).recipe == load("shapes", ["quantize.bits=8"])


def test_a_student_of_an_old_flashgen_has_the_world_of_its_lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 and 0.2 stored no world: what was made of the embedded teacher, however long ago, is of its world; nothing else is."""
    from flashgen import worlds
    from flashgen.artifact import draft as drafts
    from flashgen.stages.inputs import world_of

    embedded = open_artifact(worlds.get("shapes").teacher())
    monkeypatch.setattr(drafts, "__version__", "0.2.1")
    first = publish(tmp_path / "first", parents=[embedded.as_parent("teacher")])
    second = publish(tmp_path / "second", "other", parents=[first.as_parent("student")])
    alone = publish(tmp_path / "alone")
    assert [getattr(world_of(a), "name", None) for a in (first, second, alone)] == ["shapes", "shapes", None]
    monkeypatch.setattr(drafts, "__version__", "0.3.0")
    new = publish(tmp_path / "new", parents=[embedded.as_parent("teacher")])
    assert world_of(new) is None  # it would have said so


def test_a_recipe_of_another_family_is_refused(student: Artifact) -> None:
    assert prepare(Copy, {"student": student.path}, Recipe(name="mine", family="sd3")).recipe.family == "sd3"
    with pytest.raises(UsageError, match=r"recipe mine is for the model family flux, .* is of sd3; name one with --recipe"):
        prepare(Copy, {"student": student.path}, Recipe(name="mine", family="flux"))


@pytest.mark.parametrize("change", [{"family": "flux"}, {"world": "letters"}])
def test_an_unknown_family_or_world_is_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    name, value = next(iter(change.items()))
    artifact = publish(tmp_path / "student", **change)
    with pytest.raises(ArtifactError, match=rf"{name} '{value}' is not known here \(known: .*\); install") as caught:
        copied(artifact, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_plan_describes_and_starts_nothing(student: Artifact, tmp_path: Path) -> None:
    Copy.needs = Plan({"work": {"weights": 3.0}}, disk=5.0, forwards=7)
    copied(student, tmp_path / "out")
    Copy.made.clear()
    stage: Stage = prepare(Copy, {"student": student.path}, RECIPE)
    planned = describe(stage, tmp_path / "out")
    assert (planned["memory_bytes"], planned["disk_bytes"], planned["forwards"], planned["seconds"]) == (3, 5, 7, 0.0)
    assert planned["versions"] == ["v0001"] and planned["recipe"] == RECIPE.model_dump(mode="json")
    assert planned["inputs"] == [
        {"role": "student", "path": str(student.path), "kind": "student", "digest": student.manifest.digest, "bytes": student.size_bytes()}
    ]
    assert Copy.made == [] and describe(stage, tmp_path / "none")["versions"] == [] and not (tmp_path / "none").exists()
    assert execute(stage, tmp_path / "out").path.name == "v0001"


# launches


def test_rank_alone_means_nothing(
    student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cluster managers set RANK for every pod; without WORLD_SIZE there is one process, which writes, prints and publishes."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert copied(student, tmp_path / "out").path == tmp_path / "out" / "v0001"
    copied(student, tmp_path / "out")
    assert "is up to date" in capsys.readouterr().err


def test_a_stage_that_does_not_shard_refuses_an_fsdp_launch(student: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="copy does not shard networks with FSDP; launch with --multi_gpu"):
        prepare(Copy, {"student": student.path}, RECIPE)
    monkeypatch.setattr(Copy, "shards", True)
    prepare(Copy, {"student": student.path}, RECIPE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("ACCELERATE_MIXED_PRECISION", "fp16", "--mixed_precision fp16"), ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not followed")],
)
def test_launches_that_nothing_follows_are_refused(
    name: str, value: str, message: str, student: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        prepare(Copy, {"student": student.path}, RECIPE)


TWO = """
import sys
from pathlib import Path
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import run
from tests.stages.copying import Copy
made = run(Copy, {"student": sys.argv[1]}, Path(sys.argv[2]), Recipe(name="test"))
sys.stdout.write(f"{made.path.name} {made.manifest.digest}\\n")
"""


def test_two_processes_publish_one_version_that_both_return(student: Artifact, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
              "--rdzv_endpoint=localhost:0"]  # fmt: skip
    names = []
    for _ in range(2):  # made, then up to date
        done = subprocess.run(
            [*launch, str(tmp_path / "two.py"), str(student.path), str(tmp_path / "out")],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names.append(done.stdout.splitlines())
    made = open_artifact(tmp_path / "out", verify=True)
    assert names == [[f"v0001 {made.manifest.digest}"] * 2] * 2
    assert [f.path for f in made.manifest.files] == ["README.md", WEIGHTS] and not (tmp_path / "out" / ".work").exists()
    assert done.stderr.count("is up to date") == 1
