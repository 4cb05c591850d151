"""Stages and the one runner that opens, checks, plans, locks, resumes, publishes and reports for all of them.

A stage is a dataclass that says what it takes and makes, what its result depends on, what it needs, what it refuses, and how it is made.
Read one from top to bottom: `takes`, `check`, `settings`, `plan`, `make`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen import families
from flashgen.artifact import draft as drafts
from flashgen.artifact.draft import Draft, Origin
from flashgen.artifact.files import locked
from flashgen.artifact.manifest import Kind, Parent, Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import UsageError
from flashgen.recipe.schema import Recipe
from flashgen.runtime.accelerator import device_of
from flashgen.runtime.machines import Machine, this_machine
from flashgen.runtime.processes import check_launch, compute_on, from_first, rank, sharded, wait_for_all
from flashgen.stages.checkpoints import describes_student
from flashgen.stages.inputs import RecipeChoice, open_input, sampler_of, world_of
from flashgen.stages.judging import count_pictures, judge_of
from flashgen.stages.planning import Plan, largest_micro_batch
from flashgen.stages.prompts import OwnPrompts, own_prompts, prompts_key
from flashgen.stages.tracking import check_trackers, tracked

if TYPE_CHECKING:
    import torch

    from flashgen.families.base import Family
    from flashgen.judges.base import Judge
    from flashgen.worlds.base import World

Takes = Mapping[str, tuple[Kind, ...]]  # kinds of artifacts by role


@dataclass(frozen=True)
class Result:
    """Entries of the manifest for the draft that a stage has filled."""

    sampler: Sampler | None
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    validate: bool = True  # draw validation pictures with the written networks, and judge them where there is a judge
    floor: tuple[float, float] | None = None  # (score of the input, share of it that must be left for the result to be published)


@dataclass
class Stage(ABC):
    """One run of one stage on opened inputs."""

    inputs: dict[str, Artifact]
    recipe: Recipe
    seed: int
    device_name: str = field(default="auto", kw_only=True)  # of the command line
    on: Machine | None = field(default=None, kw_only=True)  # that a plan is for; None: this one

    name: ClassVar[str]  # in manifests and messages
    takes: ClassVar[Takes]  # in the order of the command line
    kind: ClassVar[Kind]  # of the version that it makes
    needs_recipe: ClassVar[bool] = True
    shards: ClassVar[bool] = False  # whether it follows an FSDP launch
    cpu_only: ClassVar[bool] = False  # whether it computes on the CPU, whatever accelerator there is

    @property
    def source(self) -> Artifact:
        """The first input."""
        return next(iter(self.inputs.values()))

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        return device_of(self.device_name)

    @cached_property
    def machine(self) -> Machine:
        """The machine that the plan is for."""
        return self.on or this_machine(self.device)

    @cached_property
    def family(self) -> Family:
        """Model family of the first input."""
        return families.get(self.source.manifest.family)

    @cached_property
    def world(self) -> World | None:
        """World of the first input."""
        return world_of(self.source)

    @property
    def sampler(self) -> Sampler:
        """How the first input is sampled. Raises ArtifactError when its manifest does not say."""
        return sampler_of(self.source)

    @cached_property
    def prompts(self) -> OwnPrompts | None:
        """Prompts of the recipe's `prompts_file`, or None without one."""
        return own_prompts(self.recipe)

    def training_prompts(self, count: int, seed: int) -> list[str]:
        """`count` prompts to train or calibrate on, of the recipe or of the world; a function of `seed`."""
        from flashgen.training.prompts import training_prompts

        if (own := self.prompts) is None:
            return training_prompts(self.world, None, count, seed)
        return training_prompts(self.world, own.training, count, seed, own.weights)

    def parents(self) -> list[Parent]:
        """The inputs as entries of the manifest."""
        return [artifact.as_parent(role) for role, artifact in self.inputs.items()]

    def open_more(self) -> None:  # noqa: B027  most stages have no more inputs
        """Open inputs that the recipe or the lineage names and add them to `inputs`, in the order of the manifest's parents."""

    def check(self) -> None:  # noqa: B027  some stages refuse nothing
        """Raise a FlashgenError for settings that this run could not follow to its end. Nothing large is read."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that changes the result, beside inputs and seed: the run's key, and `recipe` in the manifest."""

    def plan(self) -> Plan | None:
        """Needs of the run; None where nothing can be said before it starts."""
        return self.plan_with(self.micro_batch)

    def plan_with(self, micro_batch: int) -> Plan | None:
        """The plan of a stage that trains, with `micro_batch` samples that pass together (0: all of a process)."""
        return None

    @cached_property
    def micro_batch(self) -> int:
        """Samples that pass together in one process, 0 for all of them: `compute.micro_batch`, or for `auto` what fits by plan."""
        asked = self.recipe.compute.micro_batch
        return largest_micro_batch(self) if asked == "auto" else asked

    @abstractmethod
    def make(self, draft: Draft) -> Result:
        """Do the work: fill `draft.path`, keep resume state in `draft.work`. Called in every process of a launch."""

    def require_prompts(self) -> None:
        """Raises UsageError when the stage has nothing to train or calibrate on."""
        if self.world is None and self.prompts is None:
            raise UsageError(
                f"{self.name} needs prompts, and {self.source.path} belongs to no world that brings some; give a file with one prompt per "
                "line, --set prompts_file=FILE, or name a recipe that does, --recipe NAME|FILE"
            )

    def prompts_key(self) -> dict[str, Any]:
        """The part of `settings` that stands for the training prompts."""
        return {} if self.prompts is None else prompts_key(self.recipe, self.prompts)

    @property
    def num_validation_pictures(self) -> int:
        """Pictures that validate the result: the world's prompts, or some of the recipe's own: more where a judge scores them."""
        return count_pictures(self)

    @cached_property
    def judge(self) -> Judge | None:
        """Judge of pictures; None where there is none. Raises FlashgenError, as `open_judge`."""
        return judge_of(next(iter(self.inputs.values()), None), self.world, self.recipe, self.device_name)

    @property
    def judges(self) -> bool:
        """Whether pictures are scored: there is a judge, and `bench.per_task` is not 0."""
        return self.judge is not None and self.num_validation_pictures > 0


