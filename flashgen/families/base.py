"""The seam between flashgen and a model family.

Everything that depends on an architecture is an attribute or a method of `Family`: `families.sd3` is the first instance. Importing this
module, and a family, imports no torch; methods that need it import it themselves.

Conventions: sigma in [0, 1], 1 is noise; v = dx/dsigma = eps - x0 (`flow.convert`). Latents are [B, C, h, w] on the transformer's scale
everywhere outside a family, however the transformer packs or scales them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from flashgen.errors import ArtifactError, UsageError
from flashgen.families.conditioning import Conditioning
from flashgen.families.configs import Config, Configs
from flashgen.pixels import Size

if TYPE_CHECKING:
    import re

    import torch
    from torch import Tensor, nn

    from flashgen.artifact.manifest import Manifest, Sampler
    from flashgen.families.cards import Published, Usage
    from flashgen.families.graphs import Component
    from flashgen.models.pipeline import Pipeline
    from flashgen.recipe.compression import RestructureRecipe
    from flashgen.recipe.schema import CheckpointRecipe
    from flashgen.recipe.teacher import TeacherRecipe
    from flashgen.worlds.base import TeacherData


class TextEncoder(NamedTuple):
    """Where the tokenizer of a text encoder lies, and which entry of `Sampler.tokens` is the length of its output."""

    tokenizer: str
    tokens: str


class Forward(NamedTuple):
    """Size of one pass of the transformer over one picture."""

    tokens: int  # image and text
    width: int
    blocks: int
    multiply_adds: float
    latent: int  # numbers per picture in latent space

    @property
    def hidden(self) -> int:
        """Numbers in the hidden states of one block."""
        return self.tokens * self.width


class Costs(NamedTuple):
    """Measured memory of a family's transformer, in tensors of the size of one block's hidden states (docs/fullsize.md)."""

    kept: int  # that a block keeps for its backward pass
    kept_with_adapters: int
    running: int  # alive at once in a forward pass


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the family's original checkpoints: the rows of diffusers' `parts` below each other; `swapped` exchanges its halves."""

    name: str
    parts: tuple[str, ...]
    swapped: bool


class Restructuring(ABC):
    """How `restructure-encoder` removes the family's large text encoder, or trains a small one in its place."""

    encoder: ClassVar[str]  # the text encoder's folder

    @abstractmethod
    def tokens_after(self, tokens: Mapping[str, int], mode: str) -> dict[str, int]:
        """`Sampler.tokens` of a student restructured with `mode` zeros, prune or compact."""

    @abstractmethod
    def pruned(self, cond: Conditioning) -> Conditioning:
        """`cond` without the encoder's tokens in the sequence."""

    @abstractmethod
    def with_output(self, cond: Conditioning, output: Tensor) -> Conditioning:
        """`cond` with the encoder's share replaced by `output` [B, L, D]. Gradient: through `output`."""

    @abstractmethod
    def share(self, cond: Conditioning) -> Tensor:
        """The encoder's output [B, L, D] inside `cond`."""

    @abstractmethod
    def compact_encoder(self, folder: Path, config: RestructureRecipe, seed: int) -> nn.Module:
        """A smaller encoder of the same width and vocabulary; `folder` is the pipeline's."""

    @abstractmethod
    def text_embedder(self, transformer: nn.Module) -> nn.Module:
        """The layer that projects text tokens to the transformer's width, the only one that `restructure.adapter` trains."""


