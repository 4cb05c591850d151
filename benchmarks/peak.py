"""Operations per second that this machine reaches in the matrix products of one step of SD3.5-Medium, by engine and number type.

    python -m benchmarks.peak        # one JSON object; a minute on a machine that runs nothing else

`benchmarks.device` takes the largest number as the peak of which a step reaches a share, so that no share is above 1.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from flashgen.runtime.processor import this_processor

THREADS = 2
ROWS = 1357  # image and text tokens of a step at 512 px
SHAPES = ((1536, 1536), (1536, 6144), (6144, 1536))  # (inputs, outputs) of attention and feed-forward layers
CALLS, LONGEST_S = 8, 3.0  # calls of a product after the first; seconds after which no further call starts

Product = Callable[[], object]


def best_ops(product: Product, k: int, n: int) -> float:
    """Operations per second of the fastest call."""
    laps, until = [], time.perf_counter() + LONGEST_S
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        product()
        laps.append(time.perf_counter() - start)
        if start + laps[-1] > until:
            break
    return 2 * ROWS * k * n / min(laps)


def torch_products(k: int, n: int) -> Iterator[tuple[str, Product]]:
    """Products in oneDNN through torch: fp32, and, where the processor has instructions for them, bf16 and int8 with sums in int32."""
    features = {*this_processor().features}
    x, w = torch.randn(ROWS, k), torch.randn(k, n)
    yield "torch fp32", lambda: x @ w
    if this_processor().has_bf16:  # else one product takes half a minute
        half_x, half_w = x.bfloat16(), w.bfloat16()
        yield "torch bf16", lambda: half_x @ half_w
    if features & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        int_x, int_w = (torch.randint(-64, 64, value.shape, dtype=torch.int8) for value in (x, w))
        yield "torch int8", lambda: torch._int_mm(int_x, int_w)


def graph(k: int, n: int, form: str) -> ir.Model:
    """x [ROWS, k] times a constant [k, n] as `float`, `dynamic` (DynamicQuantizeMatMul) or `static` (QuantizeLinear, DequantizeLinear)."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([ROWS, k]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = random.standard_normal((k, n), np.float32) if form == "float" else random.integers(-64, 64, (k, n), np.int8)
    arrays: dict[str, Any] = {"w": weight, "s": np.full(n, 0.01, np.float32), "z": np.zeros(n, np.int8)}
    arrays |= {"xs": np.float32(0.03), "xz": np.uint8(128)}
    w, s, z, xs, xz = values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    if form == "float":
        nodes, values = [ir.node("MatMul", [x, w])], [w]
    elif form == "dynamic":
        nodes, values = [ir.node("DynamicQuantizeMatMul", [x, w, s, z], domain="com.microsoft")], [w, s, z]
    else:
        rounded = ir.node("QuantizeLinear", [x, xs, xz])
        inputs = ir.node("DequantizeLinear", [rounded.outputs[0], xs, xz])
        weights = ir.node("DequantizeLinear", [w, s, z], {"axis": 1})
        nodes = [rounded, inputs, weights, ir.node("MatMul", [inputs.outputs[0], weights.outputs[0]])]
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    body = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=values, opset_imports={"": 20, "com.microsoft": 1}, name="product")
    return ir.Model(body, ir_version=10)


def graph_products(k: int, n: int, folder: Path) -> Iterator[tuple[str, Product]]:
    """Products in onnxruntime, and in OpenVINO where it is installed."""
    from importlib.util import find_spec

    from flashgen.device.engine import Opening, open_session

    feed = {"x": np.random.default_rng(1).standard_normal((ROWS, k)).astype(np.float32)}
    files = {}
    for form in ("float", "dynamic", "static"):
        files[form] = folder / f"{form}-{k}-{n}.onnx"
        ir.save(graph(k, n, form), files[form])
        session = open_session(files[form], Opening(THREADS))
        yield f"onnxruntime {form}", lambda session=session: session.run(None, feed)  # type: ignore[misc]  # bound now
    if find_spec("openvino"):
        import openvino as ov

        for form, hint in (("float", "f32"), ("float", "bf16"), ("static", "f32"), ("static", "bf16")):
            hints = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": hint}
            model = ov.Core().compile_model(str(files[form]), "CPU", hints)
            yield f"openvino {form} {hint}", lambda model=model: model(feed)  # type: ignore[misc]  # bound now


def measure() -> dict[str, dict[str, float]]:
    """Operations per second by shape and by engine with its number type."""
    torch.set_num_threads(THREADS)
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for k, n in SHAPES:
            products = (*torch_products(k, n), *graph_products(k, n, Path(folder)))
            rates[f"{ROWS} x {k} x {n}"] = {name: best_ops(product, k, n) for name, product in products}
    return rates


if __name__ == "__main__":
    print(json.dumps(measure()))
