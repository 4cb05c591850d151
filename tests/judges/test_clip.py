from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from flashgen.errors import NumericsError, UsageError
from flashgen.judges.base import Drawn
from flashgen.judges.clip import ClipJudge

Pictures = list[NDArray[np.uint8]]
PROMPTS = ["a red circle", "a green square above a blue circle", "two yellow circles"] * 7  # more than one batch


def drawn(pictures: Pictures, prompts: list[str]) -> Drawn:
    return Drawn(pictures, prompts, range(len(prompts)))


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 40 + i, 3), dtype=np.uint8) for i in range(len(PROMPTS))]


def reference_cosines(folder: Path, pictures: Pictures, prompts: list[str]) -> NDArray[np.float64]:
    """In float64, one by one, with a preprocessing of its own: shorter side to 32 px by Pillow, central 32 x 32 px."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).double().eval(), CLIPTokenizer.from_pretrained(folder)
    mean, std = (np.array(x) for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    cosines = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        height, width = picture.shape[:2]
        scale = 32 / min(height, width)
        size = (int(width * scale + 1e-9), int(height * scale + 1e-9))
        small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        top, left = (size[1] - 32) // 2, (size[0] - 32) // 2
        pixels = (small[top : top + 32, left : left + 32] / 255 - mean) / std
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]), pixel_values=torch.tensor(pixels).permute(2, 0, 1)[None])
        cosines.append(float(torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)))
    return np.array(cosines)


def test_scores_agree_with_float64(clip: Path, tmp_path: Path, pictures: Pictures) -> None:
    cosines = reference_cosines(clip, pictures, PROMPTS)
    assert (cosines > 0).all() and cosines.std() > 0.01, "or the test would compare zeros"
    score = ClipJudge(str(clip)).judge(drawn(pictures, PROMPTS))
    assert score.values is not None
    np.testing.assert_allclose(score.values, 100 * cosines, rtol=1e-5)
    assert score.overall == pytest.approx(np.mean(100 * cosines), rel=1e-5)
    scale = float(load_file(clip / "model.safetensors")["logit_scale"].double().exp())
    pick = ClipJudge(str(clip), "pick_score").judge(drawn(pictures, PROMPTS))
    assert pick.values is not None
    np.testing.assert_allclose(pick.values, scale * cosines, rtol=1e-5)
    opposite = shutil.copytree(clip, tmp_path / "opposite")
    state = load_file(clip / "model.safetensors")
    save_file(state | {"text_projection.weight": -state["text_projection.weight"]}, opposite / "model.safetensors", {"format": "pt"})
    assert ClipJudge(str(opposite)).judge(drawn(pictures, PROMPTS)).overall == 0
    assert ClipJudge(str(opposite), "pick_score").judge(drawn(pictures, PROMPTS)).overall == pytest.approx(-pick.overall, rel=1e-6)


def test_score_of_a_picture_does_not_depend_on_its_batch(clip: Path, pictures: Pictures) -> None:
    judge = ClipJudge(str(clip), "pick_score")
    together = judge.judge(drawn(pictures, PROMPTS)).values
    alone = [judge.judge(drawn([picture], [prompt])).overall for picture, prompt in zip(pictures[:3], PROMPTS[:3], strict=True)]
    assert together is not None
    np.testing.assert_allclose(together[:3], alone, rtol=1e-5, atol=1e-5)


def test_cut_prompts_are_counted(clip: Path, pictures: Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ClipJudge(str(clip), "pick_score")
    short, long = "red " * 14, "red " * 14 + "blue circle"  # 14 words, a begin and an end fill the 16 tokens
    scores = judge.judge(drawn([pictures[0]] * 2, [short, long])).values
    assert "warning: pick_score: 1 of 2 prompts are longer than 16 tokens" in capsys.readouterr().err
    assert scores is not None and scores[0] == pytest.approx(scores[1], rel=1e-5), "what CLIP reads is the same"
    judge.judge(drawn([pictures[0]], [short]))
    assert not capsys.readouterr().err


def test_fitted_projection_orders_the_right_prompt_first(clip: Path, tmp_path: Path, pictures: Pictures) -> None:
    """Weights whose picture side is solved for so that 3 pictures match their prompts: another prompt, noise and black score less."""
    from transformers import CLIPModel

    shown, prompts = pictures[:3], PROMPTS[:3]
    model = CLIPModel.from_pretrained(clip).eval()
    judge = ClipJudge(str(clip))
    tokenizer, processor = judge._processors
    with torch.no_grad():
        pixels = processor(images=shown, return_tensors="pt")["pixel_values"]
        text = model(**tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=pixels).text_embeds.double()
        pooled = model.vision_model(pixel_values=pixels).pooler_output.double()
        model.visual_projection.weight.copy_((torch.linalg.pinv(pooled) @ text).T)
    copy = shutil.copytree(clip, tmp_path / "fitted")
    model.save_pretrained(copy)
    judge = ClipJudge(str(copy))
    right = judge.judge(drawn(shown, prompts)).overall
    assert right == pytest.approx(100, rel=1e-3)
    noise, black = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8), np.zeros((32, 32, 3), np.uint8)
    for name, wrong in {
        "prompts": drawn(shown, prompts[1:] + prompts[:1]), "noise": drawn([noise] * 3, prompts), "black": drawn([black] * 3, prompts)
    }.items():  # fmt: skip
        assert judge.judge(wrong).overall < right - 0.1, name


def test_no_picture_and_numbers_that_are_not_finite_end_in_a_sentence(clip: Path, tmp_path: Path, pictures: Pictures) -> None:
    with pytest.raises(UsageError, match="there is no picture to judge by clip_score"):
        ClipJudge(str(clip)).judge(drawn([], []))
    copy = shutil.copytree(clip, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    save_file(state | {"visual_projection.weight": state["visual_projection.weight"] * torch.nan}, copy / "model.safetensors")
    with pytest.raises(NumericsError, match="clip_score of picture 0 is not finite"):
        ClipJudge(str(copy)).judge(drawn(pictures[:1], PROMPTS[:1]))


def test_weights_of_pickscore_are_not_taken_for_clip_score(clip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip, tmp_path / "PickScore_v1")
    with pytest.raises(UsageError, match="write pick:"):
        ClipJudge(str(copy))
    assert ClipJudge(str(copy), "pick_score").identity()["weights"] == ClipJudge(str(clip)).identity()["weights"]
