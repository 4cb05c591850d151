"""Scores of a picture against its prompt by CLIP: CLIPScore (2104.08718) and PickScore (2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.judges.base import Drawn, Judge, Judgement
from flashgen.judges.weights import TOKENIZER, Weights, find_weights, image_processor
from flashgen.pixels import slices
from flashgen.progress import warn

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16


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
        tokens = self._tokens(drawn.prompts)
        parts = slices(len(drawn.pictures), BATCH)
        values = np.concatenate([self._scores(list(drawn.pictures[part]), tokens[part]) for part in parts])
        if not np.isfinite(values).all():
            raise NumericsError(f"{self.metric} of picture {np.argmin(np.isfinite(values))} is not finite; check the weights of {self.weights.origin}")
        return Judgement(values, {"overall": float(values.mean())})

    @cached_property
    def _network(self) -> Any:
        from transformers import CLIPModel

        return self.weights.load(CLIPModel, self.device)

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

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids per prompt, cut at the length of the text encoder with the end token kept."""
        length = int(self._network.config.text_config.max_position_embeddings)
        whole = self._processors[0](list(prompts), truncation=False, verbose=False)["input_ids"]
        if cut := sum(len(ids) > length for ids in whole):
            warn(f"{self.metric}: {cut} of {len(whole)} prompts are longer than {length} tokens; CLIP reads their beginnings")
        return [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in whole]

    def _scores(self, pictures: list[NDArray[np.uint8]], tokens: list[list[int]]) -> NDArray[np.float64]:
        import torch

        with torch.no_grad():
            pixels = self._processors[1](images=pictures, return_tensors="pt")["pixel_values"]
            ids, mask = self._padded(tokens)
            out = self._network(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(self.device))  # embeddings of unit length
            cosine = (out.text_embeds.double() * out.image_embeds.double()).sum(-1).cpu().numpy()
            scale = float(self._network.logit_scale.double().exp())
        return np.asarray(100 * np.maximum(cosine, 0) if self.metric == "clip_score" else scale * cosine, np.float64)

    def _padded(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, [B, longest]. What follows the end token is not attended to."""
        import torch

        ids = [torch.tensor(row) for row in tokens]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(self._processors[0].pad_token_id))
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return padded.to(self.device), mask.to(self.device)


def _clip_weights(origin: str) -> Weights:
    weights = find_weights(origin)
    if weights.model_type != "clip" or "CLIPModel" not in (weights.config.get("architectures") or ["CLIPModel"]):
        raise ArtifactError(f"{origin} has {weights.describe()}, and prompts are judged by a CLIPModel (clip); give another folder")
    names = {path.name for path in weights.files}
    if not names & {"preprocessor_config.json", "processor_config.json"} or not ({"tokenizer.json"} <= names or {"vocab.json", "merges.txt"} <= names):
        raise ArtifactError(
            f"{origin} lacks preprocessor_config.json or the tokenizer's files ({', '.join(TOKENIZER)}); "
            "copy them from the CLIP that the weights were trained from"
        )
    return weights
