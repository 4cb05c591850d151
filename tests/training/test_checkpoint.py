"""How often a checkpoint is saved, and that a kill leaves a whole file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver

from flashgen.artifact.files import disk_bytes
from flashgen.errors import ArtifactError, MachineError
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training import checkpoint
from flashgen.training.checkpoint import Checkpoint, checkpoints, load_state, save_state, truncate_stats
from flashgen.training.ema import BestWeights, Ema
from flashgen.training.mapped import map_tensor
from flashgen.training.optimizers import AdamWithoutMomentum, Muon


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def spoil(file: Path) -> None:
    """Other bytes near the end, where the numbers of a tensor are; the size stays."""
    data = bytearray(file.read_bytes())
    data[-8:-4] = bytes(255 - byte for byte in data[-8:-4])
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "empty": lambda file: os.truncate(file, 0),
    "other bytes": spoil,
    "removed": Path.unlink,
}


def test_save_state_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    for value in (1, 2):
        save_state({"value": torch.tensor(value)}, tmp_path / "a.pt")
    saved = load_state(tmp_path / "a.pt")
    assert saved is not None and saved["value"] == 2 and load_state(tmp_path / "b.pt") is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage != "removed"])
def test_a_damaged_state_is_named_and_made_again(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_state({"value": torch.arange(1000)}, tmp_path / "a.pt")
    DAMAGES[damage](tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt") is None
    assert f"warning: {tmp_path / 'a.pt'} is damaged (its sha256 differs); remove it" in capsys.readouterr().err


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace, synced = os.replace, os.fsync

    def replaced(source: Path, target: Path) -> None:
        events.append(f"replace {target.name}")
        replace(source, target)

    def sync(handle: int) -> None:
        events.append("fsync")
        synced(handle)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replaced)
    save_state({}, tmp_path / "a.pt")
    (tmp_path / "stats.jsonl").write_text('{"phase": "a", "step": 1}\n{"phase": "a", "step": 2}\n5\n{"step": 0}\n{"pha')
    truncate_stats(tmp_path / "stats.jsonl", "a", 1)
    assert events == ["fsync", "replace a.pt", "fsync", "fsync", "replace stats.jsonl", "fsync"]  # the last one is the folder's
    assert [json.loads(row)["step"] for row in (tmp_path / "stats.jsonl").read_text().splitlines()] == [1]


def test_a_full_disk_is_a_sentence_with_the_path_and_leaves_the_old_files_alone(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writes and reservations fail at the same places."""
    save_state({"value": 1}, tmp_path / "a.pt")
    network = nn.Linear(300, 300)
    saved = Checkpoint(tmp_path, {"network": network}, CheckpointRecipe())
    saved.save(1, [])
    saved.wait()
    tensor, memory = map_tensor(tmp_path / "rows.bin", torch.float32, (10,))
    tensor.fill_(7)
    memory.flush()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*a\.pt'"):
            save_state({"value": torch.zeros(300, 300)}, tmp_path / "a.pt")
        with pytest.raises(MachineError, match=r"rows\.bin cannot have 1 MiB \(File too large\); free some disk"):
            map_tensor(tmp_path / "rows.bin", torch.float32, (300_000,))
        saved.save(2, [])
        with pytest.raises(MachineError, match=rf"checkpoint in {tmp_path} could not be written \(.*\); the one before is whole"):
            saved.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_that_is_mapped_has_its_room_on_the_disk(tmp_path: Path) -> None:
    tensor, memory = map_tensor(tmp_path / "rows.bin", torch.float32, (1 << 18,))
    assert disk_bytes(tmp_path) >= 1 << 20 and not tensor.any() and memory


@pytest.mark.parametrize(
    ("every_s", "share", "save_s", "step_s", "expected"),
    [
        pytest.param(60.0, 0.05, 1.0, 10.0, [6, 12, 18], id="cheap: every_s decides"),
        pytest.param(10.0, 0.05, 2.0, 10.0, [1, 5, 9, 13, 17], id="2 s are 5 % of 40 s: share decides"),
        pytest.param(10.0, 1.0, 25.0, 10.0, [1, 4, 7, 10, 13, 16], id="dear: half of the time at most"),
    ],
)
def test_checkpoints_are_as_far_apart_as_the_recipe_says_and_their_cost_demands(
    every_s: float, share: float, save_s: float, step_s: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0

    class Slow:
        def state_dict(self) -> dict[str, Any]:
            nonlocal clock
            clock += save_s
            return {}

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock))
    saved, steps = Checkpoint(tmp_path / "a", {"slow": Slow()}, CheckpointRecipe(every_s=every_s, share=share)), []
    for step in range(1, 19):
        clock += step_s
        if saved.due():
            saved.save(step, [])
            saved.wait()
            steps.append(step)
    saved.close()
    assert steps == expected


def test_nothing_is_saved_while_the_last_checkpoint_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, real = threading.Event(), state_dict_saver.save
    monkeypatch.setattr(state_dict_saver, "save", lambda *a, **o: (go_on.wait(60), real(*a, **o)))
    saved = Checkpoint(tmp_path / "a", {}, CheckpointRecipe(every_s=1e-9, share=1))
    assert saved.due()
    saved.save(1, [])
    assert not saved.due()
    go_on.set()
    saved.wait()
    saved.blocked_s = 0  # the thread may have written faster than a busy machine let `save` return
    assert saved.due()
    saved.close()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_by_step_are_kept_and_nothing_else(keep: int, tmp_path: Path) -> None:
    saved = Checkpoint(tmp_path, {"linear": nn.Linear(2, 2)}, CheckpointRecipe(keep=keep))
    for step in (900, 1000000, 1000002, 1000001):
        saved.save(step, [])
    saved.close()
    newest = ["step-1000002", "step-1000001", "step-1000000"][:keep]
    assert [path.name for path in checkpoints(tmp_path)] == newest[::-1] and len(list(tmp_path.iterdir())) == keep


