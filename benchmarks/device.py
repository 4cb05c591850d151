"""Times one step of a transformer in the shapes of SD3.5-Medium on every engine: flashgen's exports and other projects' ways to run it.

    python -m benchmarks.device artifacts/device-bench      # `make bench-device`

Four blocks of the real width, two of them with dual attention, random weights, 512 px, one picture, two threads. Every row runs in its own
process; the rows of a round run one after another, so that a slow minute of the machine affects all of them. Times are medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import peak
from benchmarks.device_page import page
from benchmarks.fullsize import page_of
from flashgen.progress import say
from flashgen.runtime.processor import this_processor

THREADS, ROUNDS, TOKENS, BLOCKS, CALLS = 2, 5, (77, 333), 4, 2
SIZE_PX, CURVE_PX, ENGINES = 512, (256, 512, 768, 1024), ("onnxruntime", "openvino")
CALIBRATION_SEEDS = (1, 2, 3, 4)  # of the inputs on which static activations are calibrated; errors are of seed 0
Feeds = dict[str, NDArray[np.float32]]
Step = Callable[[Feeds], NDArray[np.float32]]
# name: (peer or flashgen, engine, profile, file)
ROWS: dict[str, tuple[str, str, str, str]] = {
    "diffusers, torch fp32": ("peer", "torch", "fp32", "net"),
    "diffusers, torch bf16": ("peer", "torch", "bf16", "net"),
    "diffusers, torch.compile fp32": ("peer", "torch", "compile", "net"),
    "ONNX Runtime fp32": ("peer", "onnxruntime", "fp32", "stock/transformer/model.onnx"),
    "ONNX Runtime, MatMulNBits int4 g128": ("peer", "onnxruntime", "int4", "nbits.onnx"),
    "ONNX Runtime, quantize_dynamic int8": ("peer", "onnxruntime", "int8", "dynamic.onnx"),
    "ONNX Runtime, quantize_dynamic int8, default options": ("peer", "onnxruntime", "default", "dynamic.onnx"),
    "OpenVINO fp32": ("peer", "openvino", "f32", "stock/transformer/model.onnx"),
    "OpenVINO bf16": ("peer", "openvino", "bf16", "stock/transformer/model.onnx"),
    "OpenVINO, NNCF int8": ("peer", "openvino", "bf16", "nncf8.xml"),
    "OpenVINO, NNCF int4 g128": ("peer", "openvino", "bf16", "nncf4.xml"),
    "OpenVINO, NNCF int4 g128, f32 instead of bf16": ("peer", "openvino", "f32", "nncf4.xml"),
    "OpenVINO, NNCF static int8": ("peer", "openvino", "bf16", "nncf-static.xml"),
    "flashgen size, onnxruntime": ("flashgen", "onnxruntime", "size", "size/transformer/model.onnx"),
    "flashgen size int8 activations, onnxruntime": ("flashgen", "onnxruntime", "size4", "size4/transformer/model.onnx"),
    "flashgen speed, onnxruntime": ("flashgen", "onnxruntime", "speed", "speed/transformer/model.onnx"),
    "flashgen static, onnxruntime": ("flashgen", "onnxruntime", "static", "static/transformer/model.onnx"),
    "flashgen size, openvino": ("flashgen", "openvino", "size", "size/transformer/model.onnx"),
    "flashgen size int8 activations, openvino": ("flashgen", "openvino", "size4", "size4/transformer/model.onnx"),
    "flashgen size int8 activations, openvino:int8 instead of bf16": ("flashgen", "openvino:int8", "size4", "size4/transformer/model.onnx"),
    "flashgen speed, openvino": ("flashgen", "openvino", "speed", "speed/transformer/model.onnx"),
    "flashgen speed, openvino:int8 instead of bf16": ("flashgen", "openvino:int8", "speed", "speed/transformer/model.onnx"),
    "flashgen static, openvino": ("flashgen", "openvino", "static", "static/transformer/model.onnx"),
}  # fmt: skip


def network() -> Any:
    """The transformer with seeded random weights."""
    from diffusers import SD3Transformer2DModel

    from flashgen.families.sd3.specs import spec

    config = spec("sd35-medium").transformer | {"num_layers": BLOCKS, "dual_attention_layers": (0, 1)}
    torch.manual_seed(0)
    return SD3Transformer2DModel(**config).eval().requires_grad_(False)


def rows_here() -> dict[str, tuple[str, str, str, str]]:
    """`ROWS`, without those that differ from others by bf16 alone where the processor has none: torch would take minutes for a step."""
    return {name: row for name, row in ROWS.items() if this_processor().has_bf16 or "bf16" not in name}


def feeds(tokens: int, seed: int = 0, size_px: int = SIZE_PX) -> Feeds:
    """Inputs of one step by name, in the order of the transformer's arguments."""
    rng, side = np.random.default_rng(seed), size_px // 8
    shapes = {"hidden_states": (1, 16, side, side), "encoder_hidden_states": (1, tokens, 4096), "pooled_projections": (1, 2048)}
    return {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()} | {"timestep": np.full(1, 750, np.float32)}


