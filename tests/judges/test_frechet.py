from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import linalg

from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.judges.base import Drawn
from flashgen.judges.features import Features
from flashgen.judges.frechet import FrechetJudge, Gaussian, cmmd, frechet_distance

Pictures = list[NDArray[np.uint8]]


def scenes(seed: int, count: int) -> Pictures:
    """Rectangles of a random colour on grey, 64 x 64 px."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        picture = np.full((64, 64, 3), 200, np.uint8)
        top, left = rng.integers(0, 32, 2)
        picture[top : top + 24, left : left + 24] = rng.integers(0, 256, 3)
        pictures.append(picture)
    return pictures


def noise(count: int) -> Pictures:
    return list(np.random.default_rng(9).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def drawn(pictures: Pictures) -> Drawn:
    return Drawn(pictures, ["a prompt"] * len(pictures), range(len(pictures)))


def save(pictures: Pictures, folder: Path) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:04}.png")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(scenes(0, 40), tmp_path_factory.mktemp("reference") / "pictures")


def frechet_by_matrix_root(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """FID eq. 6 as it is written, by scipy's matrix square root."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real))


def cmmd_pair_by_pair(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    def mean(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float(np.mean([np.exp(-np.sum((p - q) ** 2) / 200) for p in x for q in y]))

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


class Extractor(torch.nn.Module):
    """Features as torchmetrics asks for them: uint8 [B, 3, H, W] to [B, D]."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features, self.num_features = features, features.dimensions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.features(list(x.permute(0, 2, 3, 1).numpy())))


def test_frechet_distance_agrees_with_torchmetrics(dinov2: Path, reference: Path) -> None:
    from torchmetrics.image import fid

    pictures = scenes(1, 30)
    metric = fid.FrechetInceptionDistance(Extractor(Features(str(dinov2))))
    for part, real in ((scenes(0, 40), True), (pictures, False)):
        metric.update(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2), real=real)
    judged = FrechetJudge(str(dinov2), reference).judge(drawn(pictures))
    assert judged.values is None
    assert judged.overall == pytest.approx(float(metric.compute()), rel=1e-5)
    assert judged.overall > 1e-4


def test_frechet_distance_agrees_with_scipy_and_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 12)) @ rng.standard_normal((12, 12)), rng.standard_normal((70, 12)) + 1
    one, two = Gaussian.of_features(a), Gaussian.of_features(b)
    assert frechet_distance(one, two) == pytest.approx(frechet_by_matrix_root(a, b), rel=1e-8)
    saved = Gaussian.of_moments(b.mean(0), np.cov(b, rowvar=False))
    assert frechet_distance(one, saved) == pytest.approx(frechet_by_matrix_root(a, b), rel=1e-8)
    diagonal = [Gaussian(np.full(3, m), np.diag([s, s, s])) for m, s in ((0.0, 1.0), (2.0, 4.0))]
    assert frechet_distance(*diagonal) == pytest.approx(3 * (2**2 + (4 - 1) ** 2), rel=1e-12)


def test_frechet_distance_is_real_for_fewer_pictures_than_dimensions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 64)), rng.standard_normal((7, 64))
    one, two = Gaussian.of_features(a), Gaussian.of_features(b)
    eigenvalues = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    largest = np.sort(np.abs(eigenvalues))[::-1][:4]  # the rest is rounding: 5 pictures span 4 dimensions
    squares = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False))
    assert frechet_distance(one, two) == pytest.approx(squares - 2 * np.sqrt(largest).sum(), rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-8)


def test_cmmd_agrees_with_the_formula_over_more_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.judges.frechet.ROWS", 4)
    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.standard_normal((9, 6)), rng.standard_normal((7, 6)) + 0.3))
    assert cmmd(a, b) == pytest.approx(cmmd_pair_by_pair(a, b), rel=1e-9)
    assert cmmd(a, a) == 0


def test_cmmd_of_pictures_agrees_with_float64_embeddings(clip: Path, reference: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).double().eval()
    mean, std = (np.array(x) for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))

    def embeddings(pictures: Pictures) -> NDArray[np.float64]:
        small = [np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC)) for picture in pictures]
        pixels = torch.tensor((np.stack(small) / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            x = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).numpy()
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))

    pictures = scenes(1, 12)
    wide = [np.pad(picture, ((0, 0), (3, 3), (0, 0))) for picture in pictures]  # only the central square is seen
    expected = cmmd_pair_by_pair(embeddings(pictures), embeddings(scenes(0, 40)))
    assert FrechetJudge(str(clip), reference).judge(drawn(wide)).overall == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", ["dinov2", "clip"])
def test_wrong_pictures_are_farther_than_the_right_ones(weights: str, reference: Path, request: pytest.FixtureRequest) -> None:
    judge = FrechetJudge(str(request.getfixturevalue(weights)), reference)
    same, others = judge.judge(drawn(scenes(0, 40))).overall, judge.judge(drawn(scenes(1, 40))).overall
    black, once = [np.zeros((64, 64, 3), np.uint8)] * 40, scenes(0, 1) * 40
    assert same == pytest.approx(0, abs=1e-6 * others + 1e-9)
    for wrong in (noise(40), black, once):
        assert judge.judge(drawn(wrong)).overall > 2 * others
    assert judge.better(others) < judge.better(same), "a smaller distance is better"
    assert judge.metric == {"dinov2": "fd_dinov2", "clip": "cmmd"}[weights]


@pytest.mark.parametrize("weights", ["dinov2", "clip"])
def test_saved_statistics_give_the_same_distance(weights: str, reference: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    judge = FrechetJudge(str(request.getfixturevalue(weights)), reference)
    judge.save_reference(tmp_path / "statistics.npz")
    saved = FrechetJudge(str(request.getfixturevalue(weights)), tmp_path / "statistics.npz")
    assert saved.judge(drawn(scenes(1, 30))).overall == pytest.approx(judge.judge(drawn(scenes(1, 30))).overall, rel=1e-9)
    assert saved.identity()["weights"] == judge.identity()["weights"] and saved.identity() != judge.identity()


def test_statistics_of_other_weights_are_refused(dinov2: Path, reference: Path, tmp_path: Path) -> None:
    FrechetJudge(str(dinov2), reference).save_reference(tmp_path / "statistics.npz")
    copy = shutil.copytree(dinov2, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in state.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="statistics of other weights than"):
        FrechetJudge(str(copy), tmp_path / "statistics.npz")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mu": np.zeros(16)}, "has no sigma.*; fd_dinov2 needs mu and sigma"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, r"mu has the shape \[2048\], and fd_dinov2 of these weights has 16 dimensions"),
        ({"mu": np.zeros(16), "sigma": np.ones(16)}, r"sigma has the shape \[16\]"),
        ({"mu": np.full(16, np.nan), "sigma": np.eye(16)}, "mu has values that are not finite"),
        ({"mu": np.zeros(16), "sigma": -np.eye(16)}, r"sigma is no covariance \(sigma has the eigenvalue -1\)"),
        ({"mu": np.array([{}] * 16), "sigma": np.eye(16)}, "is no .npz of statistics"),
    ],
)
def test_wrong_statistics_are_refused(values: dict[str, NDArray[np.float64]], message: str, dinov2: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", **values)  # type: ignore[arg-type]  # numpy's stub reads a name as allow_pickle
    with pytest.raises(ArtifactError, match=message):
        FrechetJudge(str(dinov2), tmp_path / "statistics.npz")


def test_file_that_holds_no_statistics_is_refused(dinov2: Path, tmp_path: Path) -> None:
    for content in (b"", b"no zip", b"PK\x03\x04 cut"):
        (tmp_path / "statistics.npz").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"is no \.npz of statistics"):
            FrechetJudge(str(dinov2), tmp_path / "statistics.npz")


def test_wrong_references_are_refused_before_any_picture_is_drawn(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no reference"):
        FrechetJudge(str(dinov2), tmp_path / "nowhere")
    folder = save(scenes(0, 1), tmp_path / "pictures")
    (folder / "notes.txt").write_text("no picture")
    with pytest.raises(ArtifactError, match=r"has 1 \.png or \.jpg files; fd_dinov2 needs at least 2"):
        FrechetJudge(str(dinov2), folder)
    whole = (folder / "0000.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (folder / "0001.png").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"reference picture .*0001\.png cannot be read"):
            FrechetJudge(str(dinov2), folder)


def test_grey_and_transparent_pictures_are_read_as_rgb(dinov2: Path, tmp_path: Path) -> None:
    folder = save([], tmp_path / "pictures")
    Image.fromarray(scenes(0, 1)[0]).convert("RGBA").save(folder / "a.png")
    Image.fromarray(scenes(0, 1)[0]).convert("L").save(folder / "b.JPG")
    judge = FrechetJudge(str(dinov2), folder)
    grey = np.repeat(np.asarray(Image.open(folder / "b.JPG"))[..., None], 3, 2)
    assert judge.judge(drawn([scenes(0, 1)[0], grey])).overall == pytest.approx(0, abs=1e-9)


def test_too_few_pictures_end_in_a_sentence_or_a_warning(
    dinov2: Path, clip: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = FrechetJudge(str(dinov2), reference)
    for count in (0, 1):
        with pytest.raises(UsageError, match=f"fd_dinov2 of {count} pictures is not defined; draw at least 2"):
            judge.judge(drawn(scenes(1, count)))
    assert not capsys.readouterr().err
    for _ in range(2):
        judge.judge(drawn(scenes(1, 16)))
    assert capsys.readouterr().err.count("warning: fd_dinov2 of 16 pictures in 16 dimensions") == 1
    judge = FrechetJudge(str(clip), reference)
    assert "sees 32 px; published CMMD values are of CLIP ViT-L/14 at 336 px" in capsys.readouterr().err
    assert judge.judge(drawn(scenes(1, 1))).overall > 0
    with pytest.raises(UsageError, match="cmmd of 0 pictures"):
        judge.judge(drawn([]))


def test_features_that_are_not_finite_end_in_a_sentence(dinov2: Path, reference: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dinov2, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    save_file(state | {"layernorm.bias": state["layernorm.bias"] + torch.inf}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"features of the drawn pictures are not finite \(number 0\)"):
        FrechetJudge(str(copy), reference).judge(drawn(scenes(1, 2)))


def test_weights_of_another_class_are_refused(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTModel"], "model_type": "vit"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"has ViTModel \(vit\); sets of pictures are compared by FID's Inception"):
        FrechetJudge(str(tmp_path), reference)
