"""Prompt pools: which prompts, whose text encoder is dropped, and their files on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.errors import UsageError
from flashgen.families.conditioning import Conditioning
from flashgen.families.sd3 import SD3
from flashgen.families.sd3.sampling import teacher_sampler
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.pixels import Size
from flashgen.randomness import generator
from flashgen.training import prompts
from flashgen.training.prompts import PromptPool, drawn_pool, prompt_pool, training_prompts
from flashgen.training.ranks import Draws
from flashgen.worlds import get

SAMPLER = teacher_sampler(16, 16, Size(64, 64))
TEXTS = ["two red circles", "a cat", "", "a blue square", "a dog", "seven birds", "a tree"]


def same(a: Conditioning, b: Conditioning) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(value, b.tensors[name]) for name, value in a.tensors.items())


def dropped_rows(cond: Conditioning) -> Tensor:
    return (cond.tensors["embeds"][:, 16:] == 0).all(dim=(1, 2))


# ---- on disk


def test_a_pool_on_disk_is_the_pool_in_memory_and_resumes_without_an_encoder(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "BATCH", 3)
    in_memory, on_disk = prompt_pool(TEXTS, pipe, SAMPLER), prompt_pool(TEXTS, pipe, SAMPLER, tmp_path)
    for a, b in ((on_disk[slice(None)], in_memory.cond), (on_disk.empty, in_memory.empty)):
        assert a.shares == b.shares and all(torch.allclose(a.tensors[name], b.tensors[name], atol=1e-5) for name in b.tensors)
    assert len(on_disk) == 7 and len(on_disk.empty) == 1
    sizes: list[int] = []

    def counted(pipe: Pipeline, texts: list[str], sampler: Sampler) -> Conditioning:
        sizes.append(len(texts))
        return encode_prompts(pipe, texts, sampler)

    monkeypatch.setattr(prompts, "encode_prompts", counted)
    assert same(prompt_pool(TEXTS, pipe, SAMPLER, tmp_path)[slice(None)], on_disk[slice(None)]) and sizes == []
    (tmp_path / "00000003.done").unlink()
    again = prompt_pool(TEXTS, pipe, SAMPLER, tmp_path)
    assert same(again[slice(None)], on_disk[slice(None)]) and same(again.empty, on_disk.empty) and sizes == [3]


@pytest.mark.parametrize(
    ("file", "size", "encoded"),
    [
        pytest.param("embeds.bin", None, [3, 3, 1], id="removed"),
        pytest.param("embeds.bin", 100, [3, 3, 1], id="cut: the first batch too"),
        pytest.param("pooled.bin", 4 * 64, [3, 3, 1], id="cut"),
        pytest.param("00000003.done", 0, [3], id="empty mark"),
        pytest.param("00000003.done", 120, [3], id="mark cut"),
        pytest.param("layout.state", 50, [1], id="layout"),
    ],
)
def test_prompts_whose_embeddings_are_damaged_are_encoded_again(
    file: str,
    size: int | None,
    encoded: list[int],
    pipe: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prompts, "BATCH", 3)
    first, sizes = prompt_pool(TEXTS, pipe, SAMPLER, tmp_path), list[int]()
    before = first[slice(None)]

    def counted(pipe: Pipeline, texts: list[str], sampler: Sampler) -> Conditioning:
        sizes.append(len(texts))
        return encode_prompts(pipe, texts, sampler)

    monkeypatch.setattr(prompts, "encode_prompts", counted)
    if size is None:
        (tmp_path / file).unlink()
    else:
        os.truncate(tmp_path / file, size)
    assert same(prompt_pool(TEXTS, pipe, SAMPLER, tmp_path)[slice(None)], before) and sizes == encoded
    assert "damaged" in capsys.readouterr().err
    assert same(prompt_pool(TEXTS, pipe, SAMPLER, tmp_path)[slice(None)], before) and sizes == encoded


def test_a_prompt_is_embedded_once_for_all_pools(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: list[str] = []

    def counted(pipe: Pipeline, prompts: list[str], sampler: Sampler) -> Conditioning:
        texts.extend(prompts)
        return encode_prompts(pipe, prompts, sampler)

    monkeypatch.setattr(prompts, "encode_prompts", counted)
    first = prompt_pool(["a cat", "a dog", "a cat"], pipe, SAMPLER, tmp_path)
    assert sorted(texts) == ["", "", "a cat", "a dog"]  # "" once more for the layout of the tensors
    assert "reused" not in capsys.readouterr().err
    second = prompt_pool(["a bird", "a dog", "a cat"], pipe, SAMPLER, tmp_path)
    assert texts[4:] == ["a bird"] and f"prompts: 3 of 4 embeddings are reused from {tmp_path}" in capsys.readouterr().err
    assert same(first[torch.tensor([2, 1])], second[torch.tensor([2, 1])]) and not same(first[slice(1)], second[slice(1)])
    assert (len(first), len(second), len({first.key, second.key})) == (3, 3, 2) and same(first.empty, second.empty)
    assert same(second.part(slice(2))[slice(None)], second[slice(2)]) and len(second.part(slice(2))) == 2


def test_a_pool_that_is_not_stored_encodes_what_is_drawn(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, drawn = prompt_pool(TEXTS, pipe, SAMPLER, tmp_path / "store"), drawn_pool(TEXTS, pipe, SAMPLER, "store")
    assert len(drawn) == 7 and drawn.key == stored.key and drawn.family is stored.family
    for a, b in (
        (drawn[torch.tensor([5, 0])], stored[torch.tensor([5, 0])]),
        (drawn.part(slice(3))[slice(None)], stored[slice(3)]),
        (drawn.dropping(0.5, generator(2)).draw(0.3, Draws(16, 1)), stored.dropping(0.5, generator(2)).draw(0.3, Draws(16, 1))),
        (drawn.empty, stored.empty),
    ):
        assert all(torch.allclose(a.tensors[name], b.tensors[name], atol=1e-5) for name in b.tensors)
    texts: list[str] = []

    def counted(pipe: Pipeline, asked: list[str], sampler: Sampler) -> Conditioning:
        texts.extend(asked)
        return encode_prompts(pipe, asked, sampler)

    monkeypatch.setattr(prompts, "encode_prompts", counted)
    drawn[torch.tensor([3, 1])]
    assert texts == [TEXTS[3], TEXTS[1]]


def test_indices_may_be_on_any_device_and_conditioning_is_on_the_pools(pool: PromptPool) -> None:
    meta, rows = pool.dropping(0.5, generator(2)).on(torch.device("meta")), torch.tensor([1, 3])
    for cond in (meta[rows], meta.draw(0.5, Draws(4, 1)), meta.empty_for(meta[rows])):
        assert {tensor.device.type for tensor in cond.tensors.values()} == {"meta"}
    assert pool.device.type == "cpu" and pool[rows].tensors["embeds"].device.type == "cpu"


def test_processes_share_out_the_parts(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "BATCH", 3)
    monkeypatch.setattr(prompts, "wait_for_all", lambda: None)
    for rank, done in ((0, ["00000000", "00000006"]), (1, ["00000003"])):
        monkeypatch.setattr(prompts, "world_size", lambda: 2)
        monkeypatch.setattr(prompts, "rank", lambda rank=rank: rank)
        prompt_pool(TEXTS, pipe, SAMPLER, tmp_path / str(rank))
        assert sorted(p.stem for p in (tmp_path / str(rank)).glob("[0-9]*.done")) == done


class Masked(SD3):
    """Conditioning with an attention mask, and nothing that can be dropped."""

    models = "masked models"
    droppable = None  # type: ignore[assignment]  # SD3 has one

    def encode(self, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]], sampler: Sampler) -> Conditioning:
        cond, ids = super().encode(pipe, inputs, sampler), inputs["text_encoder"]["input_ids"]
        return replace(cond, tensors={**cond.tensors, "mask": (ids != ids[:, -1:]).long()})


def test_a_mask_keeps_its_dtype_and_embeddings_are_halved_where_an_encoder_computes_in_bf16(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.family = Masked()
    monkeypatch.setattr(Pipeline, "encodes_in_bf16", lambda self: True)
    plain, mapped = prompt_pool(TEXTS, pipe, SAMPLER), prompt_pool(TEXTS, pipe, SAMPLER, tmp_path)
    assert {name: tensor.dtype for name, tensor in mapped.cond.tensors.items()} == {
        "embeds": torch.bfloat16, "pooled": torch.bfloat16, "mask": torch.int64,
    }  # fmt: skip
    assert torch.equal(mapped.cond.tensors["mask"], plain.cond.tensors["mask"]) and plain.cond.tensors["mask"].any()
    assert torch.equal(mapped.cond.tensors["pooled"], plain.cond.tensors["pooled"].bfloat16())


# ---- which prompts


def test_own_prompts_come_equally_often_in_an_order_of_the_seed() -> None:
    own = ["a", "b", "c"]
    drawn = training_prompts(None, own, 7, 0)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == own and drawn[6] in own
    assert drawn == training_prompts(get("shapes"), own, 7, 0)
    assert any(drawn != training_prompts(None, own, 7, seed) for seed in (1, 2, 3))


def test_prompts_of_a_world_are_those_of_its_generator_and_others_than_it_judges() -> None:
    world = get("shapes")
    drawn = training_prompts(world, None, 50, 3)
    assert drawn == world.training_prompts(np.random.default_rng([3, 0x7EA1]), 50)
    assert drawn != training_prompts(world, None, 50, 4)


def test_prompts_are_asked_for_when_there_are_none() -> None:
    with pytest.raises(UsageError, match="--set prompts_file=FILE"):
        training_prompts(None, None, 1, 0)


# ---- dropping the text encoder


def test_prompts_are_drawn_with_their_own_encoder_drop(pool: PromptPool) -> None:
    cond = pool.draw(0.3, Draws(400, 1))
    dropped, embeds = dropped_rows(cond), cond.tensors["embeds"]
    assert 0.2 < dropped.float().mean() < 0.4
    assert not (embeds[:, :16] == 0).any() and not (embeds[~dropped][:, 16:] == 0).any()
    assert not (pool.cond.tensors["embeds"] == 0).any()  # the pool itself is not changed
    assert same(pool.draw(0.3, Draws(400, 1)), cond)


def test_a_pool_can_drop_an_encoder_permanently(pool: PromptPool) -> None:
    half, every = pool.dropping(0.5, generator(2)), slice(None)
    dropped = dropped_rows(half[every])
    assert 0 < dropped.sum() < len(pool) and not (pool.cond.tensors["embeds"] == 0).any()
    assert same(half[~dropped], pool.cond[~dropped]) and torch.equal(half[every].tensors["pooled"], pool.cond.tensors["pooled"])
    assert same(half.dropping(0.0, generator(3))[every], half[every]) and same(half.part(slice(3))[every], half[slice(3)])


def test_the_empty_prompt_is_dropped_where_the_prompt_is(pool: PromptPool) -> None:
    """As a pipeline without that encoder guides itself: zeros on both sides."""
    half = pool.dropping(0.5, generator(2))[slice(None)]
    dropped, empty = dropped_rows(half), pool.empty_for(half)
    assert torch.equal(dropped_rows(empty), dropped) and 0 < dropped.sum() < len(pool)
    full = pool.empty.expand(8)
    assert same(empty[~dropped], full[~dropped]) and torch.equal(empty.tensors["embeds"][:, :16], full.tensors["embeds"][:, :16])
    assert torch.equal(empty.tensors["pooled"], full.tensors["pooled"])


def test_dropping_does_nothing_and_says_so_once_when_a_family_has_nothing_to_drop(
    pool: PromptPool, capsys: pytest.CaptureFixture[str]
) -> None:
    family = Masked()
    plain = PromptPool(replace(pool.cond, family=family), replace(pool.empty, family=family))
    prompts._warn_no_effect.cache_clear()
    plain.draw(0.0, Draws(4, 1))
    assert capsys.readouterr().err == ""
    rows = Draws(4, 1).randint(len(plain))
    assert same(plain.draw(1.0, Draws(4, 1)), pool.cond[rows]) and same(plain.dropping(1.0, generator(1))[rows], pool.cond[rows])
    assert same(plain.empty_for(plain.cond), pool.empty.expand(8))
    said = capsys.readouterr().err
    assert said.count("encoder_drop has no effect: masked models") == 1
