"""flashgen restructure-encoder: run without T5 or with a small one.

`zeros` keeps T5's empty tokens, `prune` removes them from the sequence, `compact` has a small T5 make them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, begin, open_artifact
from flashgen.errors import UsageError
from flashgen.processes import check_launch
from flashgen.progress import say
from flashgen.recipe.schema import Recipe
from flashgen.stages.plan import check
from flashgen.stages.prompts import own_prompts, prompts_key

if TYPE_CHECKING:
    from torch import nn

MODES = ("zeros", "prune", "compact")


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool, mode: str) -> Artifact:
    """Raises NumericsError, and publishes nothing, when composition falls below `restructure.floor` of the student's own."""
    check_launch()
    if mode not in MODES:
        raise UsageError(f"--mode {mode} is not one of {', '.join(MODES)}")
    parent = open_artifact(student, ("student",))
    sampler = parent.manifest.sampler
    assert sampler is not None
    if sampler.encoder != "full":
        raise UsageError(f"{parent.path} is restructured already (mode {sampler.encoder}); give a student with its own T5 encoder")
    config = recipe.restructure
    untrained = mode == "zeros" or (mode == "prune" and not config.iterations)  # then nothing is loaded: files are linked or left out
    draft = begin(
        out, kind="student", stage="restructure-encoder", seed=seed,
        recipe=config.model_dump(exclude={"floor"}) | {"mode": mode} | ({} if untrained else prompts_key(recipe)),
        parents=[parent.as_parent("student")], force=force, check=lambda work: check("restructure", parent, recipe, work, mode=mode),
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    from flashgen.models.save import save_changed
    from flashgen.stages.report import finish

    changed = {} if untrained else _trained(parent, sampler, recipe, seed, draft.work, mode)
    save_changed(draft, parent.path, changed, dropped=() if mode == "compact" else ("text_encoder_3", "tokenizer_3"))
    left = sampler.model_copy(update={"encoder": mode, "t5_tokens": 0 if mode == "prune" else sampler.t5_tokens})
    before = sum(f.size for f in parent.manifest.files if f.path.startswith("text_encoder_3/"))
    after = sum(f.stat().st_size for f in (draft.path / "text_encoder_3").glob("*")) if left.has_t5 else 0
    tokens = {"before": sampler.clip_tokens + sampler.t5_tokens, "after": left.clip_tokens + left.t5_tokens}
    metrics: dict[str, object] = {"encoder_bytes": {"before": before, "after": after}, "bytes_saved": before - after, "text_tokens": tokens}
    scored = parent.manifest.metrics.get("composition")
    own = scored.get("overall") if isinstance(scored, dict) else None
    if config.floor and (not isinstance(own, float) or not recipe.bench.per_task):
        say("restructure.floor is not looked at: the student or its successor (bench.per_task=0) has no composition score")
        own = 0.0
    return finish(draft, left, recipe.bench, metrics=metrics, least=config.floor * (own or 0.0))


def _trained(parent: Artifact, sampler: Sampler, recipe: Recipe, seed: int, work: Path, mode: str) -> dict[str, nn.Module]:
    """The network that takes over, by the component that it replaces."""
    from flashgen.models.sample import latent_shape, load_pipeline
    from flashgen.models.text import tokenize
    from flashgen.training.prompts import prompt_pool, training_captions
    from flashgen.training.recovery import compact_t5, embedding_loss, own_trajectories, pruned_loss, recover, vision_loss

    config, nodes = recipe.restructure, sampler.sigmas
    own = own_prompts(recipe)
    prompt_pool(load_pipeline(parent.path, weights="text"), config.prompts, seed + 3, sampler.t5_tokens, work, own)  # no transformer yet
    pipe = load_pipeline(parent.path)
    pool = prompt_pool(pipe, config.prompts, seed + 3, sampler.t5_tokens, work, own)
    full = pipe.transformer
    replay = own_trajectories(full, pool, nodes, latent_shape(pipe, sampler.size_px), seed) if config.iterations else None
    if mode == "prune":
        slim = copy.deepcopy(full)
        (slim.context_embedder if config.adapter else slim).requires_grad_(True)
        if replay:
            recover(slim, pruned_loss(slim, replay, nodes), config, config.iterations, seed, work)
        return {"transformer": slim}
    ids = tokenize(pipe, training_captions(config.prompts, seed + 3, own), sampler.t5_tokens).t5
    assert ids is not None
    small = compact_t5(pipe.text_encoder_3, config, seed)
    recover(small, embedding_loss(small, pool, ids), config, config.embedding, seed, work, "embedding")
    if replay:
        recover(small, vision_loss(small, full, replay, ids, nodes), config, config.iterations, seed, work)
    return {"text_encoder_3": small}
