"""Plans: sums that can be checked by hand, and refusals that name the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from flashgen.artifact.store import Artifact
from flashgen.errors import MachineError, UsageError
from flashgen.families.configs import configs_in
from flashgen.models import save
from flashgen.models.footprint import Footprint, Tensors
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import latent_shape
from flashgen.pixels import Size
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from flashgen.runtime import machines
from flashgen.stages import planning, trainings
from flashgen.stages.base import prepare
from flashgen.stages.distill import Distill
from flashgen.stages.planning import Plan
from flashgen.stages.quantize import Quantize, streamed
from flashgen.stages.restructure import RestructureEncoder
from flashgen.stages.trainings import matching_state
from flashgen.stages.trajectories import cached_steps, guided_teacher, on_policy_steps, student_grid
from flashgen.training.mapped import read_mark
from flashgen.training.roles import roles_on
from tests import runs
from tests.stages.chain import Chain, micro


def demo(*settings: str) -> Recipe:
    return load("shapes-demo", settings)


def plan_of(name: str, source: Artifact, recipe: Recipe, **options: Any) -> Plan:
    """Plan of a prepared stage."""
    kind = runs.stage(name)
    plan = prepare(kind, {next(iter(kind.takes)): source.path}, recipe, **options).plan()
    assert plan is not None
    return plan


def test_a_student_of_adapters_is_counted_to_the_last_number(tiny_teacher: Artifact) -> None:
    recipe = demo("distill.lora.rank=4")
    plan = plan_of("distill", tiny_teacher, recipe)
    assert recipe.distill.lora is not None
    pipe = load_pipeline(tiny_teacher.path)
    count = sum(t.numel() for t in pipe.transformer.state_dict().values())
    dense = sum(p.numel() for p in pipe.transformer.parameters())
    _, student, _ = roles_on(pipe.transformer, recipe.distill.lora, "student", "fake_score", seed=0, targets=pipe.family.lora_targets)
    learned = sum(p.numel() for p in student.parameters())
    train = plan.memory["train"]
    assert train["teacher"] == 4 * count
    assert train["student and fake score"] == 8 * learned and train["optimizers"] == 8 * learned
    full = plan_of("distill", tiny_teacher, demo()).memory["train"]
    assert full["optimizers"] == 8 * dense and "embed" in plan.memory


def test_forwards_are_those_of_the_recipe(tiny_teacher: Artifact) -> None:
    few = ("distill.trajectory.iterations=0", "distill.matching.iterations=1", "distill.matching.fake_score_warmup=0")
    plan = plan_of("distill", tiny_teacher, demo(*few, "distill.matching.batch=1"))
    assert plan.forwards == 4 + 3 * 2 + 3 + 3  # rollout, two fake score steps, the student's own, teacher twice and fake score


def test_a_followed_student_costs_a_forward_per_step_and_the_guided_teacher_two(tiny_teacher: Artifact, tiny_student: Artifact) -> None:
    alone = ["distill.matching.iterations=0", "distill.trajectory.iterations=1", "distill.trajectory.batch=1"]
    alone += ["distill.trajectory.prompts=3", "distill.steps=2", f"distill.start={tiny_student.path}"]
    teacher = plan_of("distill", tiny_teacher, demo(*alone))
    student = plan_of("distill", tiny_teacher, demo(*alone, "distill.follow=start"))
    assert (teacher.forwards, student.forwards) == (2 * 16 * 3 + 3, 4 * 3 + 3)


def test_a_forward_pass_is_counted_from_the_shapes(tiny_teacher: Artifact) -> None:
    """Tokens of 2 x 2 latents of 8 x 8 px, at any height and width; multiply-adds grow with them."""
    footprint = Footprint(tiny_teacher)
    square, wide = footprint.forward(), footprint.forward(Size(height=64, width=128))
    assert (square.tokens, wide.tokens) == (16 + 32, 32 + 32) and (square.latent, wide.latent) == (16 * 64, 16 * 128)
    assert (square.width, square.blocks) == (32, 2) and square.hidden == 48 * 32
    assert 1.2 < wide.multiply_adds / square.multiply_adds < 2
    assert footprint.forward(Size(height=128, width=64)) == wide
    assert footprint.family.size_limits(configs_in(tiny_teacher.path, footprint.family)) == (16, 512)


def test_trajectories_are_counted_as_they_are_stored(tiny_teacher: Artifact, tmp_path: Path) -> None:
    wanted = demo("distill.trajectory.prompts=3", "distill.on_policy.iterations=1", "distill.on_policy.prompts=2")
    unwanted = demo("distill.trajectory.iterations=0", "distill.on_policy.iterations=0")
    pipe, stage = load_pipeline(tiny_teacher.path), prepare(Distill, {"teacher": tiny_teacher.path}, wanted)
    assert isinstance(stage, Distill)
    source = guided_teacher(pipe.transformer, stage.sampler.shift, wanted)
    nodes, shape = student_grid(wanted.distill, source.sigmas), latent_shape(pipe, stage.sampler.size_px)
    pool = stage._pools(pipe, tmp_path)["trajectory"]
    cached_steps(stage, pool, source, nodes, shape, tmp_path, stage.source)
    on_policy_steps(stage, pool, source, nodes, shape, tmp_path, pipe.transformer)
    own, more = (sum(path.stat().st_size for path in tmp_path.glob(f"{name}/*.bin")) for name in ("trajectories-*", "on_policy/*"))
    footprint = Footprint(tiny_teacher)
    embedded = sum(len(mark[1]) for path in tmp_path.glob("prompts-*/[0-9]*.done") if (mark := read_mark(path)))
    prompts = 3 * footprint.conditioning_bytes()
    assert sum(path.stat().st_size for path in tmp_path.glob("prompts-*/*.bin")) == embedded * footprint.conditioning_bytes()
    here, less = plan_of("distill", tiny_teacher, wanted), plan_of("distill", tiny_teacher, unwanted)
    checkpoints = 2 * 16 * footprint.learnable  # of trajectory and on-policy regression
    assert here.disk - less.disk == own + more + prompts + checkpoints
    assert here.cached - less.cached == own + prompts


TENSOR_HEADER = 400  # bytes of a tensor's name, shape and padding in safetensors files, which a plan does not count: nothing at full size
CHECKPOINTED = {
    "distill": ("distill.on_policy.iterations=1", "distill.on_policy.prompts=4", "distill.on_policy.batch=4"),
    "distill, validated": ("distill.matching.validate_every=1",),
    "distill, adapters": ("distill.lora.rank=32",),
    "finetune": ("finetune.merge_high=[0.7]",),
    "restructure": (),
}


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_a_run_leaves_no_more_on_the_disk_than_was_planned(
    case: str, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything in the work folder when training has ended, a second copy of the largest checkpoint, and the new transformer."""
    if case == "distill, validated":
        from flashgen.stages.report import Validator

        scores = iter([0.9, 0.1])
        monkeypatch.setattr(Validator, "__call__", lambda *_: next(scores))
    name, recipe = case.partition(",")[0], micro(*CHECKPOINTED[case], "bench.per_task=0", "restructure.floor=0")
    source = chain.teacher if name == "distill" else chain.student
    options = {"mode": "prune"} if name == "restructure" else {}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    plan = plan_of(name, source, recipe, **options)
    with monkeypatch.context() as patch:
        patch.setattr(save, "save_changed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(runs, name)(str(source.path), tmp_path / "out", recipe, **options)
    files = {path: path.stat().st_size for path in (tmp_path / "out" / ".work").rglob("*") if path.is_file()}
    checkpoints = [path for path in files if path.parent.name.startswith("step-") and path.suffix == ".safetensors"]
    assert checkpoints
    tensors = {path: len(safe_open(path, "pt").keys()) for path in checkpoints}  # type: ignore[no-untyped-call]  # safetensors has no types
    transformer = (
        0 if any(path.name == "diffusion_pytorch_model.safetensors" and path.parent.name == "transformer" for path in files) else 1
    )
    used = sum(files.values()) + max(files[path] for path in checkpoints) + transformer * 2 * Footprint(source).transformer.count
    names = TENSOR_HEADER * (sum(tensors.values()) + max(tensors.values()))
    assert used <= 1.02 * plan.disk + names + (64 << 10)  # and sizes inside of small files
    assert plan.disk <= 1.2 * used


def test_checkpoints_are_counted_twice_where_one_replaces_another(tiny_teacher: Artifact) -> None:
    none = plan_of("distill", tiny_teacher, demo("distill.matching.iterations=0", "distill.trajectory.iterations=0"))
    alone = plan_of("distill", tiny_teacher, demo("distill.matching.iterations=0"))
    footprint, trajectory = Footprint(tiny_teacher), demo().distill.trajectory
    states = 2 * 5 * trajectory.prompts * footprint.forward().latent + trajectory.prompts * footprint.conditioning_bytes()
    assert alone.disk - none.disk == states + 2 * 16 * footprint.learnable


@pytest.mark.parametrize("name", ["distill", "finetune", "restructure"])
def test_kept_checkpoints_are_counted(name: str, chain: Chain) -> None:
    source = chain.teacher if name == "distill" else chain.student
    one, three = (plan_of(name, source, micro(f"checkpoint.keep={keep}", "distill.on_policy.iterations=0")) for keep in (1, 3))
    learned, matching = Footprint(source).learnable, matching_state(micro().distill.matching, 32)
    states = {"distill": 16 + matching, "finetune": 2 * matching, "restructure": 16}  # of all trainings of a stage
    assert three.disk - one.disk == 2 * states[name] * learned


@pytest.mark.parametrize("name", ["distill", "finetune", "restructure"])
def test_moments_of_8_bits_are_counted_and_change_what_a_run_is(name: str, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "find_spec", lambda _: True)
    source = chain.teacher if name == "distill" else chain.student
    with_muon = [f"{at}.muon_lr=1e-3" for at in ("distill.trajectory", "distill.matching", "finetune.matching", "restructure")]
    without = [setting.replace("1e-3", "0") for setting in with_muon]
    without += [f"{at}.matching.fake_score_muon_lr=0" for at in ("distill", "finetune")]
    full, eight, muon = (
        plan_of(name, source, micro(*without, f"compute.optimizer_bits={bits}", *more))
        for bits, more in ((32, []), (8, []), (8, with_muon))
    )
    sizes = [plan.memory["train"]["optimizers"] / Footprint(source).learnable for plan in (full, eight, muon)]
    two = name != "restructure"
    assert sizes == pytest.approx([8, 4.0625 if two else 2.03125, 8 if two else 4])
    assert eight.disk < full.disk


def test_prompts_take_16_bits_where_any_encoder_is_large(tiny_teacher: Artifact) -> None:
    small, large = Footprint(tiny_teacher), Footprint(tiny_teacher)
    large.parts["text_encoder_3"] = Tensors({"shared.weight": ((1 << 15, 1 << 14), 4)})
    assert small.conditioning_bytes() == 2 * large.conditioning_bytes() == 4 * (32 * 32 + 32)


def test_plans_refuse_what_their_stages_do(tiny_teacher: Artifact, tiny_student: Artifact, tmp_path: Path) -> None:
    path = str(tiny_teacher.path)
    with pytest.raises(UsageError, match="leave them out, or quantize a student"):
        runs.plan("quantize", {"student": path}, tmp_path / "q", demo("quantize.step_scales=true"))
    odd = demo("export.size_px=72")
    with pytest.raises(UsageError, match=r"export\.size_px=72"):
        runs.plan("export", {"student": path}, tmp_path / "d", odd, target="web", offline=False)
    planned = runs.plan("export", {"student": str(tiny_student.path)}, tmp_path / "d", odd, target="gguf", offline=False)  # draws nothing
    assert planned["memory"].keys() == {"write"} and planned["forwards"] == 0


def test_codes_are_counted_as_they_are_stored(tiny_student: Artifact, tiny_quantized: Artifact) -> None:
    stage = prepare(Quantize, {"student": tiny_student.path}, demo("quantize.group=16"))
    assert isinstance(stage, Quantize)
    _, codes = streamed(Footprint(tiny_student).transformer, stage.rounding, stage.bits)
    tensors = load_file(tiny_quantized.path / "quantized" / "transformer.safetensors")
    assert codes == sum(t.nbytes for t in tensors.values()) == tiny_quantized.manifest.metrics["packed_bytes"]


@pytest.mark.parametrize(
    ("stage", "settings", "told"),
    [
        ("distill", ["distill.matching.batch=4096"], r"phase 'train' .*--recipe sd35-medium-24gb.*distill\.size_px"),
        (
            "distill",
            ["bench.batch=9000", "bench.per_task=1500"],
            r"phase 'validate' .*--set bench\.batch=1, or none with --set bench\.per_task=0",
        ),
        ("restructure", ["restructure.batch=4096"], r"phase 'train' .*--mode zeros.*restructure\.iterations=0"),
        ("quantize", ["bench.batch=9000", "bench.per_task=1500"], r"phase 'validate' .*--set bench\.batch=1"),
        ("quantize", ["quantize.method=gptq", "bench.per_task=0"], r"phase 'calibrate' .*--set quantize\.method=rtn"),
    ],
)
def test_what_cannot_fit_is_refused_before_any_work_with_what_lowers_that_phase(
    stage: str,
    settings: list[str],
    told: str,
    tiny_teacher: Artifact,
    tiny_student: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines, "total_bytes", lambda: 1 << 20)
    source = str((tiny_teacher if stage == "distill" else tiny_student).path)
    with pytest.raises(MachineError, match=rf"needs \d+\.\d GiB of memory in its {told.replace(' .*', ' .*0.0 are there; .*', 1)}"):
        getattr(runs, stage)(source, tmp_path / "out", demo(*settings))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(machines, "total_bytes", lambda: None)  # unknown: nothing is refused
    plan_of(stage, tiny_teacher if stage == "distill" else tiny_student, demo(*settings)).check(stage, tmp_path, tmp_path / "work")


def test_pruning_without_training_loads_nothing(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RestructureEncoder, "_trained", lambda *_: pytest.fail("nothing is to be trained"))
    for module in ("flashgen.stages.report", "flashgen.models.pipeline"):
        monkeypatch.setattr(f"{module}.load_pipeline", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    made = runs.restructure(str(tiny_student.path), tmp_path / "slim", demo("restructure.iterations=0", "bench.per_task=0"), mode="prune")
    assert made.manifest.sampler is not None and made.manifest.sampler.tokens["t5"] == 0 and not (made.path / "text_encoder_3").exists()
    own = {f.path: f.sha256 for f in tiny_student.manifest.files}
    changed = ("model_index.json", "scheduler/scheduler_config.json")
    linked = [f for f in made.manifest.files if f.path in own and f.path not in changed]
    assert linked and all(f.sha256 == own[f.path] and (made.path / f.path).samefile(tiny_student.path / f.path) for f in linked)


def test_what_lies_in_the_cache_needs_no_disk_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(planning, "check_disk", lambda out, needed: asked.append(needed))
    plan, work = Plan({"train": {"program": 1.0}}, disk=1 << 20, cached=1 << 18), tmp_path / ".work" / "key"
    for folder, size in (
        (work, 1 << 14),
        (tmp_path / ".work" / "cache" / "prompts-0", 1 << 16),
        (tmp_path / ".work" / "cache" / "x", 1 << 19),
    ):
        plan.check("copy", tmp_path, work)
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * size)
    plan.check("copy", tmp_path, work)
    assert asked == [1 << 20, (1 << 20) - (1 << 14), (1 << 20) - (1 << 14) - (1 << 16), (1 << 20) - (1 << 14) - (1 << 18)]
