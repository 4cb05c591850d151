"""Every torch stage, drawing and measuring on the pretend device: python -m tests.accelerator.on_pretend_device CASE FOLDER

A tensor that stays on the CPU and meets one of the device raises there, as on a GPU. What comes out must equal what the CPU gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pytest import approx

from flashgen.artifact.store import Artifact, open_artifact
from flashgen.metrics.worker import Job, Session
from flashgen.training import ranks
from tests import runs
from tests.accelerator import pretend_device
from tests.stages.chain import micro

LORA = "distill.lora={rank: 4}"
HEADS = "distill.matching.node_adversarial=[1, 0, 1, 1]"
EVERY_TERM = (HEADS, "distill.matching.augmentation=decoupled", "distill.matching.node_trajectory=[0, 1, 0, 0]", "distill.matching.ida=0.9")
MICRO_BATCHES = ("compute.micro_batch=2", "compute.activation_checkpointing=true")
GPTQ = ("quantize.method=gptq", "quantize.low_rank_tolerance=0.5", "quantize.step_scales=true", "quantize.prompts=4", "quantize.group=16")
CASES = {
    "dense": ("distill", "teacher", (*EVERY_TERM, *MICRO_BATCHES, "distill.on_policy.iterations=1", "distill.on_policy.prompts=8"), {}),
    "adapters": ("distill", "teacher", (LORA, HEADS, *MICRO_BATCHES), {}),
    "finetune": ("finetune", "student", ("finetune.matching.node_adversarial=[1]", "finetune.merge_high=[0.7]"), {}),
    "finetune adapters": ("finetune", "student", ("finetune.lora={rank: 4}", "finetune.merge_high=[0.7]"), {}),
    "zeros": ("restructure", "student", ("restructure.floor=0",), {"mode": "zeros"}),
    "prune": ("restructure", "student", ("restructure.floor=0", "compute.micro_batch=2"), {"mode": "prune"}),
    "compact": ("restructure", "student", ("restructure.floor=0",), {"mode": "compact"}),
    "gptq": ("quantize", "student", GPTQ, {}),
    "budget": ("quantize", "student", (*GPTQ[2:], "quantize.budget=5", "quantize.choices=[3, 4, 8]"), {}),
}  # fmt: skip


def made(case: str, out: Path, device: str) -> Artifact:
    """The artifact of a case, made on `device` from inputs that the CPU made."""
    stage, source, settings, options = CASES[case]
    inputs = {"teacher": out / "teacher", "student": out / "student"}
    with_device = runs.DEVICE.set("cpu")
    if not inputs["teacher"].exists():
        runs.random("tiny", inputs["teacher"])
    if source == "student" and not inputs["student"].exists():
        runs.distill(inputs["teacher"], inputs["student"], micro())
    runs.DEVICE.reset(with_device)
    token = runs.DEVICE.set(device)
    try:
        return getattr(runs, stage)(inputs[source], out / f"{case}-{device[:3]}", micro(*settings), **options)  # type: ignore[no-any-return]
    finally:
        runs.DEVICE.reset(token)


def compare(one: Artifact, other: Artifact) -> None:
    """Curves must be equal up to the order of sums, and so must the error of quantized weights, whose codes may differ at a tie."""
    if "latent_error" in one.manifest.metrics:
        error, found = ({k: a.manifest.metrics[k] for k in ("latent_error", "packed_bytes")} for a in (one, other))
        assert found == approx(error, rel=0.1), (error, found)
        return
    curves = [artifact.path / "stats.jsonl" for artifact in (one, other)]
    assert curves[0].exists() == curves[1].exists() == ("zeros" not in one.manifest.recipe.get("mode", ""))
    if curves[0].exists():
        rows = ([json.loads(row) for row in file.read_text().splitlines()] for file in curves)
        for a, b in zip(*rows, strict=True):
            assert (a.pop("phase"), a.pop("step")) == (b.pop("phase"), b.pop("step"))
            for key in ("time", "machine"):
                del a[key], b[key]
            assert b == approx(a, rel=2e-3, abs=1e-6), (a, b)


def main(case: str, out: Path) -> None:
    """Run one case on both devices and compare."""
    device = str(pretend_device.DEVICE)
    if case == "draw":
        teacher = runs.random("tiny", out / "teacher")
        pictures = []
        for name in ("cpu", device):
            runs.generate(
                teacher.path,
                ["a red circle", "a blue square"],
                out / f"{name[:3]}.png",
                steps=3,
                guidance=2.0,
                negative="a dog",
                device=name,
            )
            pictures.append(np.stack([np.asarray(Image.open(out / f"{name[:3]}-{i}.png")) for i in (1, 2)]).astype(int))
        assert abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 5
        assert teacher.manifest.sampler is not None
        session = Session(Job(str(teacher.path), "torch", tuple(teacher.manifest.sampler.sigmas), device=device))
        assert session.draw(["a red circle"], [0], 1).shape == (1, 64, 64, 3) and session.record()["laps"]["step"][0] > 0
        return
    compare(made(case, out, "cpu"), made(case, out, device))
    assert open_artifact(out / "teacher").manifest.kind == "teacher"


if __name__ == "__main__":
    if "--planted" in sys.argv:  # as if one `.to(device)` were missing: noise stays on the CPU
        ranks.Draws._own = lambda self, full: full[self.part]  # type: ignore[method-assign]
    main(sys.argv[1], Path(sys.argv[2]))
