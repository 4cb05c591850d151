from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from flashgen import families
from flashgen.artifact.store import Artifact
from flashgen.device.engine import open_session
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.export.parity import psnr_db
from flashgen.families.configs import configs_in
from flashgen.models.pipeline import load_pipeline
from flashgen.pixels import Size
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import prepare, run
from flashgen.stages.describe import describe
from flashgen.stages.export import Export

PARTS = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder"]


def load(artifact: Artifact, part: str) -> ir.Model:
    return ir.load(artifact.path / part / "model.onnx")


def weight_bytes(artifact: Artifact) -> int:
    return sum(int(v.const_value.nbytes) for v in load(artifact, "transformer").graph.initializers.values() if v.const_value is not None)


def with_export(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"export": type(recipe.export).model_validate(recipe.export.model_dump() | changes)})


def test_components_have_the_names_that_optimum_expects(tiny_device: Artifact) -> None:
    names = {}
    for part in PARTS:
        session = ort.InferenceSession(str(tiny_device.path / part / "model.onnx"), providers=["CPUExecutionProvider"])
        names[part] = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
        assert all(isinstance(i.shape[0], str) for i in session.get_inputs()), f"{part}: the batch is not dynamic"
        assert (tiny_device.path / part / "config.json").exists()
    clip = (["input_ids"], ["text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1"])
    inputs = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert names == {
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": (["input_ids"], ["last_hidden_state"]),
        "transformer": (inputs, ["out_hidden_states"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
    }


def test_every_component_reaches_its_floor_and_the_manifest_has_the_numbers(tiny_device: Artifact, tiny_int4_device: Artifact) -> None:
    for artifact in (tiny_device, tiny_int4_device):
        psnr = artifact.manifest.metrics["psnr_db"]
        assert sorted(psnr) == PARTS
        assert min(psnr.values()) >= 60, psnr
        assert artifact.manifest.extra["fp16"].startswith("no fp16 graph: the engines here compute on the CPU")


def test_page_of_engines_lists_every_operator_of_exported_graphs(tiny_device: Artifact, tiny_int4_device: Artifact) -> None:
    lines = Path("docs/engines.md").read_text().splitlines()
    rows = {line.split("`")[1]: line.count("| yes ") + line.count("| no ") for line in lines if line.startswith("| `")}
    parts = [load(artifact, part) for artifact in (tiny_device, tiny_int4_device) for part in ("transformer", "vae_decoder")]
    used = {node.op_type for model in parts for node in model.graph} | {"DynamicQuantizeMatMul", "QuantizeLinear", "DequantizeLinear"}
    assert {rows.get(name) for name in used} == {4}, used - rows.keys()


def test_manifest_describes_the_graph_as_the_family_does(tiny_student: Artifact, tiny_device: Artifact) -> None:
    sd3, sampler, extra = families.get("sd3"), tiny_device.manifest.sampler, tiny_device.manifest.extra
    assert sampler == tiny_student.manifest.sampler and sampler is not None
    pad_ids = {f"tokenizer{n}": load_pipeline(tiny_student.path)[f"tokenizer{n}"].pad_token_id for n in ("", "_2", "_3")}
    assert extra["graph"] == json.loads(json.dumps(sd3.description(configs_in(tiny_student.path, sd3), sampler, pad_ids)))
    assert extra["latent_shape"] == [16, 8, 8] and (extra["engine"], extra["accuracy_level"]) == ("onnxruntime", 0)


def test_half_precision_draws_the_picture_of_fp32(
    tiny_quantized: Artifact, tiny_int4_device: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    half = run(Export, {"student": tiny_quantized.path}, tmp_path / "half", with_export(recipe, precision="float16"))
    assert half.manifest.extra["fp16"] == "transformer and VAE compute in fp16"
    psnr = half.manifest.metrics["psnr_db"]
    assert min(psnr["transformer"], psnr["vae_decoder"]) > 45  # onnxruntime keeps fp32 between operators without fp16 on the processor
    for part in ("transformer", "vae_decoder"):
        model = load(half, part)
        assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
        products = [node for node in model.graph if node.op_type in ("MatMulNBits", "MatMul", "Conv", "MultiHeadAttention")]
        assert products and {node.outputs[0].dtype for node in products} == {ir.DataType.FLOAT16}
    one, other = (DevicePipeline(artifact).sample(["two red circles"], [3]).astype(np.float32) for artifact in (half, tiny_int4_device))
    assert psnr_db(other, one) > 35


def test_half_precision_is_refused_for_the_web_and_for_products_of_integers(tiny_quantized: Artifact, recipe: Recipe) -> None:
    half = with_export(recipe, precision="float16")
    with pytest.raises(UsageError, match=r"export.precision=float16 is for engines on GPUs, not for --target web"):
        prepare(Export, {"student": tiny_quantized.path}, half, target="web")
    stage = prepare(Export, {"student": tiny_quantized.path}, half)
    assert isinstance(stage, Export)
    stage.source.manifest.recipe["group"] = "channel"
    with pytest.raises(UsageError, match=r"has codes of quantize.group=channel, whose products take fp32"):
        stage.check()


def test_position_table_is_cropped_to_the_pictures_size(tiny_device: Artifact) -> None:
    shapes = [tuple(v.shape) for v in load(tiny_device, "transformer").graph.initializers.values() if v.shape is not None]
    assert (1, 4 * 4, 32) in shapes
    assert not {(1, 16 * 16, 32), (1, 16, 16, 32)} & set(shapes)


def test_wide_pictures_are_exported_at_the_recipes_size(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = run(Export, {"student": tiny_student.path}, tmp_path / "device", with_export(recipe, size_px="96x64", vae_encoder=True))
    assert "trained at 64 px; at 96x64 px expect worse pictures" in capsys.readouterr().err
    sampler, shapes = device.manifest.sampler, {}
    assert sampler is not None and sampler.size_px == Size(height=64, width=96)
    assert device.manifest.extra["graph"]["latent_shape"] == device.manifest.extra["latent_shape"] == [16, 8, 12]
    assert min(device.manifest.metrics["psnr_db"].values()) >= 60
    for part, name in (("transformer", "hidden_states"), ("vae_encoder", "sample")):
        shapes[part] = next(list(v.shape)[1:] for v in load(device, part).graph.inputs if v.name == name and v.shape is not None)
    assert shapes == {"transformer": [16, 8, 12], "vae_encoder": [3, 64, 96]}
    again = run(Export, {"student": tiny_student.path}, tmp_path / "device", with_export(recipe, size_px="96x64", vae_encoder=True))
    assert again.path == device.path


@pytest.mark.parametrize("size", ["72", "64x72", "8", "528x64"])
def test_size_that_the_networks_cannot_draw_is_refused(tiny_student: Artifact, recipe: Recipe, size: str) -> None:
    wanted = with_export(recipe, size_px=size)
    with pytest.raises(UsageError, match=rf"export\.size_px={size}: .*multiples of 16 px up to 512; .*export\.size_px=64 works"):
        prepare(Export, {"student": tiny_student.path}, wanted)
    prepare(Export, {"student": tiny_student.path}, recipe)


def test_decoder_decodes_any_height_and_width(tiny_student: Artifact, tiny_device: Artifact) -> None:
    vae = load_pipeline(tiny_student.path).vae
    session = open_session(tiny_device.path / "vae_decoder" / "model.onnx")
    for height, width in ((8, 8), (5, 6), (12, 3)):
        z = torch.randn(3, 16, height, width)
        with torch.no_grad():
            expected = vae.decode(z, return_dict=False)[0].numpy()
        assert psnr_db(expected, np.asarray(session.run(["sample"], {"latent_sample": z.numpy()})[0])) > 100


def test_every_linear_of_a_quantized_transformer_is_one_matmul_nbits_with_bias(
    tiny_quantized: Artifact, tiny_int4_device: Artifact, tiny_device: Artifact
) -> None:
    layers = json.loads((tiny_quantized.path / "quantized" / "layers.json").read_text())
    nodes = list(load(tiny_int4_device, "transformer").graph)
    quantized = [n for n in nodes if n.op_type == "MatMulNBits"]
    assert sorted(str(n.name) for n in quantized) == sorted(layers)
    assert {str(n.name): n.attributes.get_int("bits") for n in quantized} == {name: spec["bits"] for name, spec in layers.items()}
    assert all(len(n.inputs) == 6 and n.inputs[5] is not None for n in quantized)
    assert not [n for n in nodes if n.op_type == "Gemm"]
    assert tiny_int4_device.manifest.metrics["quantized_layers"] == len(layers)
    weights, unquantized = weight_bytes(tiny_int4_device), weight_bytes(tiny_device)
    assert weights < 0.5 * unquantized, (weights, unquantized)


def test_pruned_encoder_is_left_out(tmp_path: Path, recipe: Recipe) -> None:
    from tests.conftest import make_pipeline_artifact, tiny_sampler

    sampler = tiny_sampler(encoder="prune", tokens={"clip": 16, "t5": 0})
    slim = make_pipeline_artifact(tmp_path / "slim", kind="student", sampler=sampler)
    device = run(Export, {"student": slim.path}, tmp_path / "device", recipe)
    assert not (device.path / "text_encoder_3").exists() and not (device.path / "tokenizer_3").exists()
    index = json.loads((device.path / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert [encoder["component"] for encoder in device.manifest.extra["graph"]["encoders"]] == ["text_encoder", "text_encoder_2"]


def test_tokenizers_load_in_transformers_4_which_optimum_needs(tiny_device: Artifact) -> None:
    index = json.loads((tiny_device.path / "model_index.json").read_text())
    for name, fast in {"tokenizer": "CLIPTokenizerFast", "tokenizer_2": "CLIPTokenizerFast", "tokenizer_3": "T5TokenizerFast"}.items():
        assert index[name] == ["transformers", fast]
        assert "extra_special_tokens" not in json.loads((tiny_device.path / name / "tokenizer_config.json").read_text())
    assert (tiny_device.path / "scheduler" / "scheduler_config.json").is_file()


def test_second_run_is_up_to_date(tiny_student: Artifact, tiny_device: Artifact, recipe: Recipe) -> None:
    assert run(Export, {"student": tiny_student.path}, tiny_device.path.parent, recipe).path == tiny_device.path


def test_nothing_is_published_below_the_floor(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    strict = with_export(recipe, psnr_floor_db=190.0)
    with pytest.raises(NumericsError, match=r"text_encoder: output .* floor is 190 dB.*--set export.psnr_floor_db"):
        run(Export, {"student": tiny_student.path}, tmp_path / "device", strict)
    assert not (tmp_path / "device" / "latest").exists()


def test_offline_is_a_usage_error_where_nothing_is_downloaded(tiny_student: Artifact, recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="--offline has no effect on --target onnx"):
        prepare(Export, {"student": tiny_student.path}, recipe, offline=True)


def test_device_artifact_is_no_input(tiny_device: Artifact, recipe: Recipe) -> None:
    with pytest.raises(ArtifactError, match="is a device"):
        prepare(Export, {"student": tiny_device.path}, recipe)


def test_plan_counts_what_the_export_writes_and_runs(tiny_quantized: Artifact, tiny_int4_device: Artifact, recipe: Recipe) -> None:
    plan = describe(prepare(Export, {"student": tiny_quantized.path}, recipe), Path("out"))
    assert sorted(plan["memory"]) == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    sampler = tiny_quantized.manifest.sampler
    assert sampler is not None and plan["forwards"] == 2 * sampler.num_steps
    transformer, codes = plan["memory"]["transformer"], tiny_quantized.path / "quantized" / "transformer.safetensors"
    assert transformer["codes"] == codes.stat().st_size
    weights = load_pipeline(tiny_quantized.path).transformer
    linear = sum(layer.weight.numel() for layer in weights.modules() if isinstance(layer, nn.Linear))
    assert transformer["weights"] == 4 * (sum(p.numel() for p in weights.parameters()) - linear)  # without the position table
    wide = with_export(recipe, size_px=256)
    larger = describe(prepare(Export, {"student": tiny_quantized.path}, wide), Path("out"))
    tokens = [pictures + 32 for pictures in (4 * 4, 16 * 16)]
    assert larger["memory"]["transformer"]["activations"] / transformer["activations"] == pytest.approx(tokens[1] / tokens[0], rel=1e-6)


def test_nf4_codes_are_refused(tiny_quantized: Artifact, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = prepare(Export, {"student": tiny_quantized.path}, recipe)
    nf4 = tiny_quantized.manifest.model_copy(update={"recipe": {"scheme": "nf4"}})
    stage.inputs["student"] = replace(tiny_quantized, manifest=nf4)
    with pytest.raises(ArtifactError, match="has NF4 codes, for diffusers"):
        stage.check()
