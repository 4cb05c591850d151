"""Scores of a picture against its prompt by CLIP: CLIPScore (2104.08718) and PickScore (2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.judges.base import Drawn, Judge, Judgement
from flashgen.judges.weights import PROCESSORS, TOKENIZER, Weights, find_weights, image_processor
from flashgen.pixels import slices
from flashgen.progress import track, warn

BATCH = 16
INPUTS = {"input_ids", "attention_mask", "pixel_values"}


class ClipJudge(Judge):
    """Cosine between the CLIP embeddings of picture and prompt, scaled per metric.

    clip_score: 100 max(cos, 0), as torchmetrics and papers on text-to-image write it. DEVIATION: CLIPScore eq. 1 has the factor 2.5 and
    the prefix "A photo depicts", which these leave out. pick_score: exp(logit_scale) cos, as in PickScore's repository.
    """

    def __init__(self, origin: str, metric: str = "clip_score", device: str = "cpu") -> None:
        """`origin`: FOLDER or hf:OWNER/NAME. Raises ArtifactError for weights of another class or without their tokenizer."""
        self.metric, self.device = metric, device
        self.weights = _clip_weights(origin)
        if metric == "clip_score" and "pickscore" in origin.lower().replace("_", ""):
            raise UsageError(f"clip:{origin} would give the cosine of PickScore's weights without its scale; write pick:{origin}")

    def identity(self) -> dict[str, Any]:
        """Metric and digest of the weights."""
        return {"metric": self.metric, "weights": self.weights.digest}

    def judge(self, drawn: Drawn) -> Judgement:
        """Score per picture; `overall` is their mean. Warns of prompts that are longer than CLIP reads."""
        if not len(drawn.pictures):
            raise UsageError(f"there is no picture to judge by {self.metric}; draw at least one")
        self._warn_of_long(drawn.prompts)
        parts = slices(len(drawn.pictures), BATCH)
        shown = track(parts, self.metric, total=len(parts))
        values = np.concatenate([self._scores(list(drawn.pictures[part]), drawn.prompts[part]) for part in shown])
        if not np.isfinite(values).all():
            picture = np.argmin(np.isfinite(values))
            raise NumericsError(f"{self.metric} of picture {picture} is not finite; check the weights of {self.weights.origin}")
        return Judgement(values, {"overall": float(values.mean())})

    @cached_property
    def _network(self) -> Any:
        return self.weights.load("CLIPModel", self.device)

    @cached_property
    def _processors(self) -> tuple[Any, Any]:
        """Tokenizer and image processor."""
        from transformers import CLIPTokenizerFast

        try:
            options = {"local_files_only": True}
            folder = self.weights.folder
            return CLIPTokenizerFast.from_pretrained(folder, **options), image_processor().from_pretrained(folder, **options)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"the tokenizer or image processor of {self.weights.origin} cannot be read ({reason})") from error

    def _warn_of_long(self, prompts: Sequence[str]) -> None:
        lengths = [len(ids) for ids in self._processors[0](list(prompts), verbose=False)["input_ids"]]
        if cut := sum(length > self._length for length in lengths):
            warn(f"{self.metric}: {cut} of {len(lengths)} prompts are longer than {self._length} tokens; CLIP reads their beginnings")

    @property
    def _length(self) -> int:
        """Number of tokens that the text encoder reads, begin and end included."""
        return int(self._network.config.text_config.max_position_embeddings)

    def _scores(self, pictures: list[NDArray[np.uint8]], prompts: Sequence[str]) -> NDArray[np.float64]:
        import torch

        tokenizer, processor = self._processors
        with torch.no_grad():
            text = tokenizer(list(prompts), padding=True, truncation=True, max_length=self._length, return_tensors="pt")
            picture = processor(images=pictures, return_tensors="pt")
            inputs = {name: part[name].to(self.device) for part in (text, picture) for name in part if name in INPUTS}
            out = self._network(**inputs)  # embeddings of unit length
            cosine = (out.text_embeds.double() * out.image_embeds.double()).sum(-1).cpu().numpy()
            scale = float(self._network.logit_scale.double().exp())
        return np.asarray(100 * np.maximum(cosine, 0) if self.metric == "clip_score" else scale * cosine, np.float64)


def _clip_weights(origin: str) -> Weights:
    weights = find_weights(origin, PROCESSORS)
    if weights.model_type != "clip" or "CLIPModel" not in (weights.config.get("architectures") or ["CLIPModel"]):
        raise ArtifactError(f"{origin} has {weights.describe()}, and prompts are judged by a CLIPModel (clip); give another folder")
    names = {path.name for path in weights.files}
    has_tokenizer = "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names
    if not has_tokenizer or not names & {"preprocessor_config.json", "processor_config.json"}:
        raise ArtifactError(
            f"{origin} lacks preprocessor_config.json or the tokenizer's files ({', '.join(TOKENIZER)}); "
            "copy them from the CLIP that the weights were trained from"
        )
    return weights
