"""flashgen restructure-encoder: run without T5. `zeros` keeps its empty tokens, `prune` removes them from the sequence."""

from __future__ import annotations

import copy
from pathlib import Path

from flashgen.artifact.store import Artifact, begin, open_artifact
from flashgen.errors import UsageError
from flashgen.recipe.schema import Recipe

MODES = ("zeros", "prune")


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool, mode: str) -> Artifact:
    if mode == "compact":
        raise UsageError("--mode compact is not there yet; use --mode zeros or --mode prune")
    if mode not in MODES:
        raise UsageError(f"--mode {mode} is not one of {', '.join(MODES)}")
    parent = open_artifact(student, ("student",))
    sampler = parent.manifest.sampler
    assert sampler is not None
    if sampler.encoder != "full":
        raise UsageError(f"{parent.path} already runs without T5 (mode {sampler.encoder}); give a student with its T5 encoder")
    config = recipe.restructure.model_dump() | {"mode": mode}
    draft = begin(
        out, kind="student", stage="restructure-encoder", recipe=config, seed=seed, parents=[parent.as_parent("student")], force=force
    )
    if isinstance(draft, Artifact):
        return draft
    from flashgen.models.sample import load_pipeline
    from flashgen.models.save import save_changed
    from flashgen.stages.report import finish
    from flashgen.training.prompts import prompt_pool
    from flashgen.training.recovery import recover

    changed = {}
    if mode == "prune":
        pipe = load_pipeline(parent.path)
        pool = prompt_pool(pipe, recipe.restructure.prompts, seed + 3, sampler.t5_tokens)
        full = pipe.transformer.requires_grad_(False)
        slim = copy.deepcopy(full).requires_grad_(True)
        shape = (pipe.transformer.config.in_channels, sampler.size_px // 8, sampler.size_px // 8)
        recover(slim, full, pool, sampler.sigmas, recipe.restructure, shape, seed, draft.work)
        changed = {"transformer": slim}
    save_changed(draft, parent.path, changed, dropped=("text_encoder_3", "tokenizer_3"))
    left = sampler.model_copy(update={"encoder": mode, "t5_tokens": 0 if mode == "prune" else sampler.t5_tokens})
    saved = sum(f.size for f in parent.manifest.files if f.path.startswith("text_encoder_3/"))
    tokens = {"before": sampler.clip_tokens + sampler.t5_tokens, "after": left.clip_tokens + left.t5_tokens}
    return finish(draft, left, recipe.bench, metrics={"bytes_saved": saved, "text_tokens": tokens})
