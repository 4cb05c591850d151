"""How close pictures are to those of a reference with the same prompts and seeds: PSNR, SSIM, LPIPS."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import UsageError
from flashgen.judges.base import Pictures
from flashgen.metrics.intervals import intervals

Values = NDArray[np.float64]
MAX_PSNR_DB = 100.0  # of equal pictures, whose PSNR is infinite, and of nearly equal ones (our choice)
WINDOW_PX, SIGMA_PX, PEAK = 11, 1.5, 255.0


def fidelity(
    a: Pictures | Sequence[Pictures], b: Pictures | Sequence[Pictures], prompts: Sequence[str], weights: Path | None
) -> dict[str, Any]:
    """{"psnr_db": {"mean", "interval"}, "ssim": ..., "lpips": ...} of pictures `a` against the reference `b`; lpips with `weights` alone.

    Raises as the functions below do.
    """
    found = {"psnr_db": psnr_db(a, b), "ssim": ssim(a, b)} | ({} if weights is None else {"lpips": lpips(a, b, weights)})
    return {name: {"mean": float(values.mean()), "interval": intervals(values, prompts)["overall"]} for name, values in found.items()}


def psnr_db(a: Pictures | Sequence[Pictures], b: Pictures | Sequence[Pictures]) -> Values:
    """Peak signal-to-noise ratio in dB per picture [N]: 10 log10(255^2 / MSE) over all pixels and channels, at most 100 dB."""
    errors = np.array([np.mean((x.astype(np.float64) - y) ** 2) for x, y in _pairs(a, b)])
    return np.asarray(np.minimum(10 * np.log10(PEAK**2 / np.maximum(errors, 1e-12)), MAX_PSNR_DB))


def ssim(a: Pictures | Sequence[Pictures], b: Pictures | Sequence[Pictures]) -> Values:
    """Structural similarity per picture [N], at most 1 (Wang et al. 2004, eq. 13): Gaussian window of 11 x 11 px, sigma 1.5 px.

    The mean is over the windows that lie inside of the picture and over the three channels; Wang et al. have one, of grey.
    Raises UsageError for sides below 11 px.
    """
    from scipy.ndimage import gaussian_filter

    def blur(x: Values) -> Values:
        edge = WINDOW_PX // 2
        blurred = gaussian_filter(x, (SIGMA_PX, SIGMA_PX, 0), radius=(edge, edge, 0))
        return np.asarray(blurred[edge:-edge, edge:-edge])

    values, (c1, c2) = [], ((k * PEAK) ** 2 for k in (0.01, 0.03))
    for x, y in ((x.astype(np.float64), y.astype(np.float64)) for x, y in _pairs(a, b)):
        if min(x.shape[:2]) < WINDOW_PX:
            raise UsageError(f"SSIM needs pictures of at least {WINDOW_PX} px, not {x.shape[1]}x{x.shape[0]}; draw larger ones")
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        values.append(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))))
    return np.array(values)


def lpips(a: Pictures | Sequence[Pictures], b: Pictures | Sequence[Pictures], weights: Path) -> Values:
    """LPIPS per picture [N], 0 for equal pictures: net-lin v0.1 on AlexNet (Zhang et al. 2018), computed by the package `lpips`.

    `weights` is the file of torchvision's AlexNet (.pth, or its tensors in .safetensors); the linear layers come with the package. Nothing
    is downloaded. Raises UsageError for a file that is not there or not AlexNet's, and ImportError without `lpips` and torchvision.
    """
    if not weights.is_file():
        raise UsageError(
            f"LPIPS needs the weights of AlexNet, and {weights} is no file; name a copy of torchvision's alexnet-owt-7be5be79.pth"
        )
    import torch
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package calls torchvision by parameters that it has renamed
        net = LPIPS(net="alex", pnet_rand=True, verbose=False)  # random here, so that torchvision downloads nothing
    names = {".".join(["features", *name.split(".")[1:]]): name for name in net.net.state_dict()}  # slice2.3.weight is features.3.weight
    try:
        state = _tensors(weights)
        net.net.load_state_dict({name: state[theirs] for theirs, name in names.items()})
    except Exception as error:  # whatever a file that is none raises
        why = f"it has no tensor {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UsageError(f"{weights} does not hold the weights of torchvision's AlexNet ({why}); LPIPS takes no other network") from error

    def tensor(x: Pictures) -> torch.Tensor:
        return torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1

    with torch.no_grad():
        return np.array([net(tensor(x), tensor(y)).item() for x, y in _pairs(a, b)])


def _tensors(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load

        return load(file.read_bytes())
    import pickle

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is no file of tensors alone") from error
    if not isinstance(state, dict):
        raise ValueError("it is no state dict")
    return state


def _pairs(a: Pictures | Sequence[Pictures], b: Pictures | Sequence[Pictures]) -> list[tuple[Pictures, Pictures]]:
    if len(a) != len(b) or not len(a):
        raise UsageError(
            f"{len(a)} pictures cannot be compared with {len(b)} of the reference; draw the same prompts and seeds, at least one"
        )
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            sizes = " and ".join(f"{z.shape[1]}x{z.shape[0]}" for z in (x, y))
            raise UsageError(f"pictures of {sizes} px cannot be compared; draw the artifact and the reference at one size")
    return list(zip(a, b, strict=True))
