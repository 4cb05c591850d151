"""flashgen export: an artifact as ONNX components that run without torch, each checked against torch, or as one GGUF."""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flashgen.artifact.draft import Draft
from flashgen.artifact.files import read_json
from flashgen.artifact.manifest import Kind, Sampler
from flashgen.errors import ArtifactError, UsageError
from flashgen.families.configs import configs_in
from flashgen.families.tiny_decoder import TINY_DECODER, WEIGHTS, described
from flashgen.progress import say, track
from flashgen.stages.base import Result, Stage
from flashgen.stages.gguf import check_gguf, write_gguf
from flashgen.stages.planning import Plan
from flashgen.stages.sizes import check_size

if TYPE_CHECKING:
    from flashgen.families.graphs import Component
    from flashgen.models.footprint import Footprint, Parts
    from flashgen.models.pipeline import Pipeline
    from flashgen.quant.pack import QuantizedLinear

ENGINE = "onnxruntime"
DECODED = 64  # latents per side of the example that the decoder is compared on, at most
ATTENTION_BYTES = 8.0  # per pair of latents in the VAE's attention: scores, and their softmax
ENCODER_BYTES = 256 << 20  # activations of a text encoder


@dataclass
class Export(Stage):
    """A teacher, student or quantized artifact for `target`: onnx, web (onnx and a page that draws in the browser) or gguf.

    With `offline` the page's libraries come from the cache. Nothing is published when a component's PSNR against torch is below the
    recipe's floor (NumericsError) or the page's libraries cannot be had (MachineError).
    """

    target: Literal["onnx", "gguf", "web"] = "onnx"
    offline: bool = False

    name = "export"
    cpu_only = True
    takes: ClassVar[Mapping[str, tuple[Kind, ...]]] = {"student": ("student", "quantized", "teacher")}

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """gguf or device."""
        return "gguf" if self.target == "gguf" else "device"

    @cached_property
    def device_sampler(self) -> Sampler:
        """How the exported components draw: as the source, at the recipe's size."""
        size = self.recipe.export.size_px
        return self.sampler if size is None else self.sampler.model_copy(update={"size_px": size})

    @property
    def is_tiny(self) -> bool:
        """Whether `vae_decoder` is the tiny decoder: a GGUF has none."""
        chosen = self.recipe.export.decoder != "vae" and self.target != "gguf"
        return chosen and (self.source.path / TINY_DECODER).is_dir()

    def check(self) -> None:
        if self.offline and self.target != "web":
            raise UsageError(f"--offline has no effect on --target {self.target}, which downloads nothing; leave it out")
        if self.source.manifest.recipe.get("scheme") == "nf4":
            raise ArtifactError(
                f"{self.source.path} has NF4 codes, for diffusers; quantize without --scheme nf4 to export, or export the student"
            )
        if self.recipe.export.decoder == "tiny" and not (self.source.path / TINY_DECODER).is_dir():
            raise UsageError(
                f"export.decoder=tiny: {self.source.path} has no tiny decoder; train one first: "
                "flashgen restructure-encoder STUDENT --mode decoder"
            )
        if self.recipe.export.precision == "float16":
            if self.target == "web":
                raise UsageError("export.precision=float16 is for engines on GPUs, not for --target web; leave it out")
            if self.source.manifest.recipe.get("group") == "channel":
                raise UsageError(
                    f"export.precision=float16: {self.source.path} has codes of quantize.group=channel, whose products take fp32; "
                    "quantize in groups, as quantize.group=128"
                )
        if self.target == "gguf":
            check_gguf(self)
        elif (size := self.recipe.export.size_px) is not None:
            check_size(self.family, configs_in(self.source.path, self.family), self.sampler, size, "export.size_px=")

    def settings(self) -> dict[str, Any]:
        config, target = self.recipe.export, {"target": self.target} | ({"decoder": "tiny"} if self.is_tiny else {})
        names = {"psnr_floor_db"} if self.target == "gguf" else {*type(config).model_fields} - {"decoder"}
        return config.model_dump(mode="json", include=names) | target

    def plan(self) -> Plan:
        """Layers pass torch from disk; then onnxruntime holds a component's weights: mapped, packed again, or unpacked to fp32.

        A GGUF is written and read back tensor by tensor, no network runs. That a graph holds its codes twice is a measurement
        (docs/fullsize.md), not derived. Forwards are those of torch and of the graph at every node.
        """
        from flashgen.models.footprint import PROGRAM, Footprint

        footprint, config = Footprint(self.source), self.recipe.export
        codes = {part: self._code_bytes(part) for part in footprint.parts}
        if self.target == "gguf":
            weights = footprint.transformer
            held = {"program": float(PROGRAM), "codes": codes["transformer"], "tensor": 14.0 * weights.largest}
            return Plan({"write": held}, 2.0 * weights.count)
        one, disk = footprint.forward(self.device_sampler.size_px), 0.0
        memory: dict[str, Parts] = {}
        activations = {"transformer": 4.0 * self.family.costs.running * one.hidden, "vae": self._vae_activations(footprint)}
        for part, tensors in footprint.parts.items():
            linear = sum(map(prod, tensors.linears.values())) if codes[part] else 0
            rest = (footprint.learnable if part == "transformer" else tensors.count) - linear  # a table is cut to one size
            if part == "vae" and self.is_tiny and not config.vae_encoder:
                rest = (self.source.path / TINY_DECODER / WEIGHTS).stat().st_size // 2  # fp16
            disk += (codes[part] + 2 * rest) * (0.6 if part == "vae" and not config.vae_encoder else 1)  # the decoder alone
            held = {"program": float(PROGRAM), "codes": codes[part], "graph": 2 * codes[part], "weights": 4.0 * rest}
            memory[part] = held | {"activations": activations.get(part, float(ENCODER_BYTES))}
        advice = {"transformer": "export a smaller picture with --set export.size_px=N, or run it where more memory is free"}
        forwards = 2 * self.device_sampler.num_steps
        return Plan(memory, disk, forwards, {"fp32": forwards * one.multiply_adds}, advice)

    def _code_bytes(self, part: str) -> float:
        codes = self.source.path / "quantized" / f"{part}.safetensors"
        return float(codes.stat().st_size) if codes.exists() else 0.0

    def _vae_activations(self, footprint: Footprint) -> float:
        """Bytes: the decoder is compared on a part of a large picture, the encoder on a whole one."""
        from flashgen.models.footprint import LIVE_IMAGES

        vae = footprint.decoder if self.recipe.export.vae_encoder else self._described(footprint.decoder)
        most = DECODED * int(vae["factor"])
        size = self.device_sampler.size_px
        pixels = prod(size) if self.recipe.export.vae_encoder else min(size.height, most) * min(size.width, most)
        scores = ATTENTION_BYTES * (pixels / int(vae["factor"]) ** 2) ** 2 if vae["attention"] else 0.0
        return 4.0 * LIVE_IMAGES * int(vae["channels"]) * pixels + scores

    def _described(self, vae: Mapping[str, Any]) -> dict[str, Any]:
        """The entry `vae` of the family's description with the sizes of what decodes."""
        return described(vae, self.source.path / TINY_DECODER) if self.is_tiny else dict(vae)

    def _with_tiny(self, part: Component, vae: Mapping[str, Any]) -> Component:
        from flashgen.models.tiny_decoder import load_tiny_decoder, tiny_component

        channels = self.family.latent_shape(configs_in(self.source.path, self.family), self.device_sampler.size_px)[0]
        return tiny_component(part, load_tiny_decoder(self.source.path / TINY_DECODER, channels, int(vae["factor"])), vae)

    def make(self, draft: Draft) -> Result:
        if self.target == "gguf":
            return write_gguf(self, draft)
        from flashgen.export.codes import put_factors, read_codes
        from flashgen.export.page import write_page
        from flashgen.export.parity import why_no_half
        from flashgen.models.footprint import Footprint
        from flashgen.models.pipeline import load_pipeline

        config, sampler, path = self.recipe.export, self.device_sampler, self.source.path
        page = {"page": write_page(draft.path, self.offline)} if self.target == "web" else {}
        pipe = load_pipeline(path, weights="disk")  # nothing is ever loaded as a whole
        quantized = self.source.manifest.kind == "quantized"
        layers = read_codes(self.source) if quantized else {}
        put_factors(pipe.transformer, layers, path)
        parts = list(self.family.export_components(pipe, sampler, config.vae_encoder))
        vae = self._described(Footprint(self.source).decoder)
        if self.is_tiny:
            parts = [self._with_tiny(part, vae) if part.name == "vae_decoder" else part for part in parts]
        psnr, loudest, overflows = {}, {}, False
        for part in track(parts, "export", total=len(parts)):
            encoder = quantized and part.name in self.family.text_encoders
            codes = layers if part.name == "transformer" else read_codes(self.source, part.name) if encoder else {}
            overflow = any(q.overflows for q in codes.values())
            psnr[part.name], loudest[part.name] = self._write(part, codes, draft.path, overflow)
            overflows |= overflow
            gc.collect()
        pad_ids = write_runtime_files(pipe, {part.name for part in parts}, draft)
        graph = self.family.description(pipe.configs, sampler, pad_ids) | {"vae": vae}
        sizes = {part.name: sum(file.stat().st_size for file in (draft.path / part.name).glob("model.onnx*")) for part in parts}
        metrics = {"psnr_db": {name: round(value, 2) for name, value in psnr.items()}, "bytes": sizes, "quantized_layers": len(layers)}
        extra = {
            "engine": ENGINE,
            "graph": graph,
            "latent_shape": graph["latent_shape"],  # for users of optimum, who make the noise themselves
            "accuracy_level": self._level(layers),
            "overflows": overflows,
            "fp16": "transformer and VAE compute in fp16" if config.precision == "float16" else why_no_half(loudest),
            **({"decoder": "tiny"} if self.is_tiny else {}),
        }
        if self.target == "web":
            say(f"to look at it: python3 -m http.server -d {draft.out}/latest   and open http://localhost:8000")
        return Result(sampler, metrics, extra | page, validate=False)

    def _write(
        self, part: Component, codes: Mapping[str, QuantizedLinear], folder: Path, overflows: bool
    ) -> tuple[float, tuple[str, float]]:
        """Write one component and its config; `overflows` says whether any of its `codes` can.

        Returns its worst PSNR in dB, and the layer with the largest output with that number.
        """
        from flashgen.export.parity import check, reference, require_half_range
        from flashgen.export.write import write_graph

        config = self.recipe.export
        expected = reference(part)  # before the weights leave the module, and before anything is cropped or fused
        half = config.precision == "float16" and part.name not in self.family.text_encoders
        if half:
            require_half_range(part.name, expected)
        if part.name == "transformer":
            shape = self.family.latent_shape(configs_in(self.source.path, self.family), self.device_sampler.size_px)
            self.family.prepare_export(part.module.net, shape)
        folders = {"vae_encoder": "vae", "vae_decoder": TINY_DECODER if self.is_tiny else "vae"}
        source = self.source.path / folders.get(part.name, part.name)
        modulation = self.family.modulation if part.name == "transformer" else None
        model = write_graph(part, codes, folder, config.accuracy_level, modulation, source, half)
        _write_config(part, folder)
        floor = config.psnr_floor_int8_db if half or (codes and self._level(codes) == 4) else config.psnr_floor_db
        return check(part, expected, model, floor, overflows), expected.loudest

    def _level(self, codes: Mapping[str, QuantizedLinear]) -> int:
        """Accuracy level of products with `codes`: 4 where any multiplies integers, because that rounds activations too."""
        return 4 if any(q.channel for q in codes.values()) else self.recipe.export.accuracy_level


