from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from flashgen.artifact.store import Draft, begin
from flashgen.models.build import build_pipeline
from flashgen.models.sample import load_pipeline
from flashgen.models.save import save_changed, save_pipeline
from flashgen.models.specs import SPECS


def draft(out: Path) -> Draft:
    found = begin(out, kind="teacher", stage="test", recipe={}, seed=0, parents=[])
    assert isinstance(found, Draft)
    return found


def test_build_is_a_function_of_the_seed() -> None:
    a, b, c = (build_pipeline(SPECS["tiny"], seed) for seed in (0, 0, 1))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        first, again, other = (list(getattr(p, part).parameters()) for p in (a, b, c))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_clip_positions_can_be_left_out() -> None:
    with_positions, without = build_pipeline(SPECS["tiny"], 0), build_pipeline(SPECS["shapes"], 0)
    tables = [p.text_encoder.text_model.embeddings.position_embedding.weight for p in (with_positions, without)]
    assert tables[0].any() and not tables[1].any()


def test_saved_pipeline_comes_back_in_half_precision(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    before = {k: v.half().float() for k, v in pipe.transformer.state_dict().items()}
    target = draft(tmp_path / "a")
    save_pipeline(target, pipe)
    again = load_pipeline(target.path)
    assert again.transformer.dtype == again.text_encoder.dtype == torch.float32 and not again.transformer.training
    after = again.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before if k != "pos_embed.pos_embed")
    assert not any(p.requires_grad for p in again.transformer.parameters())


def test_save_changed_replaces_links_and_drops(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    source, target = draft(tmp_path / "a"), draft(tmp_path / "b")
    save_pipeline(source, pipe)
    save_changed(
        target, source.path, {"transformer": build_pipeline(SPECS["tiny"], 5).transformer}, dropped=("text_encoder_3", "tokenizer_3")
    )
    assert not (target.path / "text_encoder_3").exists() and not (target.path / "tokenizer_3").exists()
    index = json.loads((target.path / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None] and index["vae"] == ["diffusers", "AutoencoderKL"]
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (target.path / name).samefile(source.path / name)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (target.path / name).read_bytes() != (source.path / name).read_bytes()
    slim = load_pipeline(target.path)
    assert slim.text_encoder_3 is None and slim.tokenizer_3 is None
