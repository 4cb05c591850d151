"""The recipe: everything that the stages may be told. `flashgen.recipe.load` reads it from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from flashgen.recipe.base import Model
from flashgen.recipe.compression import ExportRecipe, QuantizeRecipe, RestructureRecipe
from flashgen.recipe.distillation import DistillRecipe, FinetuneRecipe
from flashgen.recipe.teacher import TeacherRecipe


class CheckpointRecipe(Model):
    """How often a training saves its resume state."""

    every_s: float = Field(60.0, gt=0, description="least seconds between two checkpoints")
    share: float = Field(0.03, gt=0, le=1, description="largest share of the time that writing them may take")


class ComputeRecipe(Model):
    """How the trainings of `distill`, `finetune` and `restructure-encoder` use a machine. Only `precision` changes what they learn."""

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast over float32 weights that learn, bfloat16 weights that do not; losses stay in float32"
    )
    micro_batch: int = Field(0, ge=0, description="samples that pass together, whose gradients add up to a batch; 0: all of a process")
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, a third more time")


class BenchRecipe(Model):
    """`bench`, and the pictures that stages draw to validate their result."""

    per_task: int = Field(20, ge=0, description="prompts per task of the world's judge; 0: stages draw and score nothing")
    warmup: int = Field(1, ge=0, description="pictures drawn before the measured ones")
    repeats: int = Field(5, ge=1, description="pictures measured, one at a time")
    batch: int = Field(30, ge=1, description="pictures drawn together for a quality score")


class Recipe(Model):
    """Sections by stage. A number that a stage uses is a field here."""

    name: str = Field(min_length=1)
    family: str | None = Field(None, description="model family that the recipe is for; null: any")
    prompts_file: Path | None = Field(None, description="prompts to train and calibrate on, one per line; null: the world's")
    compute: ComputeRecipe = ComputeRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    distill: DistillRecipe = DistillRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    restructure: RestructureRecipe = RestructureRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    export: ExportRecipe = ExportRecipe()
    bench: BenchRecipe = BenchRecipe()
