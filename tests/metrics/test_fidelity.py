"""PSNR, SSIM and LPIPS against definitions, against scikit-image, and against a forward pass by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashgen.errors import UsageError
from flashgen.metrics.fidelity import fidelity, lpips, psnr_db, ssim

RNG = np.random.default_rng(0)
A = RNG.integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
B = np.clip(A.astype(int) + RNG.integers(-60, 61, A.shape), 0, 255).astype(np.uint8)


def test_psnr_is_that_of_its_definition() -> None:
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr_db(flat, flat + np.uint8(5)), 20 * np.log10(255 / 5), rtol=1e-12)
    assert psnr_db(A, A).tolist() == [100, 100, 100]


def test_ssim_is_1_for_equal_pictures_and_that_of_the_formula_for_flat_ones() -> None:
    np.testing.assert_allclose(ssim(A, A), 1, rtol=1e-12)
    flat, c1 = np.full((1, 16, 16, 3), 100, np.uint8), (0.01 * 255) ** 2
    np.testing.assert_allclose(ssim(flat, flat + np.uint8(50)), (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), rtol=1e-9)


def test_ssim_is_that_of_windows_weighted_one_by_one() -> None:
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (np.outer(g, g) / g.sum() ** 2)[..., None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    x_all, y_all, values = A[0].astype(float), B[0].astype(float), []
    for top in range(40 - 10):
        for left in range(56 - 10):
            x, y = (z[top : top + 11, left : left + 11] for z in (x_all, y_all))
            mx, my = (np.sum(window * z, (0, 1)) for z in (x, y))
            vx, vy = (np.sum(window * (z - m) ** 2, (0, 1)) for z, m in ((x, mx), (y, my)))
            cov = np.sum(window * (x - mx) * (y - my), (0, 1))
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    np.testing.assert_allclose(ssim(A[:1], B[:1]), np.mean(values), rtol=1e-10)


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 2}
    np.testing.assert_allclose(ssim(A, B), [metrics.structural_similarity(a, b, **how) for a, b in zip(A, B, strict=True)], rtol=1e-10)


def test_fidelity_has_means_and_intervals_and_lpips_only_with_weights() -> None:
    found = fidelity(A, B, ["a", "b", "c"], None)
    assert set(found) == {"psnr_db", "ssim"}
    for name, values in (("psnr_db", psnr_db(A, B)), ("ssim", ssim(A, B))):
        low, high = found[name]["interval"]
        assert found[name]["mean"] == pytest.approx(values.mean()) and low < values.mean() < high


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UsageError, match="3 pictures cannot be compared with 2"):
        psnr_db(A, B[:2])
    with pytest.raises(UsageError, match="pictures of 56x40 and 40x56 px"):
        ssim(A, B.transpose(0, 2, 1, 3))
    with pytest.raises(UsageError, match="at least 11 px, not 56x8"):
        ssim(A[:, :8], B[:, :8])


def test_lpips_without_weights_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"needs the weights of AlexNet, and .*absent\.pth is no file; name a copy of torchvision's alexnet"
    ):
        lpips(A, B, tmp_path / "absent.pth")


def test_lpips_reads_torchvisions_file_and_refuses_others(tmp_path: Path) -> None:
    package = pytest.importorskip("lpips")
    import torch
    from torchvision.models import alexnet

    torch.manual_seed(0)
    net, file = alexnet(), tmp_path / "alexnet.pth"
    torch.save(net.state_dict(), file)
    a, b = (np.kron(x[:, :32, :32], np.ones((1, 2, 2, 1), np.uint8)) for x in (A, B))
    found = lpips(a, b, file)
    head = torch.load(Path(package.__file__).with_name("weights") / "v0.1" / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(3)
    x, y = (((torch.from_numpy(z).float() / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2) for z in (a, b))
    with torch.no_grad():
        taps = 0
        for layer in net.features:
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                difference = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)).nan_to_num() ** 2
                total += (difference * head[f"lin{taps}.model.1.weight"][0]).sum(1).mean((1, 2))
                taps += 1
    np.testing.assert_allclose(found, total.numpy(), rtol=1e-4)
    assert (found > 0).all() and lpips(a, a, file).tolist() == [0, 0, 0]
    for content, message in (({"features.0.weight": torch.zeros(1)}, "has no tensor"), ([1], "no state dict"), (net, "tensors alone")):
        torch.save(content, file)
        with pytest.raises(UsageError, match=message):
            lpips(a, b, file)
