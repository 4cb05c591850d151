"""What stages refuse before any work: settings that the networks, the grids, the processes or the machine cannot follow."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from typing import Any

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import ArtifactError, MachineError, UsageError
from flashgen.flow.grid import check_nested, shifted_grid
from flashgen.processes import check_batch, check_launch, sharded
from flashgen.progress import warn
from flashgen.recipe.schema import DistillRecipe, MatchingTraining, Recipe


def check_recipe(recipe: Recipe) -> None:
    """Raises UsageError for what no teacher could be distilled by; before one is fetched."""
    check_launch()
    config = recipe.distill
    if config.follow == "start" and not config.start:
        raise UsageError("distill.follow=start learns a student's steps; say whose with --set distill.start=STUDENT")
    if config.follow == "teacher" and not config.strides and config.trajectory.teacher_steps % config.steps:
        given = f"distill.trajectory.teacher_steps={config.trajectory.teacher_steps} is no multiple of distill.steps={config.steps}"
        raise UsageError(f"{given}; the grids must nest")
    if sharded():
        _check_sharded(config)


def check_distillation(teacher: Artifact, recipe: Recipe) -> Artifact | None:
    """The student that `distill` is to start from, if any. Raises UsageError for a recipe that it could not follow to its end."""
    check_recipe(recipe)
    config = recipe.distill
    start = open_artifact(config.start, ("student",)) if config.start else None
    if start and _shape(start) != _shape(teacher):
        raise UsageError(f"distill.start={config.start}: its transformer is not of the teacher's shape")
    assert teacher.manifest.sampler is not None
    if config.size_px:
        check_size(teacher, teacher.manifest.sampler, config.size_px, "distill.size_px=")
    if start and config.follow == "start":
        _check_leader(start, teacher.manifest.sampler, config)
    _check_matching("distill", teacher, config.matching, config.batches)
    return start


def _check_leader(start: Artifact, taught: Sampler, config: DistillRecipe) -> None:
    """Raises UsageError for a student that was taught something else, and for steps that its own do not make up."""
    own, given, size_px = start.manifest.sampler, f"distill.start={config.start}", config.size_px or taught.size_px
    assert own is not None
    if own.encoder != taught.encoder:
        raise UsageError(f"{given} runs with another text encoder ({own.encoder}) than the teacher; follow what it was restructured from")
    if own.size_px != size_px:
        raise UsageError(f"{given} draws {own.size_px} px; follow it at its own size with --set distill.size_px={own.size_px}")
    there = len(own.sigmas) - 1
    if there <= config.steps:
        raise UsageError(f"{given} has {there} steps; to be followed in {config.steps} it must have more")
    if sum(config.strides) != there if config.strides else there % config.steps:
        raise UsageError(
            f"{given} has {there} steps; distill.strides must be {config.steps} numbers whose sum is that, not {config.strides}"
        )


def _shape(artifact: Artifact) -> dict[str, Any]:
    """The transformer's config without what its writer says of itself."""
    config = json.loads((artifact.path / "transformer" / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def check_unsharded() -> None:
    """Raises UsageError under an FSDP launch, which distill alone follows, and under those that nothing does."""
    check_launch()
    if sharded():
        raise UsageError("only distill shards networks with FSDP; launch with --multi_gpu, which shares out batches")


def check_finetuning(student: Artifact, recipe: Recipe) -> bool:
    """Whether `finetune` follows the teacher's trajectories. Raises UsageError for a recipe that it could not follow to its end."""
    config, sampler = recipe.finetune, student.manifest.sampler
    assert sampler is not None
    check_unsharded()
    _check_matching("finetune", student, config.matching, [config.matching.batch] if config.matching.iterations else [])
    if follows := follows_teacher(config.matching, student):
        check_nested(sampler.sigmas, shifted_grid(recipe.distill.trajectory.teacher_steps, sampler.shift))
    if not recipe.bench.per_task:
        raise UsageError("bench.per_task=0 leaves finetune nothing to choose its merge by; set it to 1 or more")
    if config.lora and config.lora.base != "float32":
        raise UsageError("finetune merges whole networks in float32; leave finetune.lora.base out")
    if config.lora and config.matching.proxy_coupling < 1:
        raise UsageError("finetune.lora with proxy_coupling < 1 would mix adapters of different networks; leave one of them out")
    return follows


def check_quantizing(source: Artifact, recipe: Recipe) -> None:
    """Raises UsageError for what a teacher cannot be calibrated by, MachineError without the library that a scheme wants."""
    config, sampler = recipe.quantize, source.manifest.sampler
    assert sampler is not None
    if sampler.guidance != 1 and (config.basis_tolerance or config.repair):
        raise UsageError(
            "quantize.basis_tolerance and quantize.repair learn from rollouts without guidance; a teacher has to do without them"
        )
    if config.scheme == "nf4" and find_spec("bitsandbytes") is None:
        raise MachineError("--scheme nf4 writes with bitsandbytes, which is not installed: pip install 'flashgen[nf4]'")


def check_exporting(source: Artifact, recipe: Recipe, target: str = "onnx", offline: bool = False) -> Sampler:
    """How the export will draw. Raises ArtifactError and UsageError for artifacts that the target cannot hold."""
    if offline and target != "web":
        raise UsageError(f"--offline has no effect on --target {target}, which downloads nothing; leave it out")
    sampler = source.manifest.sampler
    if sampler is None:
        raise ArtifactError(f"{source.path}: the manifest has no sampler; make the student again with: flashgen distill")
    if source.manifest.recipe.get("scheme") == "nf4":
        raise ArtifactError(f"{source.path} has NF4 codes, for diffusers; quantize without --scheme nf4 to export, or export the student")
    if target == "gguf":
        if sampler.scales is not None:
            raise UsageError(
                f"{source.path} scales its steps (quantize.repair), which a GGUF cannot say and its readers would not do; quantize again "
                "with --set quantize.repair=false, or export without --target gguf"
            )
    elif recipe.export.size_px:
        check_size(source, sampler, recipe.export.size_px, "export.size_px=")
        return sampler.model_copy(update={"size_px": recipe.export.size_px})
    return sampler


def _check_matching(stage: str, source: Artifact, matching: MatchingTraining, batches: list[int]) -> None:
    """Raises UsageError for what neither the networks nor the processes could follow."""
    layers = int(json.loads((source.path / "transformer" / "config.json").read_text())["num_layers"])
    if any(not 0 <= block < layers for block in matching.adversarial.blocks):
        given = f"{stage}.matching.adversarial.blocks={matching.adversarial.blocks}"
        raise UsageError(f"{given}: the transformer's blocks are 0 to {layers - 1}")
    for batch in batches:
        check_batch(batch)


def _check_sharded(config: DistillRecipe) -> None:
    """Raises UsageError for what FSDP2 cannot do."""
    mend = "set it, or launch with --multi_gpu, which shares out batches only"
    wants = {
        "distill.lora=null": config.lora is not None,  # adapters of all roles live in one network
        "distill.follow=teacher": config.follow == "start",  # a cut network has no copy to follow
        "distill.compile=false": config.compile,  # the cut network has not been tried
        "distill.correction.iterations=0": config.correction.iterations > 0,  # each process follows prompts of its own
        "distill.trajectory.muon_lr=0": config.trajectory.muon_lr > 0,  # Muon orthogonalises whole matrices
        "distill.matching.muon_lr=0": config.matching.muon_lr > 0,
        "distill.matching.proxy_muon_lr=0": config.matching.proxy_muon_lr > 0,
        "distill.matching.node_adversarial=[0]": any(config.matching.node_adversarial),  # its gradient ends inside the network
    }
    if wrong := [setting for setting, wanted in wants.items() if wanted]:
        raise UsageError(f"FSDP does not go without --set {' --set '.join(wrong)}; {mend}")


def check_size(source: Artifact, sampler: Sampler, size_px: int, option: str) -> None:
    """Raises UsageError for a size that the networks cannot draw, and warns of one that they have not learned."""
    transformer, vae = (json.loads((source.path / part / "config.json").read_text()) for part in ("transformer", "vae"))
    unit = transformer["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    largest = unit * transformer["pos_embed_max_size"]
    if size_px < unit or size_px % unit or size_px > largest:
        raise UsageError(f"{option}{size_px}: this model draws multiples of {unit} px up to {largest}; it was trained at {sampler.size_px}")
    if size_px != sampler.size_px:
        warn(f"trained at {sampler.size_px} px; at {size_px} px expect worse pictures")


def follows_teacher(matching: MatchingTraining, student: Artifact) -> bool:
    """Whether fine-tuning `student` needs the teacher's trajectories. Raises UsageError for weights that do not fit its steps."""
    assert student.manifest.sampler is not None
    try:
        return matching.wants_trajectories(len(student.manifest.sampler.sigmas) - 1)
    except ValueError as error:
        raise UsageError(f"finetune.matching: {error}") from error


def check_compiler(without: str) -> None:
    """Raises MachineError when torch.compile would find no C++ compiler; `without` is what `--set` turns compiling off with."""
    if name := missing_compiler():
        raise MachineError(
            f"torch.compile needs a C++ compiler and there is no '{name}'; install one (CXX names another), or --set {without}"
        )


def missing_compiler() -> str | None:
    """The C++ compiler that torch.compile would look for, where it is not there."""
    name = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # as torch._inductor looks for one
    return name if shutil.which(name) is None else None