def prepare(work: Path) -> None:
    """Write the models of `ROWS` that `work` lacks."""
    from flashgen import families
    from flashgen.export.write import write_graph
    from flashgen.families.graphs import Call, Component
    from flashgen.models.networks import linears_of
    from flashgen.quant.layer import Rounding, layer_bits, quantize_layer
    from flashgen.training.calibration import input_scales, static_candidates

    def once(name: str, make: Callable[[], object]) -> None:
        if not (work / f"{name}.done").exists():
            say(f"making {name}")
            make()
            (work / f"{name}.done").touch()

    def component(size_px: int = SIZE_PX) -> Component:
        inputs = {name: torch.from_numpy(value) for name, value in feeds(TOKENS[-1], 0, size_px).items()}
        call = Call(network(), lambda net, *args: net(*args, return_dict=False)[0])
        return Component("transformer", call, inputs, ("out_hidden_states",), {"encoder_hidden_states": {1: "tokens"}})

    def export(
        name: str, bits: int, group: int | Literal["channel"], accuracy_level: int = 0, static: bool = False, size_px: int = SIZE_PX
    ) -> None:
        """Asymmetric groups, with the last layer at 8 bits; or, with group "channel", one symmetric scale per row.

        Static activations are in all layers that may have them.
        """
        part, family, rounding = component(size_px), families.get("sd3"), Rounding(group, symmetric=group == "channel")
        linears, scales = linears_of(part.module.net), {}

        def run() -> None:
            for seed in CALIBRATION_SEEDS:
                part.reference({name: torch.from_numpy(value) for name, value in feeds(TOKENS[-1], seed).items()})

        if static:
            candidates = static_candidates(linears, family, family.protect)
            scales = input_scales({layer: linears[layer] for layer in candidates}, run, len(CALIBRATION_SEEDS))
        layers = {
            layer: quantize_layer(linear.weight, layer_bits(layer, bits, ("proj_out",)), rounding, inputs=scales.get(layer))
            for layer, linear in linears.items()
        }
        family.prepare_export(part.module.net, tuple(part.inputs["hidden_states"].shape[1:]))
        write_graph(part, layers, work / name, accuracy_level, family.modulation)

    def reference() -> None:
        net = network()
        net.save_pretrained(work / "net")
        np.save(work / "reference.npy", torch_step(net)(feeds(TOKENS[-1])))

    work.mkdir(parents=True, exist_ok=True)
    once("reference", reference)
    once("stock", lambda: plain_export(component(), work / "stock"))
    once("size", lambda: export("size", 4, 128))
    once("size4", lambda: export("size4", 4, 128, accuracy_level=4))
    for size_px in CURVE_PX:
        once(curve_name(size_px), partial(export, curve_name(size_px), 8, "channel", size_px=size_px))
    once("static", lambda: export("static", 8, "channel", static=True))
    once("nbits", lambda: onnxruntime_nbits(work))
    once("dynamic", lambda: onnxruntime_dynamic(work))
    once("nncf", lambda: nncf_weights(work))
    once("nncf-static", lambda: nncf_static(work))


def plain_export(part: Any, folder: Path) -> None:
    """Export with torch.onnx.export and onnxscript's optimizer; only the crop of the position table is flashgen's."""
    import onnx_ir as ir
    import onnxscript.optimizer

    from flashgen.export.graph import trace
    from flashgen.families.sd3.components import crop_positions

    crop_positions(part.module.net, 64, 64)
    model = trace(part)
    onnxscript.optimizer.optimize_ir(model)
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "transformer" / "model.onnx", external_data="model.onnx_data")


