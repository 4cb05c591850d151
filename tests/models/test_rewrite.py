from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgen import families
from flashgen.artifact.store import Artifact
from flashgen.errors import NumericsError
from flashgen.models.rewrite import linear_shapes, rewrite_network

SHARDS = {"a": {"x.weight": torch.arange(6.0).reshape(2, 3)}, "b": {"y.weight": torch.ones(2), "ids": torch.arange(3)}}


def network(folder: Path, value: float = 1.0) -> Path:
    """A network in two shards, the second one in bf16."""
    folder.mkdir()
    index = {name: f"{shard}.safetensors" for shard, tensors in SHARDS.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    save_file(SHARDS["a"], folder / "a.safetensors")
    save_file({"y.weight": torch.full((2,), value, dtype=torch.bfloat16), "ids": SHARDS["b"]["ids"]}, folder / "b.safetensors")
    return folder


def test_rewritten_network_keeps_shards_and_integers_and_links_other_files(tmp_path: Path) -> None:
    source, target = network(tmp_path / "net"), tmp_path / "new" / "net"
    target.parent.mkdir()
    rewrite_network(source, target, lambda name, tensor: tensor + 1 if name == "x.weight" else tensor, "test")
    a, b = load_file(target / "a.safetensors"), load_file(target / "b.safetensors")
    assert torch.equal(a["x.weight"], (SHARDS["a"]["x.weight"] + 1).half())
    assert torch.equal(b["ids"], SHARDS["b"]["ids"]) and b["y.weight"].dtype == torch.float16
    assert (target / "config.json").samefile(source / "config.json")


@pytest.mark.parametrize(("value", "shown"), [(7e4, r"7\.014e\+04"), (float("nan"), "inf")])
def test_tensor_that_fp16_cannot_hold_is_named(tmp_path: Path, value: float, shown: str) -> None:
    source = network(tmp_path / "net", value)
    with pytest.raises(NumericsError, match=rf"net: y\.weight holds {shown}, and fp16 ends at 65504"):
        rewrite_network(source, tmp_path / "new", lambda _, tensor: tensor, "test")


def test_linear_shapes_are_outputs_and_inputs_in_the_order_of_the_network(tiny_student: Artifact) -> None:
    shapes = linear_shapes(tiny_student.path, "transformer", families.get("sd3"))
    assert shapes["transformer_blocks.0.ff.net.0.proj"] == (128, 32) and shapes["transformer_blocks.0.ff.net.2"] == (32, 128)
    assert next(iter(shapes)) == "time_text_embed.timestep_embedder.linear_1" and list(shapes)[-1] == "proj_out"
