"""`generate --checkpoint`: the source artifact of a distillation with the averaged weights of one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from flashgen.artifact.draft import CHECKPOINTS
from flashgen.artifact.files import read_state, write_state
from flashgen.artifact.manifest import Sampler, hash_json
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import ArtifactError, UsageError
from flashgen.progress import say
from flashgen.recipe.distillation import LoraTraining
from flashgen.runtime.processes import rank

if TYPE_CHECKING:
    from flashgen.models.pipeline import Pipeline

STUDENT = Path(CHECKPOINTS, "student.state")


class StudentFacts(BaseModel):
    """Pipeline of a student in training: all networks of `source`, whose transformer gets the averaged weights or the adapter `lora`."""

    source: Path
    digest: str
    sampler: Sampler
    lora: LoraTraining | None


@dataclass(frozen=True)
class StudentCheckpoint(Artifact):
    """The source artifact as a student: its manifest has the student's sampler, and a digest of its own."""

    folder: Path
    lora: LoraTraining | None

    def load_into(self, pipe: Pipeline) -> None:
        """Give the transformer of `pipe` the averaged weights of this checkpoint. Raises ArtifactError if it is damaged."""
        from flashgen.training.checkpoint import read_numbers, read_tensors
        from flashgen.training.roles import roles_on

        read_numbers(self.folder)
        network = pipe.transformer
        if self.lora:
            _, network = roles_on(network, self.lora, "student", seed=0, targets=pipe.family.lora_targets)
        read_tensors(self.folder, {f"ema.{name}": parameter.detach() for name, parameter in network.named_parameters()})
        pipe.transformer = network.requires_grad_(False)


def describe_student(work: Path, source: Artifact, sampler: Sampler, lora: LoraTraining | None) -> None:
    """Write what `open_checkpoint` needs to draw from the checkpoints in `work`, all of a student; the first process alone writes."""
    if rank() == 0:
        facts = StudentFacts(source=source.path.absolute(), digest=source.manifest.digest, sampler=sampler, lora=lora)
        (work / CHECKPOINTS).mkdir(exist_ok=True)
        write_state(work / STUDENT, facts.model_dump_json().encode())


def describes_student(work: Path) -> bool:
    """Return True if `generate` can draw from the checkpoints in `work`."""
    return (work / STUDENT).exists()


def open_checkpoint(out: Path, name: str) -> StudentCheckpoint:
    """The checkpoint STEP or TRAINING/STEP of a run that writes, or has written, to `out`; of several the one that was written last.

    Raises UsageError when there is none, and ArtifactError when the artifact that the training began with is gone.
    """
    if not (out / ".work").is_dir():
        raise UsageError(f"--checkpoint {name}: {out} has no .work; give the folder that holds the versions, the --out of flashgen distill")
    training, _, step = name.rpartition("/")
    students = (out / ".work").glob(f"*/{STUDENT}")
    steps = {folder: int(folder.name.removeprefix("step-")) for student in students for folder in student.parent.glob("*/step-*")}
    wanted = [f for f, number in steps.items() if str(number) == step.lstrip("0") and training in ("", f.parent.name)]
    if not wanted:
        kept = ", ".join(sorted({f"{folder.parent.name}/{number}" for folder, number in steps.items()})) or "none"
        mend = "distill keeps more of them with --set checkpoint.keep=3"
        raise UsageError(f"--checkpoint {name}: {out} keeps no such checkpoint of a student; there are: {kept}; {mend}")
    folder = max(wanted, key=lambda path: path.stat().st_mtime_ns)
    try:
        facts = StudentFacts.model_validate_json(read_state(folder.parents[2] / STUDENT) or b"")
    except (OSError, ValueError, ArtifactError) as error:
        raise ArtifactError(f"{folder.parents[2] / STUDENT} is damaged ({str(error).splitlines()[0]}); run distill again") from error
    source = open_artifact(facts.source)
    if source.manifest.digest != facts.digest:
        raise ArtifactError(f"{facts.source} is not the artifact that the training of {folder} began with; put it back")
    say(f"drawing from {folder}")
    digest = hash_json([facts.digest, folder.parents[2].name, folder.parent.name, folder.name])
    manifest = source.manifest.model_copy(update={"kind": "student", "sampler": facts.sampler, "digest": digest})
    return StudentCheckpoint(source.path, manifest, folder, facts.lora)