class Family(ABC):
    """One model family.

    `configs` gives the config of a component: `Pipeline.configs` of a loaded pipeline, `configs_in(folder, family)` of a folder.
    """

    name: ClassVar[str]  # in manifests and recipes
    models: ClassVar[str]  # for messages
    pipeline_class: ClassVar[str]  # diffusers' class in model_index.json
    text_encoders: ClassVar[Mapping[str, TextEncoder]]  # by folder, in the order of the pipeline
    optional: ClassVar[frozenset[str]] = frozenset()  # components that a pipeline may lack
    schemas: ClassVar[Mapping[str, type[Config]]] = {}  # bounds of the networks' configs, checked whenever one is read
    droppable: ClassVar[str | None] = None  # text encoder that training drops at random, so that a student runs without it
    restructuring: ClassVar[Restructuring | None] = None
    protect: ClassVar[tuple[str, ...]] = ()  # name prefixes of layers that quantization keeps at 8 bits
    lora_targets: ClassVar[str]  # regular expression of the modules that get an adapter
    lora_prefix: ClassVar[str] = "transformer"  # of the tensors' names in a LoRA file
    modulation: ClassVar[re.Pattern[str] | None] = None  # adaLN Linears, whose input is one vector per picture, the same for all blocks
    costs: ClassVar[Costs]
    skip_argument: ClassVar[str | None] = None  # of the transformer: a list of blocks that a pass leaves out; None: it has no such argument
    architectures: ClassVar[tuple[str, ...]] = ()  # names that `teacher random --like` takes
    gguf_arch: ClassVar[str | None] = None  # general.architecture of its GGUF files; None: programs that read GGUF do not know the family

    @property
    def networks(self) -> tuple[str, ...]:
        """Component folders that hold weights."""
        return ("transformer", "vae", *self.text_encoders)

    @property
    def components(self) -> tuple[str, ...]:
        """All component folders of a pipeline."""
        return (*self.networks, *(encoder.tokenizer for encoder in self.text_encoders.values()), "scheduler")

    # ---- sizes and names; no torch

    @abstractmethod
    def vae_factor(self, configs: Configs) -> int:
        """Pixels per latent along one side."""

    @abstractmethod
    def latent_shape(self, configs: Configs, size: Size) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture."""

    @abstractmethod
    def size_limits(self, configs: Configs) -> tuple[int, int]:
        """(unit, largest): sides that the networks can draw are multiples of `unit` px up to `largest` px."""

    @abstractmethod
    def import_sampler(self, folder: Path) -> Sampler:
        """How an imported teacher is sampled by default."""

    @abstractmethod
    def layer_group(self, name: str) -> tuple[str, str | None]:
        """(block, class) of a layer: layers of one class in one block share their bits. Outside of blocks: (the layer's name, None)."""

    @abstractmethod
    def forward_size(self, configs: Configs, linears: Mapping[str, tuple[int, ...]], size: Size, tokens: Mapping[str, int]) -> Forward:
        """Size of one pass; `linears` are the shapes [N, K] of the transformer's Linears by name, `tokens` is `Sampler.tokens`."""

    @abstractmethod
    def num_blocks(self, configs: Configs) -> int:
        """Number of the transformer's blocks."""

    @abstractmethod
    def conditioning_numbers(self, configs: Configs, tokens: Mapping[str, int]) -> int:
        """Numbers in the conditioning of one prompt."""

    def original_tensors(self, names: Sequence[str]) -> list[OriginalTensor]:
        """The tensors of the family's original checkpoint for diffusers' `names`. Raises UsageError where a family has none."""
        raise UsageError(f"--target gguf: {self.models} has no original checkpoint layout here; export without --target gguf")

    @abstractmethod
    def description(self, configs: Configs, sampler: Sampler, pad_ids: Mapping[str, int]) -> dict[str, Any]:
        """Description that `device.sampler` and the web page follow to draw with the exported components (`families.graphs`)."""

    def describe_old(self, folder: Path, manifest: Manifest) -> dict[str, Any]:
        """The same for a device artifact that was exported before descriptions were stored."""
        raise ArtifactError(f"{folder}: the manifest does not describe its components; export the student again with: flashgen export")

    def usage(self, sampler: Sampler, prompt: str, base: str) -> Usage | None:
        """How other programs draw `prompt`; `base` is a folder or hub id of the pipeline under a LoRA. None: no other program does."""
        return None

    def published(self, configs: Configs) -> Published | None:
        """The published weights whose transformer has this config, or None."""
        return None

    # ---- torch

    def set_scheduler(self, folder: Path, sampler: Sampler) -> bool:
        """Set the scheduler in `folder` so that diffusers' `num_inference_steps` alone walks `sampler.sigmas`.

        False where no setting does; the folder is then left as it was.
        """
        return False

    @abstractmethod
    def network_classes(self) -> dict[str, Any]:
        """diffusers or transformers class of each component in `networks`."""

    @abstractmethod
    def tokenize(self, pipe: Pipeline, prompts: list[str], sampler: Sampler) -> dict[str, dict[str, Tensor]]:
        """Inputs of every text encoder that `pipe` has: {encoder: {argument: [B, L]}}."""

    @abstractmethod
    def encode(self, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]], sampler: Sampler) -> Conditioning:
        """Conditioning of tokenized prompts, as the diffusers pipeline computes it. Called by `models.prompts.encode_prompts` only."""

    @abstractmethod
    def transformer_inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        """Keyword arguments of the transformer for latents `x` [B, C, h, w] at noise levels `sigma` [B]."""

    @abstractmethod
    def velocity(self, output: Tensor, x: Tensor) -> Tensor:
        """v [B, C, h, w] from the transformer's `output` for `x`."""

    @abstractmethod
    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: the mode of the VAE's posterior, normalised."""

    @abstractmethod
    def from_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] of latents [B, C, h, w]."""

    @abstractmethod
    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, in order."""

    @abstractmethod
    def block_features(self, output: Any, x: Tensor) -> Tensor:
        """Image features [B, width, rows, columns] from a block's output, for latents `x` [B, C, h, w]."""

    @abstractmethod
    def width(self, transformer: nn.Module) -> int:
        """Width of the hidden states of image tokens."""

    @abstractmethod
    def export_components(self, pipe: Pipeline, sampler: Sampler, vae_encoder: bool = False) -> Iterator[Component]:
        """Every network that a device needs, with example inputs as they occur when sampling."""

    def prepare_export(self, transformer: nn.Module, latent_shape: tuple[int, ...]) -> None:  # noqa: B027  most need nothing
        """Make `transformer` traceable in place for one latent shape (fused operators, cropped tables). Default: nothing to do."""

    def write_random(self, like: str, layers: int | None, words: Sequence[str] | None, folder: Path, seed: int) -> Sampler:
        """Write a pipeline with seeded random weights in the shapes of architecture `like`, at most `layers` per network.

        `words` become single tokens of small vocabularies; None: common English words.
        """
        raise UsageError(f"--like {like}: {self.models} cannot be fabricated here")

    def train_teacher(
        self, data: TeacherData, held_out: Sequence[str], config: TeacherRecipe, seed: int, work: Path, checkpoint: CheckpointRecipe
    ) -> tuple[Pipeline, Sampler]:
        """Train a small teacher of a world from nothing; `held_out` are captions that are not trained on. Resumes from `work`."""
        raise UsageError(f"teacher train: {self.models} has no small architecture to train from nothing; import a teacher instead")


