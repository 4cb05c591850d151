"""The recipe: everything that the stages may be told. `flashgen.recipe.load` reads it from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from flashgen.recipe.base import Model
from flashgen.recipe.compression import ExportRecipe, QuantizeRecipe, RestructureRecipe
from flashgen.recipe.distillation import DistillRecipe, FinetuneRecipe
from flashgen.recipe.teacher import TeacherRecipe


class CheckpointRecipe(Model):
    """How often a training saves its resume state, and how many checkpoints it keeps."""

    every_s: float = Field(60.0, gt=0, description="least seconds between two checkpoints")
    share: float = Field(0.03, gt=0, le=1, description="largest share of the time that trainings may wait for them")
    keep: int = Field(
        1, ge=1, description="newest checkpoints of a training on the disk; from 2 on they outlive the run, for `generate --checkpoint`"
    )


class LogRecipe(Model):
    """Where the numbers of trainings go, beside `stats.jsonl` and the terminal. Nothing here changes what a training learns."""

    trackers: list[Literal["tensorboard", "wandb"]] | None = Field(None, description="null: TensorBoard where it is installed; none: []")
    every: int = Field(10, ge=1, description="steps that one row sums up")
    project: str = Field("flashgen", min_length=1, description="of wandb")


class ComputeRecipe(Model):
    """How the trainings of `distill`, `finetune` and `restructure-encoder` use a machine. Only `precision` and `optimizer_bits` change what
    they learn, up to the order of sums."""

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast over float32 weights that learn, bfloat16 weights that do not; losses stay in float32"
    )
    micro_batch: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0, description="samples that pass together, whose gradients add up to a batch; 0: all of a process; auto: as many as fit by plan"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, a third more time")
    optimizer_bits: Literal[32, 8] = Field(32, description="of AdamW's moments; 8 needs bitsandbytes")


class BenchRecipe(Model):
    """`bench`, and the pictures that stages draw to validate their result."""

    per_task: int = Field(20, ge=0, description="prompts per task of the world's judge; 0: nothing is scored, and a result is not drawn")
    warmup: int = Field(1, ge=0, description="pictures drawn before the measured ones")
    repeats: int = Field(5, ge=1, description="pictures measured, one at a time")
    precision: float = Field(0.025, gt=0, description="half width of a median's 95 % interval, as a share of it, that is precise enough")
    extra_s: float = Field(15.0, ge=0, description="seconds of more pictures than `repeats`, while a median is less precise than that")
    batch: int = Field(30, ge=1, description="pictures drawn together for a quality score")
    pictures: int = Field(64, ge=1, description="validation prompts of `prompts_file` that are drawn at most where a judge scores pictures")
    reference: Path | None = Field(None, description="of the judge frechet: a folder of real pictures, or a .npz file of their statistics")
    lpips: Path | None = Field(None, description="torchvision's weights of AlexNet, for LPIPS beside PSNR and SSIM; null: no LPIPS")
    judge_timeout_s: float = Field(3600.0, gt=0, description="seconds after which the program of the judge command has failed")


class PromptsRecipe(Model):
    """How `prompts_file` is read, and which of its prompts are only drawn."""

    column: str = Field("prompt", min_length=1, description="column of the prompts; a text file has one, whatever its name")
    weight: str | None = Field(None, description="column of weights in proportion to which prompts are drawn; null: equally often")
    split: str = Field("train", min_length=1, description="part of a data set of the Hugging Face Hub")
    limit: int = Field(0, ge=0, description="only so many rows are read, the first ones; 0: all")
    cache_gib: float | None = Field(
        None, ge=0, description="a pool whose embeddings would take more GiB of disk is encoded as it is drawn; null: none is"
    )
    held_out: int = Field(0, ge=0, description="different prompts that are never trained on and drawn for validation instead")


class Recipe(Model):
    """Sections by stage. A number that a stage uses is a field here."""

    name: str = Field(min_length=1)
    family: str | None = Field(None, description="model family that the recipe is for; null: any")
    prompts_file: Path | None = Field(
        None, description="prompts to train and calibrate on: .txt, .json, .jsonl, .csv, .tsv, .parquet or hf:OWNER/NAME; null: the world's"
    )
    prompts: PromptsRecipe = PromptsRecipe()
    judge: str | None = Field(None, description="what scores pictures, as in `--judge`; null: the world's judge where there is one")
    compute: ComputeRecipe = ComputeRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    log: LogRecipe = LogRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    distill: DistillRecipe = DistillRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    restructure: RestructureRecipe = RestructureRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    export: ExportRecipe = ExportRecipe()
    bench: BenchRecipe = BenchRecipe()
