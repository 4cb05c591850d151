"""One tiny diffusers folder, many mutations: `teacher import` names the file at fault, or the picture stays what it was."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError
from flashgen.models.border import check_pipeline
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import sample
from flashgen.stages.inputs import sampler_of
from tests import runs
from tests.cli.command import refused
from tests.conftest import tiny_sampler

Change = Callable[[Path], object]
CLIP, T5, TRANSFORMER, VAE = "text_encoder/config.json", "text_encoder_3/config.json", "transformer/config.json", "vae/config.json"
SCHEDULER, TOKENIZER, WORDS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def plain(tiny_teacher: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher as another program would have saved it."""
    folder = tmp_path_factory.mktemp("border") / "plain"
    shutil.copytree(tiny_teacher.path, folder, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


@pytest.fixture
def mutable(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "X"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something asked the network for a local path")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield


def put(file: str, **values: Any) -> Change:
    """Set `values` in a JSON file; ... removes a key."""

    def change(folder: Path) -> None:
        found = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return change


def text(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content)


def cut(file: str) -> Change:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def gone(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def fifo(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


def in_tokenizer(**model: Any) -> Change:
    """Change the model of tokenizer.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / WORDS).read_text())
        found["model"] |= model
        (folder / WORDS).write_text(json.dumps(found))

    return change


def backtracking(folder: Path) -> None:
    """A regular expression without end in tokenizer.json, in a class that takes it from there; CLIPTokenizer has its own."""
    put("model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])(folder)
    split = {"type": "Split", "pattern": {"Regex": "([a-z ]+)+="}, "behavior": "Isolated", "invert": False}
    put(WORDS, pre_tokenizer=split)(folder)


def as_variant(kind: str, *, sharded: bool = False, plainly: bool = False) -> Change:
    """The transformer's weights as files of a variant; with `plainly` the plain ones stay."""

    def change(folder: Path) -> None:
        weights, stem = load_file(folder / WEIGHTS), (folder / WEIGHTS).name.removesuffix(".safetensors")
        if not plainly:
            (folder / WEIGHTS).unlink()
        if not sharded:
            save_file(weights, folder / f"transformer/{stem}.{kind}.safetensors", metadata={"format": "pt"})
            return
        names = sorted(weights)
        shards = {f"{stem}.{kind}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
        for shard, part in shards.items():
            save_file({name: weights[name] for name in part}, folder / "transformer" / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
        (folder / f"transformer/{stem}.safetensors.index.{kind}.json").write_text(json.dumps(index))

    return change


def index_names(shard: str) -> Change:
    """An index of the transformer's that says all its tensors lie in `shard`, which exists."""

    def change(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
        names = load_file(folder.parent / "outside.safetensors")
        target = shard.format(outside=folder.parent / "outside.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))

    return change


def typed(dtype: torch.dtype) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        save_file(weights | {"proj_out.bias": weights["proj_out.bias"].to(dtype)}, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def code(file: str, **values: Any) -> Change:
    """Put a module beside `file` that fails the test when it runs, and settings that name it."""

    def change(folder: Path) -> None:
        put(file, **values)(folder)
        for name in (folder / file, folder / "model_index.json"):
            (name.parent / "evil.py").write_text("import os\nos._exit(77)\n")

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    # missing
    "no tokenizer": (gone("tokenizer"), r"/tokenizer/tokenizer.json cannot be read \(No such file"),
    "no second tokenizer": (gone("tokenizer_2"), r"/tokenizer_2/tokenizer.json"),
    "no vocabulary": (gone(WORDS), r"/tokenizer/tokenizer.json"),
    "no merges": (lambda f: (gone(WORDS)(f), text("tokenizer/vocab.json", "{}")(f)), r"tokenizer/merges.txt"),
    "no scheduler": (gone("scheduler"), r"scheduler/scheduler_config.json"),
    "no encoder, as the index says": (gone("text_encoder_3"), r"text_encoder_3/config.json cannot be read"),
    "no weights": (gone(WEIGHTS), r"transformer has no safetensors weights"),
    "index without a tokenizer": (put("model_index.json", tokenizer=...), r"names no tokenizer;"),
    "index without a network": (put("model_index.json", vae=[None, None]), r"names no vae;"),
    # cut, of another kind, or none
    "pointer": (text(WEIGHTS, POINTER), r"diffusion_pytorch_model.safetensors is a Git LFS pointer.*git lfs pull"),
    "pointer of words": (text(WORDS, POINTER), r"tokenizer.json is a Git LFS pointer"),
    "pointer of settings": (text(VAE, POINTER), r"vae/config.json is a Git LFS pointer"),
    "pointer of a small file": (text("tokenizer/special_tokens_map.json", POINTER), r"special_tokens_map.json"),
    "cut words": (cut(WORDS), r"/tokenizer/?.* (is no tokenizer|cannot be read)"),
    "unknown words": (in_tokenizer(type="Nothing"), r"X/tokenizer is no tokenizer"),
    "no words": (in_tokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]), r"X/tokenizer is no tokenizer"),
    "more words than embeddings": (put(CLIP, vocab_size=100), r"text_encoder"),
    "backtracking words": (backtracking, r"X/tokenizer is no tokenizer \(.*retry-limit"),
    "settings that are a list": (text(TOKENIZER, "[]"), r"tokenizer"),
    "cut weights": (cut(WEIGHTS), r"is not a whole safetensors file"),
    "cut settings": (cut(TRANSFORMER), r"transformer/config.json cannot be read"),
    "empty index": (text("model_index.json", ""), r"model_index.json cannot be read"),
    "list as index": (text("model_index.json", "[1]"), r"model_index.json .*no mapping"),
    "deep": (text(VAE, "[" * 100_000), r"vae/config.json cannot be read"),
    "5,000 digits": (text(VAE, '{"a": ' + "9" * 5000 + "}"), r"vae/config.json cannot be read"),
    "not UTF-8": (lambda f: (f / VAE).write_bytes(b"\xff\xfe{}"), r"vae/config.json cannot be read"),
    "no number": (text(SCHEDULER, '{"shift": NaN}'), r"scheduler_config.json cannot be read \(it holds NaN"),
    "pipe as settings": (fifo(VAE), r"vae/config.json is not a plain file"),
    "pipe as scheduler": (fifo(SCHEDULER), r"scheduler_config.json is not a plain file"),
    "sparse settings": (lambda f: os.truncate(f / VAE, 6 << 30), r"vae/config.json cannot be read \(6442450944 bytes"),
    # absurd and mistyped
    **{
        f"{name.rpartition('/')[0]} {key}={value!r}"[:60]: (put(name, **{key: value}), rf"{name}: {key}: ")
        for name, key, value in [
            (TRANSFORMER, "num_layers", 10**7), (TRANSFORMER, "num_layers", -1), (TRANSFORMER, "num_layers", "2"),
            (TRANSFORMER, "num_layers", 2.0), (TRANSFORMER, "num_layers", True), (TRANSFORMER, "num_layers", ...),
            (TRANSFORMER, "sample_size", 0), (TRANSFORMER, "sample_size", 10**9), (TRANSFORMER, "pos_embed_max_size", 10**6),
            (TRANSFORMER, "patch_size", 0), (TRANSFORMER, "patch_size", [2]), (TRANSFORMER, "in_channels", None),
            (TRANSFORMER, "attention_head_dim", 10**12), (TRANSFORMER, "dual_attention_layers", "01"),
            (VAE, "block_out_channels", []), (VAE, "block_out_channels", [8] * 9), (VAE, "block_out_channels", 8),
            (VAE, "scaling_factor", 0), (VAE, "scaling_factor", None), (VAE, "scaling_factor", 1e308), (VAE, "shift_factor", ...),
            (VAE, "layers_per_block", 10**7), (VAE, "mid_block_add_attention", 1), (VAE, "norm_num_groups", 0),
            (CLIP, "num_hidden_layers", 10**7), (CLIP, "max_position_embeddings", 10**9), (CLIP, "vocab_size", 10**9),
            (CLIP, "hidden_size", "16"), (T5, "num_layers", 10**7), (T5, "d_model", -32), (T5, "vocab_size", None),
        ]
    },
    "heads": (put(TRANSFORMER, num_attention_heads=3), r"transformer/config.json: config: num_attention_heads x attention_head_dim is not"),
    "a norm that is none": (put(TRANSFORMER, qk_norm="nothing"), r"transformer/config.json makes no SD3Transformer2DModel"),
    "an activation that is none": (put(CLIP, hidden_act="nothing"), r"text_encoder/config.json makes no CLIPTextModelWithProjection"),
    "activation of the wrong type": (put(T5, feed_forward_proj=7), r"text_encoder_3/config.json makes no T5EncoderModel"),
    "blocks that are none": (put(VAE, down_block_types=["Nothing"] * 4), r"vae/config.json makes no AutoencoderKL"),
    "fewer heads than width": (put(CLIP, num_attention_heads=3), r"text_encoder/config.json makes no"),
    "other width": (put(TRANSFORMER, pooled_projection_dim=48), r"its config asks for"),
    "patches": (put(TRANSFORMER, sample_size=7), r"transformer|fit each other"),
    "negative length": (put(TOKENIZER, model_max_length=-1), r"tokenizer_config.json: model_max_length"),
    "length of text": (put(TOKENIZER, model_max_length="16"), r"tokenizer"),
    # weights
    "integers": (typed(torch.int32), r"proj_out.bias is of type I32"),
    "two variants": (lambda f: (as_variant("bf16", plainly=True)(f), as_variant("fp16")(f)), r"as bf16 and as fp16 and none without"),
    "another name": (lambda f: shutil.move(f / WEIGHTS, f / "transformer/weights.safetensors"), r"weights.safetensors is not called"),
    "index leads out": (index_names("../../outside.safetensors"), r"names '../../outside.safetensors', which is no"),
    "index leads to the root": (index_names("{outside}"), r"which is no safetensors file beside it"),
    "index of another type": (text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "model.bin"}}'), r"names 'model.bin'"),
    "index of numbers": (text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": 1}}'), r"is no index of shards"),
    # schedulers
    **{
        f"scheduler {key}": (put(SCHEDULER, **{key: value}), rf"scheduler_config.json: {key} is {re.escape(repr(value))}")
        for key, value in [
            ("_class_name", "DDIMScheduler"), ("use_dynamic_shifting", True), ("use_karras_sigmas", True), ("use_beta_sigmas", True),
            ("use_exponential_sigmas", True), ("shift_terminal", 0.02), ("num_train_timesteps", 10**9), ("invert_sigmas", True),
            ("stochastic_sampling", True), ("shift", "3"), ("shift", 0), ("shift", -1), ("shift", 1e9),
        ]
    },
    # code of the artifact's own
    "code in a network": (code(TRANSFORMER, _class_name="evil.Net"), r"transformer/config.json makes no"),
    "code as component": (code("model_index.json", transformer=["evil", "Net"]), r"transformer is a Net, flashgen takes a SD3Transf"),
    "code as tokenizer": (code("model_index.json", tokenizer=["evil", "Net"]), r"names 'Net', which is no tokenizer"),
    "code as pipeline": (code("model_index.json", _class_name=["evil", "Net"]), r"flashgen takes StableDiffusion3Pipeline"),
    "a class that is none": (put("model_index.json", vae=["diffusers", 7]), r"model_index.json: vae is \['diffusers', 7\]"),
}  # fmt: skip
SAME: dict[str, Change] = {
    "untouched": lambda f: None,
    "no length": put(TOKENIZER, model_max_length=...),
    "endless length": put(TOKENIZER, model_max_length=10**30),
    "no tokenizer settings": lambda f: [gone(f"tokenizer{n}/tokenizer_config.json")(f) for n in ("", "_2")],
    "half": as_variant("fp16"),
    "half in shards": as_variant("fp16", sharded=True),
    "bf16 by name": as_variant("bf16", sharded=True),
    "a variant beside the plain weights": lambda f: text("transformer/diffusion_pytorch_model.fp16.safetensors", "broken")(f),
    "code that nobody asked for": code(TRANSFORMER, auto_map={"AutoModel": "evil.Net"}, trust_remote_code=True),
    "code in a text encoder": code(CLIP, auto_map={"AutoModel": "evil.Net"}, custom_pipeline="evil"),
    "code in a tokenizer": code(TOKENIZER, auto_map={"AutoTokenizer": ["evil.Net", None]}, trust_remote_code=True),
    "custom pipeline": code("model_index.json", custom_pipeline="evil"),
    "settings of later versions": put(VAE, not_yet_known=10**30, mid_block_add_attention=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_import_names_the_file_at_fault(name: str, mutable: Path) -> None:
    change, message = REFUSED[name]
    change(mutable)
    with pytest.raises(ArtifactError, match=message) as raised:
        stage = runs.prepared_import(str(mutable))
        stage.parents()
    assert str(mutable) in str(raised.value) and "\n" not in str(raised.value)


def picture(artifact: Artifact) -> NDArray[np.uint8]:
    assert artifact.manifest.sampler is not None
    return sample(load_pipeline(artifact.path), artifact.manifest.sampler, ["a red cat"], [3], sigmas=[1.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def drawn(tiny_teacher: Artifact) -> NDArray[np.uint8]:
    return picture(tiny_teacher)


@pytest.mark.parametrize("name", SAME)
def test_import_draws_the_same_picture(name: str, mutable: Path, tmp_path: Path, drawn: NDArray[np.uint8]) -> None:
    SAME[name](mutable)
    imported = runs.import_(str(mutable), tmp_path / "out")
    assert np.array_equal(picture(imported), drawn)
    assert not [path for path in imported.path.rglob("*") if "fp16" in path.name or path.suffix == ".py"]


def test_a_refused_import_is_exit_3_and_leaves_nothing(mutable: Path, tmp_path: Path) -> None:
    gone("tokenizer_2")(mutable)
    assert "tokenizer_2" in refused(3, "teacher", "import", mutable, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("settings", "shift"), [({"shift": ...}, 1.0), ({"shift": 2}, 2.0), ({"use_dynamic_shifting": None}, 3.0)])
def test_the_shift_is_the_schedulers_as_diffusers_reads_it(settings: dict[str, Any], shift: float, mutable: Path) -> None:
    put(SCHEDULER, **settings)(mutable)
    sampler = check_pipeline(mutable)[1]
    assert sampler.shift == shift == FlowMatchEulerDiscreteScheduler.from_pretrained(mutable / "scheduler").config.shift


@pytest.mark.parametrize(("length", "positions"), [(None, 16), (10**30, 16), (9, 9)])
def test_text_is_as_long_as_tokenizer_and_encoders_allow(length: int | None, positions: int, mutable: Path) -> None:
    put(TOKENIZER, model_max_length=... if length is None else length)(mutable)
    assert check_pipeline(mutable)[1].tokens == {"clip": positions, "t5": 16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": {"clip": 16}}, "sampler.tokens.t5 is not 2 to 4096, as text_encoder_3 needs"),
        ({"tokens": {"clip": 17, "t5": 16}}, "sampler.tokens.clip is not 2 to 16, as text_encoder needs"),
        ({"tokens": {"clip": 0, "t5": 16}}, "sampler.tokens.clip is not 2 to 16"),
        ({"size_px": 72}, "sampler.size_px 72 is not in multiples of 16 up to 512 px"),
        ({"size_px": 1024}, "sampler.size_px 1024 is not in multiples"),
    ],
)
def test_a_sampler_that_does_not_fit_the_networks_is_refused(settings: dict[str, Any], message: str, tiny_student: Artifact) -> None:
    manifest = tiny_student.manifest.model_copy(update={"sampler": tiny_sampler(**settings)})
    with pytest.raises(ArtifactError, match=message):
        sampler_of(dataclasses.replace(tiny_student, manifest=manifest))