def predict(network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Output of a transformer for its keyword arguments. The only place in flashgen where a transformer is called in torch."""
    import torch

    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    floats = {name: value for name, value in tensors.items() if value.is_floating_point() and value.ndim > 1}  # noise levels stay exact
    given = next(iter(floats.values()))
    stored: torch.dtype = getattr(network, "dtype", given.dtype)
    computed: torch.dtype | None = getattr(network, "compute_dtype", None)
    with torch.autocast(given.device.type, computed) if computed else nullcontext():
        output: Tensor = network(**{**inputs, **{name: value.to(stored) for name, value in floats.items()}}, return_dict=False)[0]
    return output.to(given.dtype)


def compute_in(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Let `predict` run `network` under autocast to `dtype`, while its weights stay what they are; None: without autocast."""
    network.compute_dtype = dtype  # type: ignore[assignment]


def velocity(network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, skip: Sequence[int] = ()) -> Tensor:
    """v [B, C, h, w] of one forward pass for latents `x` [B, C, h, w] at `sigma` [B]. Gradient: to the network and to `x`.

    The pass leaves out the blocks `skip`, of a family with a `skip_argument`.
    """
    family = cond.family
    inputs: dict[str, Any] = {**family.transformer_inputs(x, sigma, cond.to(x.dtype))}
    if skip:
        assert family.skip_argument
        inputs[family.skip_argument] = list(skip)
    return family.velocity(predict(network, inputs), x)
