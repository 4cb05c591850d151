"""The seam between flashgen and a world: prompts, a judge of pictures, and perhaps a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flashgen.judges.base import Judgement, Pictures


class TeacherData(ABC):
    """Data with which a world trains a small teacher of its own (`teacher train`)."""

    words: Sequence[str]  # of its prompts; a single token each
    field_sizes: Sequence[int]  # number of classes of each thing that a prompt's token can tell
    num_phrases: int  # number of phrases that a prompt can name

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> list[Any]:
        """Random requests, which the methods below take."""

    @abstractmethod
    def caption(self, request: Any) -> str:
        """The prompt of a request."""

    @abstractmethod
    def token_classes(self, request: Any, length: int) -> list[list[int]]:
        """Class of every field for each of the prompt's first `length` tokens, [length, fields]."""

    @abstractmethod
    def phrases(self, request: Any) -> list[float]:
        """1 for each phrase that the prompt names, else 0; [num_phrases]."""

    @abstractmethod
    def pictures(self, rng: np.random.Generator, count: int) -> Pictures:
        """Random pictures for the autoencoder."""

    @abstractmethod
    def captioned_pictures(self, rng: np.random.Generator, count: int) -> tuple[Pictures, list[str]]:
        """Random pictures and their prompts for the transformer."""


class World(ABC):
    """A closed set of prompts that a judge can score exactly. An artifact names its world, or none."""

    name: ClassVar[str]  # in manifests
    recipe: ClassVar[str]  # the default recipe of its artifacts
    tasks: ClassVar[tuple[str, ...]]  # what the judge scores apart

    @abstractmethod
    def teacher(self) -> Path:
        """Version folder of the embedded teacher."""

    @abstractmethod
    def training_prompts(self, rng: np.random.Generator, count: int) -> list[str]:
        """`count` random prompts to train or calibrate on."""

    @abstractmethod
    def prompts(self, seed: int, per_task: int) -> list[str]:
        """`per_task` prompts of each task, in the order of `tasks`; a function of `seed`."""

    @abstractmethod
    def judge(self, pictures: Pictures | Sequence[Pictures], prompts: Sequence[str]) -> Judgement:
        """Judge picture i against prompt i. Raises ValueError for a prompt that is not of this world."""

    @abstractmethod
    def teacher_data(self) -> TeacherData:
        """Training data of a teacher of this world."""
