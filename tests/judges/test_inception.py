from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashgen.errors import ArtifactError
from flashgen.judges.base import Drawn
from flashgen.judges.features import Features
from flashgen.judges.frechet import FrechetJudge
from flashgen.judges.inception import Inception
from tests.judges.networks import inception_state

LAYOUT = "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"  # of torch-fidelity 0.4.0's class
FEATURES = [[7.695144, 2.640438], [7.869567, 2.633934]]  # features 1 and 3 of its forward with `inception_state`
MEANS = [1.622790, 1.643893]  # and the mean of all 2048


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(inception_state({name: tensor.shape for name, tensor in Inception().state_dict().items()}), path)
    return path


def test_layout_is_that_of_the_published_weights() -> None:
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in sorted(Inception().state_dict().items())]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYOUT


def test_features_agree_with_torch_fidelity(weights: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (2, 40, 52, 3), dtype=np.uint8)
    features = Features(str(weights.parent))(pictures)
    assert features.shape == (2, 2048)
    np.testing.assert_allclose(features[:, [1, 3]], FEATURES, rtol=1e-4)
    np.testing.assert_allclose(features.mean(1), MEANS, rtol=1e-4)


def test_fid_orders_pictures(weights: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [np.full((32, 32, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(4)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    judge = FrechetJudge(str(weights), tmp_path)
    noise = list(rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    same, wrong = (judge.judge(Drawn(shown, [""] * 4, range(4))).overall for shown in (pictures, noise))
    assert judge.metric == "fid"
    assert same < 1e-6 * wrong


def test_other_files_are_refused_and_code_is_not_run(weights: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"planted": Planted()}, tmp_path / "weights.pth")
    for name, content in {"planted": None, "text": b"text", "empty": b""}.items():
        if content is not None:
            (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"weights\.pth is not FID's Inception"):
            Features(str(tmp_path / "weights.pth"))
        assert not (tmp_path / "ran").exists(), name
    (tmp_path / "weights.pth").unlink()
    save_file({"fc.bias": torch.zeros(1008)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is not FID's Inception"):
        Features(str(tmp_path))
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        Features(str(tmp_path))