def trained(*, steps: int, fused: bool = False) -> dict[str, Any]:
    """A network under every optimizer after `steps` steps: one weight is not contiguous, one gets no gradient, and there are buffers."""
    torch.manual_seed(1)
    first, norm, convolution, unused = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 3), nn.Linear(1, 1)
    first.weight.data = first.weight.data.T.contiguous().T
    network = nn.Sequential(first, norm, convolution, unused)
    optimizers: dict[str, torch.optim.Optimizer] = {"muon": Muon([first.weight], lr=0.1)}
    optimizers["adamw"] = torch.optim.AdamW([first.bias, convolution.weight], lr=0.1, fused=fused)
    optimizers["adam"] = AdamWithoutMomentum([p for p in (norm.weight, unused.weight) if isinstance(p, nn.Parameter)], 0.1, 0.99)
    optimizers["sgd"] = torch.optim.SGD([p for p in (convolution.bias,) if p is not None], lr=0.1, momentum=0.9)
    ema = Ema(network, 0.5)
    best = BestWeights(ema)
    for step in range(steps):
        convolution(norm(first(torch.randn(5, 3))).unsqueeze(-1).expand(5, 4, 3)).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        ema.update(network, step)
        best.offer(float(step == 1), step + 1)
    return {"network": network, "ema": ema, "best": best, **optimizers}


@pytest.mark.parametrize("fused", [False, True])
def test_everything_that_is_saved_is_restored_into_a_training_that_has_not_begun(fused: bool, tmp_path: Path) -> None:
    state, fresh = trained(steps=3, fused=fused), trained(steps=0, fused=fused)
    saved = Checkpoint(tmp_path, state, CheckpointRecipe())
    saved.save(3, [{"loss": 0.25}])
    saved.close()
    again = Checkpoint(tmp_path, fresh, CheckpointRecipe())
    assert again.load() == (3, [{"loss": 0.25}])
    again.close()
    buffers = dict(state["network"].named_buffers())
    for key, item in state.items():
        before, after = (flat(entry.state_dict()) for entry in (item, fresh[key]))
        assert before.keys() == after.keys()
        for name in before.keys() - buffers.keys():
            equal = torch.equal(after[name], before[name]) if isinstance(before[name], Tensor) else after[name] == before[name]
            assert equal, (key, name)
    assert fresh["best"].step == 2 and fresh["adam"].state_dict()["state"].keys() == {0}
    assert {path.suffix for path in next(tmp_path.iterdir()).iterdir()} == {".safetensors", ".state"}  # no pickle


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else None
    return {name: state} if items is None else {k: v for key, value in items for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}


def test_tensors_of_several_files_are_all_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 40)
    networks = [nn.Linear(3, 4) for _ in range(2)]
    saved = Checkpoint(tmp_path, {"a": networks[0]}, CheckpointRecipe())
    saved.save(1, [])
    saved.close()
    assert len(list(tmp_path.glob("step-000001/*.safetensors"))) == 2
    again = Checkpoint(tmp_path, {"a": networks[1]}, CheckpointRecipe())
    again.load()
    again.close()
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in networks), strict=True))


@pytest.mark.parametrize("file", ["checkpoint.state", "*.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage: str, file: str, tmp_path: Path) -> None:
    state = {"network": nn.Linear(3, 4)}
    saved = Checkpoint(tmp_path, state, CheckpointRecipe())
    saved.save(7, [])
    saved.close()
    folder = checkpoints(tmp_path)[0]
    DAMAGES[damage](next(folder.glob(file)))
    again = Checkpoint(tmp_path, state, CheckpointRecipe())
    with pytest.raises(ArtifactError, match=r"step-000007 is damaged \(.+\); remove it to go on from the checkpoint before"):
        again.load()
    again.close()


SAVE = """
import sys
from pathlib import Path
import torch
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.checkpoint import Checkpoint
network = torch.nn.Linear(200, 200)
saved = Checkpoint(Path(sys.argv[1]), {"network": network}, CheckpointRecipe(keep=2))
start, _ = saved.load()
values = {value.item() for parameter in network.parameters() for value in parameter.data.unique()} if start else {float(start)}
assert values == {float(start)}, (start, values)
print(start, flush=True)
for step in range(start + 1, 100000):
    for parameter in network.parameters():
        parameter.data.fill_(step)
    saved.save(step, [])
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """Each process starts from where the one before was killed, in the middle of a write; all numbers of a checkpoint say its step."""
    written = 0
    for turn in range(4):
        with subprocess.Popen([sys.executable, "-c", SAVE, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            start = int(process.stdout.readline() or -1)
            steps = [int(process.stdout.readline()) for _ in range(5)]
            time.sleep(0.002 * turn)
            process.kill()
        assert start >= written and steps[0] == start + 1
        written = steps[-1] - 1  # a save waits until the one before is written
        assert len(checkpoints(tmp_path)) <= 3  # a third one is written before the first one goes