def onnxruntime_nbits(work: Path) -> None:
    """onnxruntime's 4-bit weights, with 8-bit activations."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(work / "stock" / "transformer" / "model.onnx")
    quantizer = MatMulNBitsQuantizer(model, block_size=128, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(work / "nbits.onnx"), True)


def onnxruntime_dynamic(work: Path) -> None:
    """onnxruntime's dynamic 8-bit quantization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        work / "stock" / "transformer" / "model.onnx", work / "dynamic.onnx", op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
        weight_type=QuantType.QInt8, use_external_data_format=True, extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
    )  # fmt: skip


def nncf_weights(work: Path) -> None:
    """NNCF's 8-bit and 4-bit weights."""
    import nncf
    import openvino as ov

    kinds = {"nncf8": {"mode": nncf.CompressWeightsMode.INT8_SYM}, "nncf4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 128}}
    for name, options in kinds.items():
        model = ov.Core().read_model(work / "stock" / "transformer" / "model.onnx")
        ov.save_model(nncf.compress_weights(model, **options), work / f"{name}.xml", compress_to_fp16=False)


def nncf_static(work: Path) -> None:
    """NNCF's full quantization: 8-bit weights, static 8-bit activations, smooth quantization."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(work / "stock" / "transformer" / "model.onnx")
    samples = nncf.Dataset([feeds(TOKENS[-1], seed) for seed in CALIBRATION_SEEDS])
    kind, preset = nncf.ModelType.TRANSFORMER, nncf.QuantizationPreset.MIXED
    quantized = nncf.quantize(model, samples, model_type=kind, preset=preset, subset_size=len(CALIBRATION_SEEDS))
    ov.save_model(quantized, work / "nncf-static.xml", compress_to_fp16=False)


def curve_name(size_px: int) -> str:
    """Name of the model of the speed profile for pictures of this size."""
    return "speed" if size_px == SIZE_PX else f"speed-{size_px}"


def torch_step(net: Any, dtype: torch.dtype = torch.float32) -> Step:
    """A step of a torch network in `dtype`."""

    def step(given: Feeds) -> NDArray[np.float32]:
        x, embeds, pooled, timestep = (torch.from_numpy(value).to(dtype) for value in given.values())
        with torch.no_grad():
            return np.asarray(net(x, embeds, pooled, timestep, return_dict=False)[0].float().numpy())

    return step


def opened(who: str, engine: str, profile: str, path: Path) -> Step:
    """The step of one row of `ROWS`."""
    if engine == "torch":
        from diffusers import SD3Transformer2DModel

        dtype = torch.bfloat16 if profile == "bf16" else torch.float32
        net = SD3Transformer2DModel.from_pretrained(path, torch_dtype=dtype).eval()
        return torch_step(torch.compile(net, dynamic=False) if profile == "compile" else net, dtype)
    from flashgen.device.engine import NETWORKS, Opening, open_session
    from flashgen.device.providers import target_of

    if who == "flashgen":
        target = target_of(engine)
        network = NETWORKS[target.engine](path, Opening(THREADS, target.where, rounded=profile != "size", overflows=False))
        return lambda given: network.run(["out_hidden_states"], given)[0]
    if engine == "openvino":
        import openvino as ov

        hints = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": profile, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
        model = ov.Core().compile_model(path, "CPU", hints)
        return lambda given: np.asarray(model(given)[0])
    session = default_session(path) if profile == "default" else open_session(path, Opening(THREADS))
    return lambda given: np.asarray(session.run(None, given)[0])


def default_session(path: Path) -> Any:
    """A session of onnxruntime with its default options, with which products of 8-bit codes overflow on x86 without VNNI."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(step: Step, given: Feeds) -> tuple[float, NDArray[np.float32]]:
    """(seconds of the best of `CALLS` steps after a warm-up, output)."""
    laps, out = [], step(given)
    for _ in range(CALLS):
        start = time.perf_counter()
        out = step(given)
        laps.append(time.perf_counter() - start)
    return min(laps), out


def measure(work: Path, name: str) -> dict[str, Any]:
    """Measure one row in this process: seconds per step by text tokens (the best of `CALLS` after a warm-up), memory and error."""
    from flashgen.runtime.memory import peak_rss_mib

    torch.set_num_threads(THREADS)
    who, engine, profile, file = ROWS[name]
    step, seconds, out = opened(who, engine, profile, work / file), {}, np.zeros(0, np.float32)
    for tokens in TOKENS:
        seconds[str(tokens)], out = timed(step, feeds(tokens))
    reference = np.load(work / "reference.npy")
    error = float(np.linalg.norm(out - reference) / np.linalg.norm(reference))
    return {"seconds": seconds, "peak_rss_mib": peak_rss_mib(), "error": error}


def curve(work: Path) -> list[dict[str, Any]]:
    """Seconds per step of the speed profile by size and engine, at the most text tokens, measured in this process."""
    rows = []
    for size_px in CURVE_PX:
        given, seconds = feeds(TOKENS[-1], 0, size_px), dict[str, float]()
        for engine in ENGINES:
            step = opened("flashgen", engine, "speed", work / curve_name(size_px) / "transformer" / "model.onnx")
            seconds[engine], _ = timed(step, given)
        rows.append({"size_px": size_px, "operations": operations(TOKENS[-1], size_px), "seconds": seconds})
        say(f"curve: {rows[-1]}")
    return rows


def fastest(rates: dict[str, dict[str, float]]) -> tuple[float, str]:
    """(operations per second, shape and engine) of the fastest product of `peak.measure`."""
    return max((rate, f"{engine}, {shape}") for shape, engines in rates.items() for engine, rate in engines.items())


def operations(tokens: int, size_px: int = SIZE_PX) -> float:
    """Operations in the matrix products of one step, attention included."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = network()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*(torch.empty(value.shape, device="meta") for value in feeds(tokens, 0, size_px).values()), return_dict=False)
    return float(counter.get_total_flops())


def size(path: Path) -> int:
    """Bytes of the model at `path`."""
    files = path.glob("*.safetensors") if path.is_dir() else [p for p in path.parent.glob(f"{path.stem}*") if p.suffix != ".done"]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Write the models, measure all rows in rounds, and write the page after each round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder for the models")
    parser.add_argument("--page", type=Path, default=page_of("device"), help="Markdown file; numbers are written beside it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--row", help="measure this one here and print it as JSON")
    given = parser.parse_args()
    if given.row:
        others: dict[str, Callable[[], object]] = {"peak": peak.measure, "curve": lambda: curve(given.work)}
        print(json.dumps(others[given.row]() if given.row in others else measure(given.work, given.row)))
        return
    prepare(given.work)
    sizes: list[dict[str, Any]] = []
    found: dict[str, list[Any]] = {name: [] for name in (*rows_here(), "peak")}
    for number in range(given.rounds):
        for name, laps in found.items():
            laps.append(in_process(given.work, name))
            say(f"round {number + 1} of {given.rounds}, {name}: {fastest(laps[-1]) if name == 'peak' else laps[-1]['seconds']}")
        sizes = in_process(given.work, "curve") if number == 0 else sizes
        write(found, sizes, given.work, given.page)  # after every round, so that an interrupted run leaves a page


def in_process(work: Path, row: str) -> Any:
    """Return what `--row` prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.device", str(work), "--row", row]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    if done.returncode:
        raise SystemExit(f"{row}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write(found: dict[str, list[Any]], sizes: list[dict[str, Any]], work: Path, target: Path) -> None:
    """Write the page and its numbers from the measurements of each row."""
    (top, best), rows = max(map(fastest, found["peak"])), []
    counts = {tokens: operations(tokens) for tokens in TOKENS}
    for name, (who, engine, profile, file) in rows_here().items():
        laps = found[name]
        for tokens in TOKENS:
            seconds = [lap["seconds"][str(tokens)] for lap in laps]
            middle = float(np.median(seconds))
            rows.append({
                "name": name, "who": who, "engine": engine, "profile": profile, "text_tokens": tokens, "step_s": middle,
                "step_s_all": seconds, "peak_rss_mib": float(np.median([lap["peak_rss_mib"] for lap in laps])),
                "bytes": size(work / file), "error": laps[0]["error"], "share_of_peak": counts[tokens] / top / middle,
            })  # fmt: skip
    target.with_suffix(".json").write_text(
        json.dumps({"peak_ops": top, "peak": best, "peaks": found["peak"], "blocks": BLOCKS, "rows": rows, "curve": sizes}, indent=1) + "\n"
    )
    target.write_text(page(rows, sizes, top, best, target.stem) + "\n")


if __name__ == "__main__":
    main()
