from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashgen import families
from flashgen.errors import NumericsError
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.specs import SPECS
from flashgen.models.pipeline import Pipeline, load_pipeline
from flashgen.models.save import save_changed, save_pipeline
from tests.artifact.making import draft_of
from tests.peers import in_diffusers

SD3 = families.get("sd3")


def test_build_is_a_function_of_the_seed() -> None:
    a, b, c = (build_pipeline(SPECS["tiny"], seed) for seed in (0, 0, 1))
    for part in SD3.networks:
        first, again, other = (list(p[part].parameters()) for p in (a, b, c))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_clip_positions_can_be_left_out() -> None:
    with_positions, without = build_pipeline(SPECS["tiny"], 0), build_pipeline(SPECS["shapes"], 0)
    tables = [p["text_encoder"].text_model.embeddings.position_embedding.weight for p in (with_positions, without)]
    assert tables[0].any() and not tables[1].any()


def test_saved_pipeline_comes_back_in_half_precision(pipe: Pipeline, tmp_path: Path) -> None:
    before = {k: v.half().float() for k, v in pipe.transformer.state_dict().items()}
    target = draft_of(tmp_path / "a", kind="teacher")
    save_pipeline(target.path, pipe)
    again = load_pipeline(target.path)
    assert again.transformer.dtype == again["text_encoder"].dtype == torch.float32 and not again.transformer.training
    after = again.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before if k != "pos_embed.pos_embed")
    assert not any(p.requires_grad for p in again.transformer.parameters())


def test_save_changed_replaces_links_and_drops(pipe: Pipeline, tmp_path: Path) -> None:
    source, target = draft_of(tmp_path / "a", kind="teacher"), draft_of(tmp_path / "b", kind="teacher")
    save_pipeline(source.path, pipe)
    changed = {"transformer": build_pipeline(SPECS["tiny"], 5).transformer}
    save_changed(target, source.path, SD3, changed, dropped=("text_encoder_3", "tokenizer_3"))
    assert not (target.path / "text_encoder_3").exists() and not (target.path / "tokenizer_3").exists()
    index = json.loads((target.path / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None] and index["vae"] == ["diffusers", "AutoencoderKL"]
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (target.path / name).samefile(source.path / name)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (target.path / name).read_bytes() != (source.path / name).read_bytes()
    slim = load_pipeline(target.path)
    assert slim["text_encoder_3"] is None and slim["tokenizer_3"] is None


def test_saved_index_is_the_one_that_diffusers_writes(pipe: Pipeline, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "ours", pipe)
    in_diffusers(pipe).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("ours", "theirs"))
    assert ours["_class_name"] == theirs["_class_name"] == "StableDiffusion3Pipeline"
    parts = {name: part for name, part in theirs.items() if isinstance(part, list)}
    assert {name: part for name, part in parts.items() if part[0]} == {name: part for name, part in ours.items() if name in pipe.parts}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_weights_that_fp16_cannot_hold_are_not_written(value: float, pipe: Pipeline, tmp_path: Path) -> None:
    pipe.transformer.proj_out.bias.data[0] = value
    with pytest.raises(NumericsError, match=r"transformer: proj_out\.bias holds .*fp16 ends at 65504"):
        save_pipeline(tmp_path, pipe)
    assert not (tmp_path / "transformer").exists()
