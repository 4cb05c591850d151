"""Embeddings on disk: the same numbers, mapped, finished parts kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flashgen.models.build import build_pipeline
from flashgen.models.specs import SPECS
from flashgen.models.text import Conditioning, encode_prompts
from flashgen.training import prompts
from flashgen.training.prompts import prompt_pool, training_captions


@pytest.fixture
def pipe() -> StableDiffusion3Pipeline:
    tiny = build_pipeline(SPECS["tiny"], 0)
    for part in (tiny.text_encoder, tiny.text_encoder_2, tiny.text_encoder_3):
        part.eval()
    return tiny


def test_a_pool_on_disk_is_the_pool_in_memory_and_resumes(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "BATCH", 3)
    held, kept = prompt_pool(pipe, 7, 5, 16), prompt_pool(pipe, 7, 5, 16, tmp_path)
    for ours, theirs in ((kept.cond, held.cond), (kept.empty, held.empty)):
        assert torch.allclose(ours.embeds, theirs.embeds, atol=1e-5) and torch.allclose(ours.pooled, theirs.pooled, atol=1e-5)
    assert len(kept) == 7 and len(kept.empty.pooled) == 1
    asked: list[int] = []

    def counted(p: StableDiffusion3Pipeline, some: list[str], tokens: int) -> Conditioning:
        asked.append(len(some))
        return encode_prompts(p, some, tokens)

    monkeypatch.setattr(prompts, "encode_prompts", counted)
    (tmp_path / "prompts-5" / "000003.done").unlink()
    again = prompt_pool(pipe, 7, 5, 16, tmp_path)
    assert asked == [3] and torch.equal(again.cond.embeds, kept.cond.embeds)


def test_processes_share_out_the_parts(pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "BATCH", 3)
    monkeypatch.setattr(prompts, "wait_for_all", lambda: None)
    for rank, done in ((0, ["000000", "000006"]), (1, ["000000", "000003", "000006"])):
        monkeypatch.setattr(prompts, "world", lambda: 2)
        monkeypatch.setattr(prompts, "rank", lambda rank=rank: rank)
        prompt_pool(pipe, 7, 5, 16, tmp_path)
        assert sorted(p.stem for p in tmp_path.glob("prompts-5/*.done")) == done


def test_own_prompts_come_equally_often_in_an_order_of_the_seed() -> None:
    own = ["a", "b", "c"]
    found = training_captions(7, 0, own)
    assert sorted(found[:3]) == sorted(found[3:6]) == own and found[6] in own
    assert found == training_captions(7, 0, own) and any(found != training_captions(7, seed, own) for seed in (1, 2, 3))
