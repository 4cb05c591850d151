"""bench.json as `flashgen bench` writes it; what it does not have is empty or None here."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from flashgen.errors import ArtifactError

Interval = tuple[float, float] | None
Numbers = dict[str, float | None]  # by name: of a phase, of a component, of a part of a score


class Prompt(BaseModel):
    """Picture i of every artifact shows prompt i, drawn from the noise of its seed."""

    prompt: str
    seed: int
    task: str | None = None


class Ancestor(BaseModel):
    """A version of an artifact: the one measured, or one that it was made from."""

    stage: str | None = None
    path: str | None = None
    version: str | int | None = None
    digest: str | None = None
    seed: int | None = None


class Origin(BaseModel):
    """Where a score comes from."""

    judge: Any = None
    pictures: int | None = None
    higher_is_better: bool = True


class Estimate(BaseModel):
    """A mean over pictures."""

    mean: float | None = None
    interval: Interval = None


class Result(BaseModel):
    """Everything measured of one artifact. Latencies are in seconds, memory in MiB, `bytes` in bytes."""

    artifact: str
    name: str
    engine: str | None = None
    device: str | None = None
    threads: int | None = None
    size_px: str | int | None = None
    steps: int | None = None
    size_mib: float | None = None
    bytes: Numbers = {}
    lineage: list[Ancestor] = []
    latency_s: Numbers = {}
    latency_interval_s: dict[str, Interval] = {}
    peak_rss_mib: float | None = None
    peak_phase_mib: Numbers = {}
    quality: dict[str, Numbers | str] = {}
    quality_interval: dict[str, dict[str, Interval]] = {}
    quality_of: dict[str, Origin] = {}
    values: dict[str, list[float | None]] = {}
    fidelity: dict[str, Estimate | str | None] | None = None
    pictures: str | None = None

    def scores(self, metric: str) -> Numbers:
        """Score and parts of `metric`; empty where it was not judged."""
        scores = self.quality.get(metric)
        return scores if isinstance(scores, dict) else {}

    def interval(self, metric: str, part: str = "overall") -> Interval:
        """Interval of one score of `metric`."""
        return self.quality_interval.get(metric, {}).get(part)


class Bench(BaseModel):
    """The whole file."""

    version: Literal[1]
    machine: dict[str, Any] = {}
    command: str = ""
    settings: dict[str, Any] = {}
    prompts: list[Prompt] = []
    results: list[Result] = Field(min_length=1)

    @property
    def letters(self) -> list[str]:
        """A short sign per artifact, for plots: A to Z, then A1 to Z1."""
        return [string.ascii_uppercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(len(self.results))]

    @property
    def labels(self) -> list[str]:
        """Sign and name per artifact."""
        return [f"{letter} {result.name}" for letter, result in zip(self.letters, self.results, strict=True)]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order in which they appear."""
        return list(dict.fromkeys(metric for result in self.results for metric in result.quality))

    def higher_is_better(self, metric: str) -> bool | None:
        """Direction of `metric`, as the first artifact with a direction has it; None where nothing was judged."""
        return next((r.quality_of[metric].higher_is_better for r in self.results if metric in r.quality_of), None)


def read_bench(out: Path) -> Bench:
    """bench.json of the folder `out`. Raises ArtifactError where it is missing, cut, or not of `flashgen bench`."""
    path = out / "bench.json"
    mend = f"run flashgen bench again with --out {out}"
    try:
        return Bench.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {mend}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path} is not a whole bench.json of version 1 ({where + ': ' if where else ''}{first['msg']}); {mend}"
        ) from error
