"""The network of FID: Inception-v3 as TensorFlow's graph of 2015-12-05 has it, for the weights that pytorch-fid and torch-fidelity publish.

Written here because torch-fidelity, whose parameter names and results it has (tests/judges/test_inception.py), needs a torchvision of
the same CUDA build as torch, and unpickles the weights without a check.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE_PX, NUM_FEATURES, NUM_CLASSES = 299, 2048, 1008

Layer = tuple[str, int, int | tuple[int, int]]  # name, output channels, kernel
Path = list[Layer | list[Layer]]  # layers in turn; a list of layers: side by side, concatenated
POOL = "_pool"  # the path of this name convolves its input after pooling


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU. The size is kept at stride 1 unless `padding` says otherwise."""

    def __init__(self, width_in: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        height, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (height // 2, wide // 2) if stride == 1 else (0, 0)
        self.conv = nn.Conv2d(width_in, width, (height, wide), stride, same if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] to [B, width, h', w']."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Paths over one input, concatenated. `shrink`: the last layer of each path has stride 2, and the input's maxima are the last path.

    `max_pool`: the path `POOL` takes maxima, as in the graph's last block, instead of means without the padding.
    """

    def __init__(self, width_in: int, paths: Sequence[Path], *, shrink: bool = False, max_pool: bool = False) -> None:
        super().__init__()
        self.paths = [[[layer] if isinstance(layer, tuple) else layer for layer in path] for path in paths]
        self.shrink, self.max_pool = shrink, max_pool
        for path in self.paths:
            width = width_in
            for layers in path:
                for name, width_out, kernel in layers:
                    stride = 2 if shrink and layers is path[-1] else 1
                    self.add_module(f"branch{name}", Convolution(width, width_out, kernel, stride))
                width = sum(width_out for _, width_out, _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] to [B, sum of the paths' widths, h', w']."""
        outputs = []
        for path in self.paths:
            y = self._pool(x) if path[0][0][0] == POOL else x
            for layers in path:
                y = torch.cat([self.get_submodule(f"branch{name}")(y) for name, _, _ in layers], 1)
            outputs.append(y)
        return torch.cat([*outputs, F.max_pool2d(x, 3, 2)] if self.shrink else outputs, 1)

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1) if self.max_pool else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _block_a(width_in: int, width_pool: int) -> Mixed:
    double: Path = [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3)]
    return Mixed(width_in, [[("1x1", 64, 1)], [("5x5_1", 48, 1), ("5x5_2", 64, 5)], double, [(POOL, width_pool, 1)]])


def _block_c(width: int) -> Mixed:
    single: Path = [("7x7_1", width, 1), ("7x7_2", width, (1, 7)), ("7x7_3", 192, (7, 1))]
    start: Path = [("7x7dbl_1", width, 1), ("7x7dbl_2", width, (7, 1)), ("7x7dbl_3", width, (1, 7))]
    double: Path = [*start, ("7x7dbl_4", width, (7, 1)), ("7x7dbl_5", 192, (1, 7))]
    return Mixed(768, [[("1x1", 192, 1)], single, double, [(POOL, 192, 1)]])


def _block_e(width_in: int, *, max_pool: bool) -> Mixed:
    single: Path = [("3x3_1", 384, 1), [("3x3_2a", 384, (1, 3)), ("3x3_2b", 384, (3, 1))]]
    double: Path = [("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3), [("3x3dbl_3a", 384, (1, 3)), ("3x3dbl_3b", 384, (3, 1))]]
    return Mixed(width_in, [[("1x1", 320, 1)], single, double, [(POOL, 192, 1)]], max_pool=max_pool)


class Inception(nn.Module):
    """Pictures [B, 3, 299, 299] in 0..255 (float, see `resize_tf1`) to features [B, 2048] of the last pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = Mixed(288, [[("3x3", 384, 3)], [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3)]], shrink=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _block_c(128), _block_c(160), _block_c(160), _block_c(192)
        seven: Path = [("7x7x3_1", 192, 1), ("7x7x3_2", 192, (1, 7)), ("7x7x3_3", 192, (7, 1)), ("7x7x3_4", 192, 3)]
        self.Mixed_7a = Mixed(768, [[("3x3_1", 192, 1), ("3x3_2", 320, 3)], seven], shrink=True)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, max_pool=False), _block_e(2048, max_pool=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)  # not used for features; the file of weights has it

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 2048] of x [B, 3, 299, 299]."""
        x = (x - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))))
        x = self.Mixed_7c(self.Mixed_7b(x))
        return x.mean((2, 3))


def resize_tf1(x: Tensor) -> Tensor:
    """Resize [C, h, w] to [C, 299, 299], bilinear as in TensorFlow 1: source position = target position * scale, no half-pixel offset."""
    rows, columns = (_weights(length, SIDE_PX).to(x) for length in x.shape[1:])
    return rows @ x @ columns.T


def _weights(length: int, side: int) -> Tensor:
    """Weights [side, length] of the source pixels in every target pixel."""
    position = torch.arange(side, dtype=torch.float64) * (length / side)
    low = position.long().clamp(max=length - 1)
    share = (position - low)[:, None]
    rows = torch.eye(length, dtype=torch.float64)
    return rows[low] * (1 - share) + rows[(low + 1).clamp(max=length - 1)] * share
