"""What captions mean to the encoders that are trained on them."""

from __future__ import annotations

from flashgen.worlds.shapes.data import FIELDS, PHRASES, meaning, phrases
from flashgen.worlds.shapes.scene import parse, prompt_set


def test_meaning_tells_all_captions_apart() -> None:
    requests = prompt_set(1, 60)
    captions = {tuple(map(tuple, meaning(r, 16))): r.caption() for r in requests}
    assert len(captions) == len({r.caption() for r in requests})
    assert all(0 <= index < len(values) for key in captions for token in key for index, values in zip(token, FIELDS, strict=True))


def test_each_word_means_its_own_group_and_every_token_the_background() -> None:
    request = parse("a red circle left of two squares on a black background")
    tokens = [tuple(values[i] for i, values in zip(token, FIELDS, strict=True)) for token in meaning(request, 11)]
    assert tokens[:3] == [("circle", "red", 1, "left of", "black")] * 3
    assert tokens[5:7] == [("square", None, 2, "right of", "black")] * 2
    assert tokens[3:5] + tokens[7:] == [(None, None, None, None, "black")] * 6


def test_phrases_know_which_colour_a_shape_has_but_not_its_place() -> None:
    one, recoloured, moved, mirrored = (
        phrases(parse(f"a {text}"))
        for text in ("red circle left of a blue cross", "blue circle left of a red cross", "red circle below a blue cross",
                     "blue cross left of a red circle")
    )  # fmt: skip
    assert one != recoloured and one == moved == mirrored
    assert {PHRASES[i] for i, named in enumerate(one) if named} == {("circle", "red"), ("cross", "blue")}
