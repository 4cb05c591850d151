"""What comes out can be used: the model card's programs run as they stand there, and the LoRA file draws the student's picture."""

from __future__ import annotations

import json
import re
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from flashgen import __version__
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.families.sd3 import usage
from flashgen.families.sd3.specs import SPECS
from flashgen.flow.grid import shifted_grid
from flashgen.models import sample as sampling
from flashgen.models.pipeline import load_pipeline
from flashgen.recipe.schema import Recipe
from tests import runs
from tests.cli.command import flashgen
from tests.stages.chain import Chain, linked, micro
from tests.stages.test_generate import PROMPTS, image_psnr

TEACHER = Path(__file__).parents[1] / "fixtures" / "v0.2" / "teacher-imported" / "v0001"  # with weights so large that a step shows


def card(artifact: Artifact) -> str:
    return (artifact.path / "README.md").read_text()


def front_matter(artifact: Artifact) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(card(artifact).split("---\n")[1])
    return fields


def programs(artifact: Artifact) -> list[str]:
    """The card's Python programs."""
    return re.findall(r"```python\n(.*?)```", card(artifact), re.S)


def picture_of(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What a program of a card draws when it runs in `folder`."""
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(program, names)
    return np.asarray(names["image"])[None]


def own_picture(artifact: Artifact, program: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """flashgen's picture of the prompt in `program`, from the noise that the program's generator gives in diffusers."""
    sampler, prompt = artifact.manifest.sampler, re.search(r"^    '(.*)',$", program, re.M)
    assert sampler is not None and prompt is not None
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "latents", lambda shape, seeds: torch.randn((1, *shape), generator=torch.manual_seed(0)).numpy())
        return sampling.sample(load_pipeline(artifact.path), sampler, [prompt[1]], [0])


class Strong:
    """Students of `TEACHER` by name, each made when it is first asked for."""

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))

    def recipe(self, *more: str) -> Recipe:
        return micro(f"prompts_file={self.out / 'prompts.txt'}", "bench.per_task=0", "distill.trajectory.lr=0.01", *more)

    def student(self, name: str, *more: str) -> Artifact:
        return runs.distill(TEACHER, self.out / name, self.recipe(*more))

    @cached_property
    def dense(self) -> Artifact:
        return self.student("dense")

    @cached_property
    def lora(self) -> Artifact:
        """Trained as an adapter, with an alpha that is not its rank."""
        fast = (
            "distill.trajectory.muon_lr=0.2",
            "distill.trajectory.warmup=1",
            "distill.trajectory.ema=0",
            "distill.matching.iterations=0",
        )
        return self.student("lora", "distill.lora.rank=4", "distill.lora.alpha=12", *fast)

    @cached_property
    def strided(self) -> Artifact:
        """On a grid that no setting of diffusers' scheduler gives."""
        return self.student("strided", "distill.trajectory.teacher_steps=6", "distill.strides=[2, 1, 1, 2]")

    @cached_property
    def two_steps(self) -> Artifact:
        return self.student("two", "distill.steps=2", "distill.matching.iterations=0")

    @cached_property
    def zeros(self) -> Artifact:
        return runs.restructure(self.dense.path, self.out / "zeros", self.recipe(), mode="zeros")

    @cached_property
    def prune(self) -> Artifact:
        return runs.restructure(self.lora.path, self.out / "prune", self.recipe(), mode="prune")

    @cached_property
    def int4(self) -> Artifact:
        return runs.quantize(self.prune.path, self.out / "int4", self.recipe("quantize.method=rtn"))


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Strong:
    return Strong(tmp_path_factory.mktemp("strong"))


@pytest.mark.parametrize("name", ["dense", "lora", "strided", "two_steps", "zeros", "prune", "int4"])
def test_the_cards_program_draws_flashgens_picture(name: str, strong: Strong, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact: Artifact = getattr(strong, name)
    program = programs(artifact)[0]
    ours = own_picture(artifact, program, monkeypatch)
    assert image_psnr(picture_of(program, artifact.path, monkeypatch), ours) >= 60
    if name != "two_steps":  # its scheduler stretches any second sigma to its own
        others = re.sub(r"sigmas=.*", "sigmas=[1.0, 0.2],", program)
        assert image_psnr(picture_of(others, artifact.path, monkeypatch), ours) < 50


def plain(program: str) -> str:
    """The program with nothing but the number of steps."""
    without = re.sub(r"^pipe\.scheduler\.set_shift.*\n", "", program, flags=re.M)
    return re.sub(r"sigmas=\[(.*)\]", lambda m: f"num_inference_steps={len(m[1].split(','))}", without)


@pytest.mark.parametrize("name", ["dense", "two_steps", "prune", "int4"])
def test_the_plain_call_in_diffusers_walks_the_students_sigmas(name: str, strong: Strong, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact: Artifact = getattr(strong, name)
    program = programs(artifact)[0]
    assert "sigmas" not in plain(program)
    assert image_psnr(picture_of(plain(program), artifact.path, monkeypatch), own_picture(artifact, program, monkeypatch)) >= 60
    steps = 2 if name == "two_steps" else 4
    assert card(artifact).split("\n\n")[2].startswith(f"In diffusers `num_inference_steps={steps}, guidance_scale=1` is enough")


def test_the_scheduler_of_a_student_is_its_own_and_its_children_have_it(strong: Strong, chain: Chain) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(chain.device.path / "scheduler"))
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx(shifted_grid(4, 3.0), abs=1e-6)
    open_artifact(chain.teacher.path, verify=True)  # its scheduler was linked into the student, and is as it was
    assert "scheduler" not in linked(chain.teacher, chain.student) and "scheduler" in linked(chain.student, chain.finetuned)


def test_the_card_says_first_when_the_plain_call_is_wrong(strong: Strong, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, program = strong.strided, programs(strong.strided)[0]
    assert card(artifact).split("\n\n")[2].startswith("**In diffusers pass `sigmas` as below")
    assert image_psnr(picture_of(plain(program), artifact.path, monkeypatch), own_picture(artifact, program, monkeypatch)) < 50
    scheduler = Path("scheduler", "scheduler_config.json")
    assert (artifact.path / scheduler).read_bytes() == (TEACHER / scheduler).read_bytes()


def test_the_lora_file_draws_the_students_picture_on_the_teacher(strong: Strong, monkeypatch: pytest.MonkeyPatch) -> None:
    program = programs(strong.lora)[1].replace('"BASE"', f'"{TEACHER}"')
    ours = own_picture(strong.lora, program, monkeypatch)
    assert image_psnr(picture_of(program, strong.lora.path, monkeypatch), ours) >= 60
    without = re.sub(r"^pipe\.load_lora_weights.*\n", "", program, flags=re.M)
    assert image_psnr(picture_of(without, strong.lora.path, monkeypatch), ours) < 50


def test_the_lora_file_says_what_it_is(strong: Strong) -> None:
    student = strong.lora
    with safe_open(student.path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        facts, names = file.metadata(), set(file.keys())
        assert {min(file.get_tensor(name).shape) for name in names} == {4}
    assert facts == {
        "format": "pt", "rank": "4", "alpha": "4", "sigmas": json.dumps(shifted_grid(4, 3.0)), "flashgen_version": __version__,
        "base_digest": open_artifact(TEACHER).manifest.digest,
    }  # fmt: skip
    assert {name.split(".")[0] for name in names} == {"transformer"} and len({name.split(".lora_")[0] for name in names}) == len(names) / 2
    counted = [file.size for file in student.manifest.files if not file.path.startswith("lora/")]
    assert student.size_bytes() == sum(counted)


def test_a_dense_student_has_no_lora_file_and_its_card_says_so(strong: Strong, chain: Chain) -> None:
    adapters = ("finetune.lora.rank=2", "finetune.merge_high=[0.3]")
    merged = runs.finetune(strong.lora.path, strong.out / "merged", strong.recipe(*adapters))
    for artifact in (merged, strong.prune, chain.student):
        assert not (artifact.path / "lora").exists() and "There is no LoRA file" in card(artifact)
    assert "There is no LoRA file" not in card(strong.lora)


def test_the_card_of_an_export_draws_with_flashgen(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install, command = re.findall(r"^    (.*)$", card(chain.device), re.M)
    assert install == "pip install flashgen" and "python" not in card(chain.device)
    words = shlex.split(command.replace("picture.png", str(tmp_path / "a.png")))
    with monkeypatch.context() as patch:
        patch.chdir(chain.device.path)
        result = flashgen(*words[1:])
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["artifact"] == chain.device.manifest.digest


def test_the_card_tells_lineage_licence_and_what_was_measured(chain: Chain) -> None:
    for name, artifact in chain.items():
        if name == "teacher":
            assert not (artifact.path / "README.md").exists()
            continue
        for parent in artifact.manifest.parents:
            assert parent.digest in card(artifact)
        assert chain.teacher.manifest.digest in card(artifact)
        kind = artifact.manifest.kind
        assert front_matter(artifact) == {
            "license": "apache-2.0", "library_name": "flashgen" if kind == "device" else "diffusers", "pipeline_tag": "text-to-image",
            "tags": ["flashgen", "sd3", kind, "few-step"],
        }  # fmt: skip
    assert f"| composition.overall | {chain.student.manifest.metrics['composition']['overall']:.4g} |" in card(chain.student)
    assert "| mean_bits | " in card(chain.int4) and "| psnr_db.transformer | " in card(chain.device)


def test_the_licence_of_an_imported_teacher_applies(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = runs.import_(str(chain.teacher.path), tmp_path / "imported")
    recipe = micro("quantize.method=rtn", "bench.per_task=0")
    unknown = runs.quantize(str(teacher.path), tmp_path / "unknown", recipe)
    assert front_matter(unknown)["license"] == "unknown" and "licence of the teacher applies" in card(unknown)
    assert "pass `sigmas` as below" in card(unknown)  # a teacher takes any number of steps, so its scheduler is not set
    monkeypatch.setitem(usage.HUB_IDS, "tiny", "stabilityai/tiny")
    known = runs.quantize(str(teacher.path), tmp_path / "known", recipe)
    fields = front_matter(known)
    assert fields["base_model"] == "stabilityai/tiny" and fields["license_name"] == "stabilityai-ai-community"
    assert "Powered by Stability AI" in card(known)


@pytest.mark.parametrize("name", usage.HUB_IDS)
def test_the_weights_of_stability_ai_are_known_by_their_config(name: str) -> None:
    config = json.loads(json.dumps(SPECS[name].transformer))
    found = usage.published({key: value for key, value in config.items() if value not in (None, [])})
    assert found is not None and found.base_model == usage.HUB_IDS[name]
    assert usage.published(config | {"num_layers": 3}) is None


def test_comfyuis_scheduler_is_named_where_it_gives_the_students_sigmas(strong: Strong) -> None:
    assert usage.simple_sigmas(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert usage.simple_sigmas(3, 3.0) != pytest.approx(shifted_grid(3, 3.0), abs=1e-6)  # its table has 1000 entries
    assert "ModelSamplingSD3 with shift 3, scheduler simple, 4 steps, sampler euler, CFG 1." in card(strong.dense)
    assert "ManualSigmas, `1, 0.857143, 0.75, 0.6, 0`, sampler euler, CFG 1." in card(strong.strided)