def _write_config(part: Component, folder: Path) -> None:
    """Write the network's config beside its graph, as optimum wants it."""
    from flashgen.models.save import without_origin

    config: Any = part.module.net.config
    plain = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else dict(config)
    (folder / part.name / "config.json").write_text(json.dumps(without_origin(plain), indent=1, sort_keys=True))


def write_runtime_files(pipe: Pipeline, exported: Collection[str], draft: Draft) -> dict[str, int]:
    """Write scheduler, model_index.json and the tokenizers of the `exported` text encoders; returns the padding token by tokenizer."""
    index, folder = read_json(pipe.folder / "model_index.json"), draft.path
    pad_ids = {}
    for encoder, (name, _) in pipe.family.text_encoders.items():
        if encoder not in exported:
            index |= {encoder: [None, None], name: [None, None]}
            continue
        tokenizer = pipe[name]
        tokenizer.save_pretrained(folder / name)
        _for_transformers_4(tokenizer, index, folder / name / "tokenizer_config.json")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.save(str(folder / name / "tokenizer.json"))
        pad_ids[name] = int(tokenizer.pad_token_id)
    if (pipe.folder / "scheduler").is_dir():
        draft.link_tree(pipe.folder / "scheduler", "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return pad_ids


def _for_transformers_4(tokenizer: Any, index: dict[str, Any], config: Path) -> None:
    """Name the fast class in model_index.json and drop an empty list of extra tokens.

    optimum needs transformers below 5, where the plain classes want vocab.json, and [] is no set of extra tokens.
    """
    index[config.parent.name] = ["transformers", type(tokenizer).__name__.removesuffix("Fast") + "Fast"]
    settings = json.loads(config.read_text())
    if not settings.get("extra_special_tokens"):
        settings.pop("extra_special_tokens", None)
    config.write_text(json.dumps(settings, indent=1, sort_keys=True))
