"""Distances between a set of pictures and a reference set: FID (1706.08500), FD-DINOv2 (2306.04675) and CMMD (2401.09603)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flashgen.artifact.files import sha256, write_whole
from flashgen.artifact.manifest import hash_json
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.judges.base import Drawn, Judge, Judgement
from flashgen.judges.features import Features, Floats64, Picture
from flashgen.png import read_picture
from flashgen.progress import track, warn

PICTURES = {".png", ".jpg", ".jpeg"}
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # 2401.09603 sec. 4
ROWS = 1024  # of a kernel matrix at a time
NEGATIVE = 1e-6  # relative: a covariance's smallest eigenvalue may be this far below 0 by rounding


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and `factor` [K, D] of a covariance = factor^T factor."""

    mean: Floats64
    factor: Floats64

    @classmethod
    def of_features(cls, features: Floats64) -> Gaussian:
        """Mean and unbiased covariance of features [N, D], N >= 2."""
        mean = features.mean(0)
        factor = (features - mean) / np.sqrt(len(features) - 1)
        return cls(mean, np.asarray(np.linalg.qr(factor, mode="r")) if factor.shape[0] > factor.shape[1] else factor)

    @classmethod
    def of_moments(cls, mean: Floats64, covariance: Floats64) -> Gaussian:
        """Gaussian with this mean and symmetric covariance. Raises ValueError when an eigenvalue is negative beyond rounding."""
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        if values[0] < -NEGATIVE * max(values[-1], np.finfo(np.float64).tiny):
            raise ValueError(f"sigma has the eigenvalue {values[0]:.3g}")
        return cls(mean, np.sqrt(values.clip(0))[:, None] * vectors.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), FID eq. 6.

    With S = F^T F the eigenvalues of S_a S_b are the squared singular values of F_a F_b^T, so the root's trace is their sum: real and not
    negative, also for sets with fewer pictures than dimensions.
    """
    root = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + (a.factor**2).sum() + (b.factor**2).sum() - 2 * root
    return max(float(distance), 0.0)


def cmmd(a: Floats64, b: Floats64) -> float:
    """1000 MMD^2 of unit embeddings [N, D] and [M, D] with the kernel exp(-|x - y|^2 / (2 * 10^2)), biased estimate as in CMMD's code."""
    return max(CMMD_SCALE * (_mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b)), 0.0)


def _mean_kernel(a: Floats64, b: Floats64) -> float:
    """Mean of the kernel minus 1, which keeps the digits: distances of unit vectors are small against sigma."""
    squares = (b**2).sum(1)
    total = 0.0
    for start in range(0, len(a), ROWS):
        rows = a[start : start + ROWS]
        total += np.expm1(-((rows**2).sum(1)[:, None] + squares - 2 * rows @ b.T).clip(0) / (2 * CMMD_SIGMA**2)).sum()
    return float(total / (len(a) * len(b)))


