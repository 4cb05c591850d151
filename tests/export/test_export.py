from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from flashgen.artifact.store import Artifact
from flashgen.device.engine import open_session
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.export.components import Call, Component, trace
from flashgen.export.parity import largest_output, psnr_db, why_no_half
from flashgen.export.rewrite import linears, quantize_linears
from flashgen.export.write import read_codes, write_component
from flashgen.models.sample import load_pipeline
from flashgen.quant.pack import QuantizedLinear, dequantize
from flashgen.quant.rounding import quantize_groups
from flashgen.recipe.schema import Recipe
from flashgen.stages import export

PARTS = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder"]


def load(artifact: Artifact, part: str) -> ir.Model:
    return ir.load(artifact.path / part / "model.onnx")


def weight_bytes(artifact: Artifact) -> int:
    return sum(int(v.const_value.nbytes) for v in load(artifact, "transformer").graph.initializers.values() if v.const_value is not None)


def test_components_have_the_names_that_optimum_expects(tiny_device: Artifact) -> None:
    found = {}
    for part in PARTS:
        session = ort.InferenceSession(str(tiny_device.path / part / "model.onnx"), providers=["CPUExecutionProvider"])
        found[part] = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
        assert all(isinstance(i.shape[0], str) for i in session.get_inputs()), f"{part}: the batch is not dynamic"
        assert (tiny_device.path / part / "config.json").exists()
    clip = (["input_ids"], ["text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1"])
    inputs = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert found == {
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": (["input_ids"], ["last_hidden_state"]),
        "transformer": (inputs, ["out_hidden_states"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
    }


def test_every_component_reaches_its_floor_and_says_so(tiny_device: Artifact, tiny_int4_device: Artifact) -> None:
    for artifact in (tiny_device, tiny_int4_device):
        psnr = artifact.manifest.metrics["psnr_db"]
        assert sorted(psnr) == PARTS
        assert min(psnr.values()) >= 60, psnr
        assert artifact.manifest.extra["fp16"].startswith("no fp16 graph: the engines here compute on the CPU")


def test_position_table_is_cropped_to_the_pictures_size(tiny_device: Artifact) -> None:
    shapes = [tuple(v.shape) for v in load(tiny_device, "transformer").graph.initializers.values() if v.shape is not None]
    assert (1, 4 * 4, 32) in shapes
    assert not {(1, 16 * 16, 32), (1, 16, 16, 32)} & set(shapes)


def test_decoder_decodes_any_height_and_width(tiny_student: Artifact, tiny_device: Artifact) -> None:
    vae = load_pipeline(tiny_student.path).vae
    session = open_session(tiny_device.path / "vae_decoder" / "model.onnx")
    for height, width in ((8, 8), (5, 6), (12, 3)):
        z = torch.randn(3, 16, height, width)
        with torch.no_grad():
            want = vae.decode(z, return_dict=False)[0].numpy()
        assert psnr_db(want, np.asarray(session.run(["sample"], {"latent_sample": z.numpy()})[0])) > 100


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


def test_zeroed_encoder_is_left_out(tiny_student: Artifact, tmp_path: Path, recipe: Recipe) -> None:
    from tests.conftest import make_pipeline_artifact, tiny_sampler

    slim = make_pipeline_artifact(tmp_path / "slim", kind="student", sampler=tiny_sampler(encoder="prune", t5_tokens=0))
    device = export.run(str(slim.path), tmp_path / "device", recipe, 0, False)
    assert not (device.path / "text_encoder_3").exists() and not (device.path / "tokenizer_3").exists()
    assert json.loads((device.path / "model_index.json").read_text())["text_encoder_3"] == [None, None]


def test_tokenizers_load_in_transformers_4_which_optimum_needs(tiny_device: Artifact) -> None:
    index = json.loads((tiny_device.path / "model_index.json").read_text())
    for name, fast in {"tokenizer": "CLIPTokenizerFast", "tokenizer_2": "CLIPTokenizerFast", "tokenizer_3": "T5TokenizerFast"}.items():
        assert index[name] == ["transformers", fast]
        assert "extra_special_tokens" not in json.loads((tiny_device.path / name / "tokenizer_config.json").read_text())


def test_second_run_is_up_to_date(tiny_student: Artifact, tiny_device: Artifact, recipe: Recipe) -> None:
    again = export.run(str(tiny_student.path), tiny_device.path.parent, recipe, 0, False)
    assert again.path == tiny_device.path


def test_nothing_is_published_below_the_floor(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    strict = recipe.model_copy(update={"export": recipe.export.model_copy(update={"psnr_floor_db": 190.0})})
    with pytest.raises(NumericsError, match=r"text_encoder: output .* floor is 190 dB.*--set export.psnr_floor_db"):
        export.run(str(tiny_student.path), tmp_path / "device", strict, 0, False)
    assert not (tmp_path / "device" / "latest").exists()


def test_offline_is_a_usage_error_where_nothing_is_downloaded(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--offline has no effect on --target onnx"):
        export.run(str(tiny_student.path), tmp_path / "device", recipe, 0, False, offline=True)


def test_device_artifact_is_no_input(tiny_device: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a device"):
        export.run(str(tiny_device.path), tmp_path / "device", recipe, 0, False)


def test_psnr_is_range_over_rms_error() -> None:
    reference = np.array([0.0, 10.0], np.float32)
    assert psnr_db(reference, reference + np.float32(0.01)) == pytest.approx(60, abs=0.01)
    assert psnr_db(reference, reference) == 200
    assert np.isnan(psnr_db(reference, np.array([np.nan, 0], np.float32)))


def test_the_layer_that_leaves_fp16_is_named() -> None:
    loud = nn.Linear(2, 2)
    loud.weight.data.fill_(1e6)
    network = nn.Sequential(nn.Linear(2, 2), loud)
    with largest_output(network) as found, torch.no_grad():
        network(torch.ones(1, 2))
        network(torch.full((1, 2), torch.nan))
    assert found == {"0": np.inf, "1": np.inf}  # what is no number counts as too large, and stays
    with largest_output(network) as found, torch.no_grad():
        network(torch.ones(1, 2))
    assert found["0"] < 10 and found["1"] > 65504
    network(torch.full((1, 2), 1e9))
    assert found["1"] < 1e9, "outside nobody looks"
    assert why_no_half({"vae_decoder": ("a", 7.0), "transformer": ("1", found["1"])}).startswith("no fp16 graph: transformer's 1 puts out")
    assert "its range would do: vae_decoder's a puts out 7 on" in why_no_half({"vae_decoder": ("a", 7.0), "transformer": ("1", 2.0)})


class Block(nn.Module):
    """Both shapes in which a Linear leaves the exporter: Gemm (2-D input) and MatMul (3-D), with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.up, self.down = nn.Linear(40, 24), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        out: torch.Tensor = self.down(h * torch.relu(self.modulation(h[:, 0]))[:, None, :1])
        return out


def block_component() -> tuple[Component, dict[str, QuantizedLinear]]:
    torch.manual_seed(0)
    block, layers = Block(), {}
    for name, module in block.named_children():
        assert isinstance(module, nn.Linear)
        q = quantize_groups(module.weight, 8 if name == "up" else 4, 16, name != "down")
        module.weight.data = dequantize(q)
        layers[name] = q
    return Component("block", Call(block, lambda net, x: net(x)), {"x": torch.randn(3, 5, 24)}, ("y",)), layers


@pytest.mark.parametrize("accuracy_level", [0, 1])
def test_rewritten_linears_compute_what_the_dequantized_ones_do(tmp_path: Path, accuracy_level: int) -> None:
    component, layers = block_component()
    assert write_component(component, layers, tmp_path, accuracy_level, 100)[0] > 100
    nodes = [n.op_type for n in ir.load(tmp_path / "block" / "model.onnx").graph]
    assert nodes.count("MatMulNBits") == 3
    assert "Gemm" not in nodes and "MatMul" not in nodes


def test_export_fails_when_a_quantized_layer_is_not_in_the_graph() -> None:
    component, layers = block_component()
    model = trace(component)
    assert "net.modulation" in linears(model.graph)
    with pytest.raises(ArtifactError, match=r"does not have: \['elsewhere'\]"):
        quantize_linears(model, {**layers, "elsewhere": layers["down"]}, 0)


def test_export_fails_when_codes_have_another_shape() -> None:
    component, layers = block_component()
    with pytest.raises(ArtifactError, match="modulation"):
        quantize_linears(trace(component), {"modulation": layers["up"]}, 0)


def test_export_fails_when_an_adaln_layer_would_stay_in_fp32() -> None:
    net = nn.Module()
    net.transformer_blocks = nn.ModuleList([nn.Module()])
    net.transformer_blocks[0].norm1 = nn.Module()
    net.transformer_blocks[0].norm1.linear = nn.Linear(32, 16)
    call = Call(net, lambda n, x: n.transformer_blocks[0].norm1.linear(x))
    model = trace(Component("net", call, {"x": torch.randn(3, 32)}, ("y",)))
    with pytest.raises(ArtifactError, match=r"adaLN layers left in fp32: \['transformer_blocks.0.norm1.linear'\]"):
        quantize_linears(model, {}, 0)


def test_broken_codes_are_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "layers.json").write_text('{"a": {"bits": 4}}')
    with pytest.raises(ArtifactError, match="flashgen quantize"):
        read_codes(tmp_path)
