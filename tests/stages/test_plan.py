"""Plans: sums that can be checked by hand, and refusals that name the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashgen.artifact.store import Artifact
from flashgen.cli import run
from flashgen.errors import MachineError, UsageError
from flashgen.models.footprint import Tensors, embedded, tensors
from flashgen.models.sample import load_pipeline
from flashgen.quant.rounding import quantize_groups
from flashgen.recipe.load import load
from flashgen.stages import distill, plan, quantize, restructure
from flashgen.training.roles import roles_on


def test_a_student_of_adapters_is_counted_to_the_last_number(tiny_teacher: Artifact) -> None:
    recipe = load("shapes-demo", ["distill.lora.rank=4"])
    found = plan.plan_of("distill", tiny_teacher, recipe)
    assert recipe.distill.lora is not None
    transformer = load_pipeline(tiny_teacher.path).transformer
    count = sum(t.numel() for t in transformer.state_dict().values())
    _, student, _ = roles_on(transformer, recipe.distill.lora, "student", "proxy", seed=0)
    learned = sum(p.numel() for p in student.parameters())
    train = found.memory["train"]
    assert train["teacher"] == 4 * count
    assert train["student and proxy"] == 8 * learned and train["optimizers"] == 16 * learned
    whole = plan.plan_of("distill", tiny_teacher, load("shapes-demo")).memory["train"]
    assert whole["optimizers"] == 16 * count and "embed" in found.memory


def test_forwards_are_those_of_the_recipe(tiny_teacher: Artifact) -> None:
    few = [
        "distill.trajectory.iterations=0",
        "distill.matching.iterations=1",
        "distill.matching.proxy_warmup=0",
        "distill.matching.batch=1",
    ]
    found = plan.plan_of("distill", tiny_teacher, load("shapes-demo", few))
    assert found.forwards == 4 + 3 * 2 + 3 + 3  # rollout, two proxy steps, the student's own, teacher twice and proxy


def test_a_leading_student_costs_a_forward_a_step_and_the_guided_teacher_two(tiny_teacher: Artifact, tiny_student: Artifact) -> None:
    alone = [
        "distill.matching.iterations=0",
        "distill.trajectory.iterations=1",
        "distill.trajectory.batch=1",
        "distill.trajectory.prompts=3",
    ]
    alone += ["distill.steps=2", f"distill.start={tiny_student.path}"]
    teacher = plan.plan_of("distill", tiny_teacher, load("shapes-demo", alone))
    student = plan.plan_of("distill", tiny_teacher, load("shapes-demo", [*alone, "distill.follow=start"]))
    assert (teacher.forwards, student.forwards) == (2 * 16 * 3 + 3, 4 * 3 + 3)


def test_trajectories_are_counted_as_they_are_stored(tiny_teacher: Artifact, tmp_path: Path) -> None:
    wanted = load("shapes-demo", ["distill.trajectory.prompts=3", "distill.correction.iterations=1", "distill.correction.prompts=2"])
    unwanted = load("shapes-demo", ["distill.trajectory.iterations=0"])
    pipe, config = load_pipeline(tiny_teacher.path), wanted.distill
    sampler = tiny_teacher.manifest.sampler
    assert sampler is not None
    leader = distill.guided(pipe.transformer, sampler.shift, wanted)
    nodes = distill.student_grid(config, leader.sigmas)
    own = distill.cached(pipe, leader, nodes, sampler, wanted, 0, tmp_path)
    joined = own.and_also(distill.cached(pipe, leader, nodes, sampler, wanted, 0, tmp_path, student=pipe.transformer))
    stored = sum(state.nbytes for path in tmp_path.glob("*/*.pt") for state in torch.load(path).values())
    prompts = sum(path.stat().st_size for path in tmp_path.glob("prompts-*/*")) - embedded(tiny_teacher, tensors(tiny_teacher))  # of ""
    here, less = plan.plan_of("distill", tiny_teacher, wanted), plan.plan_of("distill", tiny_teacher, unwanted)
    assert here.disk - less.disk == stored + prompts
    assert here.memory["train"]["trajectories"] == stored + joined.starts.nbytes + joined.ends.nbytes
    assert less.memory["train"]["trajectories"] == 0


def test_prompts_take_16_bits_where_any_encoder_is_large(tiny_teacher: Artifact) -> None:
    parts = tensors(tiny_teacher)
    large = parts | {"text_encoder_3": Tensors({"shared.weight": ((1 << 15, 1 << 14), 4)})}
    assert embedded(tiny_teacher, parts) == 2 * embedded(tiny_teacher, large)


def test_plans_refuse_what_their_stages_do(tiny_teacher: Artifact, tiny_student: Artifact, tmp_path: Path) -> None:
    path, repair = str(tiny_teacher.path), load("shapes-demo", ["quantize.repair=true"])
    with pytest.raises(UsageError, match="a teacher has to do without them"):
        run.plan("quantize", {"student": path}, tmp_path / "q", repair)
    odd = load("shapes-demo", ["export.size_px=72"])
    with pytest.raises(UsageError, match=r"export\.size_px=72"):
        run.plan("export", {"student": path}, tmp_path / "d", odd, target="web", offline=False)
    planned = run.plan("export", {"student": str(tiny_student.path)}, tmp_path / "d", odd, target="gguf", offline=False)  # draws nothing
    assert planned["memory"].keys() == {"write"} and planned["forwards"] == 0


def test_codes_are_counted_as_they_are_stored(tiny_student: Artifact) -> None:
    recipe = load("shapes-demo", ["quantize.group=16"])
    parts = tensors(tiny_student)
    _, codes = plan._streamed(parts["transformer"], recipe.quantize, "transformer")
    stored = 0.0
    for name, (n, k) in parts["transformer"].linears.items():
        q = quantize_groups(torch.randn(n, k), recipe.quantize.bits_of(name), 16, False)
        assert q.zeros is not None
        stored += q.codes.nbytes + q.scales.nbytes + q.zeros.nbytes
    assert codes == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize("stage", ["distill", "quantize", "restructure"])
def test_what_cannot_fit_is_refused_before_any_work(
    stage: str, tiny_teacher: Artifact, tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "memory_bytes", lambda: 1 << 20)
    calls = {
        "distill": lambda: distill.run(str(tiny_teacher.path), tmp_path / "out", load("shapes-demo"), 0, False),
        "quantize": lambda: quantize.run(str(tiny_student.path), tmp_path / "out", load("shapes-demo"), 0, False),
        "restructure": lambda: restructure.run(str(tiny_student.path), tmp_path / "out", load("shapes-demo"), 0, False, "prune"),
    }
    told = {"distill": "--recipe sd35-medium-24gb", "quantize": "method=rtn", "restructure": "restructure.iterations=0"}
    with pytest.raises(MachineError, match=rf"needs 0\.\d GiB of memory in its phase .*0\.0 are there; .*{told[stage]}"):
        calls[stage]()
    assert not (tmp_path / "out").exists()


def test_pruning_without_training_loads_nothing(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restructure, "_trained", lambda *_: pytest.fail("nothing is to be trained"))
    recipe = load("shapes-demo", ["restructure.iterations=0", "bench.per_task=0"])
    made = restructure.run(str(tiny_student.path), tmp_path / "slim", recipe, 0, False, "prune")
    assert made.manifest.sampler is not None and made.manifest.sampler.t5_tokens == 0 and not (made.path / "text_encoder_3").exists()
    own = {f.path: f.sha256 for f in tiny_student.manifest.files}
    linked = [f for f in made.manifest.files if f.path in own and f.path != "model_index.json"]
    assert linked and all(f.sha256 == own[f.path] and (made.path / f.path).samefile(tiny_student.path / f.path) for f in linked)