class FrechetJudge(Judge):
    """Distance of the drawn pictures to a reference set; the class of the weights decides the metric (`Features`).

    The reference is a folder of .png and .jpg files, or an .npz file: `mu` [D] and `sigma` [D, D], or `embeddings` [N, D] for CMMD.
    """

    higher_is_better = False

    def __init__(self, origin: str, reference: Path, device: str = "cpu") -> None:
        """`origin`: FOLDER or hf:OWNER/NAME. Reads every picture of the reference once, so that a broken one is found before any is drawn.

        Raises ArtifactError for weights of another class and for a reference that is missing, empty, broken or of another shape.
        """
        self.features, self.reference = Features(origin, device), reference
        self.metric = self.features.metric
        self._warned = False
        if reference.is_dir():
            self._files = sorted(path for path in reference.iterdir() if path.suffix.lower() in PICTURES)
            if len(self._files) < self._least:
                raise ArtifactError(f"{reference} has {len(self._files)} .png or .jpg files; {self.metric} needs at least {self._least}")
            self._digest = hash_json([(path.name, sha256(path)) for path, _ in zip(self._files, self._pictures("checking"), strict=True)])
        elif reference.is_file():
            self._saved = self._read_saved()
            self._digest = sha256(reference)
        else:
            raise ArtifactError(f"there is no reference {reference}; give a folder of pictures or an .npz of statistics (bench.reference)")

    def identity(self) -> dict[str, Any]:
        """Metric, digest of the weights and digest of the reference."""
        return {"metric": self.metric, "weights": self.features.weights.digest, "reference": self._digest}

    def judge(self, drawn: Drawn) -> Judgement:
        """Distance of the set, in `overall`; a single picture has none."""
        count, dimensions = len(drawn.pictures), self.features.dimensions
        if count < self._least:
            raise UsageError(f"{self.metric} of {count} pictures is not defined; draw at least {self._least}")
        if self.metric != "cmmd" and count <= dimensions and not self._warned:
            self._warned = True
            warn(
                f"{self.metric} of {count} pictures in {dimensions} dimensions is biased upwards; compare it at the same number of pictures"
            )
        features = self._finite(self.features(track(drawn.pictures, self.metric, total=count)), "the drawn pictures")
        reference = self._reference
        distance = (
            frechet_distance(Gaussian.of_features(features), reference) if isinstance(reference, Gaussian) else cmmd(features, reference)
        )
        return Judgement(None, {"overall": distance})

    def save_reference(self, path: Path) -> None:
        """Write the statistics of the reference pictures to `path` (.npz), with the digest of the weights that they belong to."""
        reference = self._reference
        values: dict[str, Any] = (
            {"mu": reference.mean, "sigma": reference.factor.T @ reference.factor}
            if isinstance(reference, Gaussian)
            else {"embeddings": reference}
        )
        buffer = io.BytesIO()
        np.savez(buffer, metric=np.array(self.metric), weights=np.array(self.features.weights.digest), **values)
        write_whole(path, buffer.getbuffer())

    @property
    def _least(self) -> int:
        """Number of pictures below which the metric is not defined."""
        return 1 if self.metric == "cmmd" else 2

    @cached_property
    def _reference(self) -> Gaussian | Floats64:
        if self.reference.is_file():
            return self._saved
        features = self._finite(self.features(self._pictures(f"{self.metric} of the reference")), f"the pictures of {self.reference}")
        return features if self.metric == "cmmd" else Gaussian.of_features(features)

    def _pictures(self, label: str) -> Iterator[Picture]:
        for path in track(self._files, label, total=len(self._files)):
            try:
                picture = read_picture(path, ("PNG", "JPEG"))
            except (OSError, ValueError) as error:
                raise ArtifactError(f"reference picture {path} cannot be read ({error}); replace or remove it") from error
            yield picture

    def _read_saved(self) -> Gaussian | Floats64:
        """Statistics of the .npz file, checked."""
        name, size = self.reference, self.features.dimensions
        shapes = {"embeddings": (-1, size)} if self.metric == "cmmd" else {"mu": (size,), "sigma": (size, size)}
        try:
            with np.load(name, allow_pickle=False) as file:
                values = {key: np.asarray(file[key], np.float64) for key in shapes}
                of = str(file["weights"]) if "weights" in file else self.features.weights.digest
        except KeyError as error:
            raise ArtifactError(f"{name} has no {error.args[0]}; {self.metric} needs {' and '.join(shapes)}") from error
        except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{name} is no .npz of statistics ({error}); give one, or a folder of pictures") from error
        for key, shape in shapes.items():
            found = values[key].shape
            if len(found) != len(shape) or any(want not in (-1, side) for want, side in zip(shape, found, strict=True)) or not found[0]:
                raise ArtifactError(f"{name}: {key} has the shape {list(found)}, and {self.metric} of these weights has {size} dimensions")
            if not np.isfinite(values[key]).all():
                raise ArtifactError(f"{name}: {key} has values that are not finite; compute the statistics again")
        if of != self.features.weights.digest:
            raise ArtifactError(f"{name} has statistics of other weights than {self.features.weights.origin}; compute them again")
        try:
            return values["embeddings"] if self.metric == "cmmd" else Gaussian.of_moments(values["mu"], values["sigma"])
        except (ValueError, np.linalg.LinAlgError) as error:
            raise ArtifactError(f"{name}: sigma is no covariance ({error}); compute the statistics again") from error

    def _finite(self, features: Floats64, of: str) -> Floats64:
        finite = np.isfinite(features).all(1)
        if not finite.all():
            raise NumericsError(f"features of {of} are not finite (number {int(np.argmin(finite))}); check the weights and the pictures")
        return features
