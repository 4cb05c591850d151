from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgen.errors import ArtifactError
from flashgen.models.stream import header, read, write

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 4, dtype=torch.float16), "scalar": torch.tensor(3.0),
}  # fmt: skip


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_what_is_written_is_what_safetensors_reads_and_the_other_way_round(tmp_path: Path) -> None:
    write(tmp_path / "ours.safetensors", shapes(TENSORS), TENSORS.items())
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    for found in (
        load_file(tmp_path / "ours.safetensors"),
        dict(read(tmp_path / "ours.safetensors")),
        dict(read(tmp_path / "theirs.safetensors")),
    ):
        assert found.keys() == TENSORS.keys()
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in TENSORS.items())
    assert list(header(tmp_path / "ours.safetensors")[0]) == list(TENSORS)


def test_a_tensor_that_is_not_the_announced_one_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b"):
        write(tmp_path / "x.safetensors", shapes(TENSORS), [("b", torch.zeros(3))])


@pytest.mark.parametrize("damage", ["cut", "no file", "overlap"])
def test_broken_files_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if damage != "no file":
        save_file(TENSORS, path)
        data = path.read_bytes()
        path.write_bytes(data[:-3] if damage == "cut" else data.replace(b'"data_offsets":[', b'"data_offsets":[9', 1))
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        list(read(path))


def test_types_of_other_worlds_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    with pytest.raises(ArtifactError, match="F8_E4M3"):
        header(tmp_path / "fp8.safetensors")
