"""Base classes of recipe sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]


class Model(BaseModel):
    """A recipe section: unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Training(Model):
    """Numbers that every training has."""

    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="norm to which gradients are clipped")
    warmup: int = Field(20, ge=1, description="updates over which the learning rates rise")
    lr_floor: float = Field(0.02, ge=0, le=1, description="share of the learning rates at which their decay ends")