def prepare(
    kind: type[Stage],
    refs: Mapping[str, str | Path],
    recipe: Recipe | RecipeChoice,
    seed: int = 0,
    *,
    device: str = "auto",
    on: Machine | None = None,
    **options: Any,
) -> Stage:
    """Open the inputs, resolve the recipe and check everything that can be checked before work. `options` are fields of `kind`."""
    check_launch()
    if kind.cpu_only and device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: {kind.name} computes on the CPU; leave the option out")
    if not kind.cpu_only and on is None:
        compute_on(device_of(device).type)
    if sharded() and not kind.shards:
        raise UsageError(f"{kind.name} does not shard networks with FSDP; launch with --multi_gpu, which shares out batches")
    inputs = {role: open_input(ref, kind.takes[role]) for role, ref in refs.items()}
    source = next(iter(inputs.values()), None)
    if isinstance(recipe, RecipeChoice):
        recipe = recipe.resolve(source) if kind.needs_recipe else Recipe(name="none")
    stage = kind(inputs, recipe, seed, device_name=device, on=on, **options)
    if source is not None:
        if recipe.family not in (None, source.manifest.family):
            raise UsageError(
                f"recipe {recipe.name} is for the model family {recipe.family}, {source.path} is of {source.manifest.family}; name one "
                f"with --recipe whose `family` is {source.manifest.family}, or that has none"
            )
        stage.family  # noqa: B018  an unknown one is an error now
    stage.open_more()
    for role, artifact in inputs.items():
        if artifact.manifest.family != stage.source.manifest.family:
            raise UsageError(f"{role} {artifact.path} is of the family {artifact.manifest.family}, not {stage.source.manifest.family}")
    if source is not None:
        stage.judge  # noqa: B018  one that cannot be used is an error now
    stage.check()
    check_trackers(stage)
    return stage


def execute(stage: Stage, out: Path, force: bool = False) -> Artifact:
    """Run a prepared stage into `out`; returns the published version, or the latest one if it is up to date (unless `force`)."""
    world_name = stage.world.name if stage.world else None
    origin = Origin(stage.kind, stage.name, stage.family.name, world_name, stage.settings(), stage.seed, stage.parents())
    with tracked(stage, origin.settings), ExitStack() as lock:
        done = from_first(lambda: _start(stage, out, origin, force, lock))
        if done is not None:
            return open_artifact(done)
        stage.micro_batch = from_first(lambda: stage.micro_batch)  # all processes pass alike
        if rank():
            return _follow(stage, out, origin)
        with drafts.begun(out, origin) as draft:
            wait_for_all()
            artifact = _finish(stage, draft, stage.make(draft))
        from_first(lambda: artifact.path)
        return artifact


def _start(stage: Stage, out: Path, origin: Origin, force: bool, lock: ExitStack) -> Path | None:
    """Lock `out`, check the plan, verify the inputs; the latest version's path if it is up to date. A refused `out` is left as it was."""
    drafts.check_out(out)
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    unlocked = not (out / ".lock").exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock.enter_context(locked(out))
        if not force and (artifact := drafts.up_to_date(out, origin)) is not None:
            return artifact.path
        if (plan := stage.plan()) is not None:
            plan.check(stage.name, out, drafts.work_folder(out, origin))
        for artifact in stage.inputs.values():
            artifact.verify()
    except BaseException:
        lock.close()
        if unlocked:
            (out / ".lock").unlink(missing_ok=True)
        for folder in created:
            folder.rmdir()
        raise
    return None


def _follow(stage: Stage, out: Path, origin: Origin) -> Artifact:
    """The part of a process other than the first: it works along, and the files that it writes are thrown away."""
    wait_for_all()
    staging = out / ".work" / f"staging-{rank()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    stage.make(Draft(out, staging, drafts.work_folder(out, origin), origin))
    shutil.rmtree(staging)
    wait_for_all()
    return open_artifact(from_first(lambda: out))  # process 0 gives the new version's path


def _finish(stage: Stage, draft: Draft, result: Result) -> Artifact:
    wait_for_all()  # every process is done writing
    metrics = dict(result.metrics)
    if result.validate:
        from flashgen.stages.report import validate

        metrics = {**validate(stage, draft, result), **metrics}
    if stage.kind != "teacher":
        from flashgen.stages.card import write_card

        write_card(stage, draft, result.sampler, metrics)
    keep = stage.recipe.checkpoint.keep > 1 and describes_student(draft.work)
    return draft.publish(sampler=result.sampler, metrics=metrics, extra=result.extra, keep_checkpoints=keep)


def run(
    kind: type[Stage],
    refs: Mapping[str, str | Path],
    out: Path,
    recipe: Recipe | RecipeChoice,
    seed: int = 0,
    force: bool = False,
    *,
    device: str = "auto",
    **options: Any,
) -> Artifact:
    """`prepare` and `execute` in one call."""
    return execute(prepare(kind, refs, recipe, seed, device=device, **options), Path(out), force)
