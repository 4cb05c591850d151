"""Features of pictures by the networks of FID (Inception), FD-DINOv2 (Dinov2Model) and CMMD (CLIP's vision part)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import ArtifactError
from flashgen.judges.weights import Weights, find_weights, image_processor
from flashgen.progress import warn

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.judges.inception import Inception

Picture = NDArray[np.uint8]  # [H, W, 3]
Floats64 = NDArray[np.float64]
CLASSES = {"dinov2": "Dinov2Model", "clip": "CLIPModel", "clip_vision_model": "CLIPVisionModelWithProjection"}  # by model_type
BATCH = 16
CMMD_PX, DINOV2_PX, FID_DIMENSIONS = 336, 224, 2048
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class Features:
    """Features of pictures for the metric that the class of the weights at `origin` decides: fid, fd_dinov2 or cmmd."""

    def __init__(self, origin: str, device: str = "cpu") -> None:
        """Check the class of the weights: by config.json, or by the tensors of FID's file. Raises ArtifactError for any other class."""
        self.weights, self.device = find_weights(origin), device
        self.metric = _metric(self.weights)
        config = self.weights.config
        match self.metric:
            case "fid":
                self.dimensions = FID_DIMENSIONS
                self._network = read_inception(self.weights).to(device)
            case "fd_dinov2":
                self.dimensions, self.side_px = int(config.get("hidden_size", 768)), DINOV2_PX
            case _:
                self.dimensions = int(config.get("projection_dim", 512))
                self.side_px = int((config.get("vision_config") or config).get("image_size", 224))
                if self.side_px != CMMD_PX:
                    warn(f"{origin} sees {self.side_px} px; published CMMD values are of CLIP ViT-L/14 at {CMMD_PX} px")

    def __call__(self, pictures: Iterable[Picture]) -> Floats64:
        """Features [N, dimensions] of N pictures of any sizes, computed in fp32 in batches."""
        iterator, parts = iter(pictures), list[Floats64]()
        while batch := list(islice(iterator, BATCH)):
            parts.append(self._inception(batch) if self.metric == "fid" else self._transformer(batch))
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions))

    @cached_property
    def _network(self) -> Any:
        return self.weights.load(CLASSES[self.weights.model_type], self.device)

    @cached_property
    def _processor(self) -> Any:
        """Pillow's bicubic resize to a square of the network's side, then the network's mean and deviation."""
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if self.metric == "fd_dinov2" else (CLIP_MEAN, CLIP_STD)
        side = {"height": self.side_px, "width": self.side_px}
        return image_processor()(size=side, resample=3, do_center_crop=False, image_mean=mean, image_std=std)

    def _inception(self, pictures: list[Picture]) -> Floats64:
        import torch

        from flashgen.judges.inception import resize_tf1

        with torch.no_grad():
            resized = [resize_tf1(torch.tensor(picture, device=self.device).permute(2, 0, 1).float()) for picture in pictures]
            return _numpy(self._network(torch.stack(resized)))

    def _transformer(self, pictures: list[Picture]) -> Floats64:
        """DINOv2: the class token after the last norm, as in dgm-eval. CLIP: unit embeddings of central squares, as in CMMD's code."""
        import torch

        squares = pictures if self.metric == "fd_dinov2" else [_central_square(picture) for picture in pictures]
        pixels = self._processor(images=squares, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.no_grad():
            if self.metric == "fd_dinov2":
                return _numpy(self._network(pixel_values=pixels).pooler_output)
            token = self._network.vision_model(pixel_values=pixels).pooler_output
            return _numpy(torch.nn.functional.normalize(self._network.visual_projection(token).double(), dim=-1))


def read_inception(weights: Weights) -> Inception:
    """FID's network with weights of a .safetensors or a .pth file; of the latter tensors only are read, never code.

    Raises ArtifactError for a file that cannot be read or has other tensors.
    """
    import torch
    from safetensors.torch import load_file

    from flashgen.judges.inception import Inception

    path, network = weights.files[0], Inception()
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in network.state_dict().items():  # which old files lack
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, tensor)
        network.load_state_dict(state)
    except Exception as error:  # whatever a file that is none raises
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path} is not FID's Inception ({reason}); give pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        ) from error
    return network.eval().requires_grad_(False)


def _metric(weights: Weights) -> str:
    if not weights.config:
        return "fid"
    if weights.model_type not in CLASSES:
        raise ArtifactError(
            f"{weights.origin} has {weights.describe()}; sets of pictures are compared by FID's Inception, a Dinov2Model or a CLIPModel"
        )
    return "fd_dinov2" if weights.model_type == "dinov2" else "cmmd"


def _central_square(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def _numpy(features: Tensor) -> Floats64:
    return np.asarray(features.double().cpu().numpy(), np.float64)
