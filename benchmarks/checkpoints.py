"""Cost of checkpoints in a training of SD3.5-Medium's adapters: the share of the time that it waits, and that it loses beside a write.

python -m benchmarks.checkpoints FOLDER          # a folder on the disk to measure; needs 4 GB of memory and of disk
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from flashgen import families
from flashgen.families.sd3.specs import SPECS
from flashgen.recipe.load import load
from flashgen.training.checkpoint import Checkpoint, checkpoints
from flashgen.training.ema import Ema
from flashgen.training.optimizers import adam

ALONE_S = 20.0  # seconds of matrix products, which stand for a training, without a write


def linears() -> list[tuple[int, int]]:
    """(rows, columns) of every linear of SD3.5-Medium that gets an adapter."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SPECS["sd35-medium"].transformer)
    targets = re.compile(families.get("sd3").lora_targets)
    return [
        (part.out_features, part.in_features)
        for name, part in transformer.named_modules()
        if isinstance(part, nn.Linear) and targets.fullmatch(name)
    ]


def products(until: float, writing: Checkpoint | None = None) -> tuple[int, float]:
    """(matrix products, seconds) until that many seconds have passed, or until `writing` has written."""
    a, b, count, start = torch.randn(512, 1536), torch.randn(1536, 1536), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < until and (writing is None or not writing._writing.done()):
        torch.mm(a, b)
        count += 1
    return count, elapsed


def main(folder: Path) -> None:
    """Save the state of a matching three times, computing beside the writes; print sizes, times and shares as JSON."""
    recipe, shapes = load("sd35-medium-24gb"), linears()
    lora, matching = recipe.distill.lora, recipe.distill.matching
    assert lora is not None
    sizes = [size for m, n in shapes for size in ((lora.rank, n), (m, lora.rank))]
    roles = {name: nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes) for name in ("student", "fake_score")}
    optimizers = {f"{name}_adamw": adam(list(role), matching.lr, matching.betas) for name, role in roles.items()}
    for role, optimizer in zip(roles.values(), optimizers.values(), strict=True):
        for parameter in role:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    state: dict[str, Any] = {**roles, "ema": Ema(roles["student"], 0.99), **optimizers}
    count, alone = products(ALONE_S)
    saved, rows = Checkpoint(folder, state, recipe.checkpoint), []
    for step in (1, 2, 3):
        saved.save(step, [])
        done, written = products(3600.0, saved)
        saved.wait()
        rows.append({"blocked_s": saved.blocked_s, "written_s": written, "lost_s": max(0.0, written - done * alone / count)})
    saved.close()
    size = sum(path.stat().st_size for path in checkpoints(folder)[-1].iterdir())
    shutil.rmtree(folder)
    worst = {key: max(row[key] for row in rows) for key in rows[0]}
    every = max(recipe.checkpoint.every_s, worst["blocked_s"] / recipe.checkpoint.share)
    share = {"waiting": worst["blocked_s"] / every, "waiting and lost": (worst["blocked_s"] + worst["lost_s"]) / every}
    print(json.dumps({"linears": len(shapes), "bytes": size, "saves": rows, "interval_s": every, "share": share}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
