"""Other people's loaders and another processor draw the same pictures: `make test-interchange`, `test-arm64`, `test-mobile`.

python -m benchmarks.interchange loaders artifacts/interchange artifacts/interchange/venv/bin/python
python -m benchmarks.interchange arm64 artifacts/interchange artifacts/arm64
python -m benchmarks.interchange mobile artifacts/interchange
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
from PIL import Image

from benchmarks.bars import in_diffusers, psnr
from benchmarks.scores import Bar, report
from flashgen import worlds
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.device.engine import Array, Engine, Network, OnnxRuntimeNetwork
from flashgen.device.sampler import DevicePipeline

PROMPTS = worlds.get("shapes").prompts(5, 1)
REPOSITORY = Path(__file__).resolve().parents[1]
EXPORTS = {"device-fp32": "fp32", "device": "INT4", "device-int8": "INT4, int8 activations", "slim-device": "INT4 without T5"}
# qemu shows the host's /proc/cpuinfo. onnxruntime looks for ARM cores there and crashes when it finds none. This one is a Cortex-A76.
CPUINFO = """processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 0

"""


def run(command: list[str], **environment: str) -> str:
    """Output of a command; exits with its errors when it fails."""
    done = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr


def drawn(artifact: Path, python: list[str], folder: Path) -> np.ndarray:
    """Pictures of `flashgen generate` on onnxruntime, picture i from seed i."""
    options = ["--engine", "onnxruntime", "-o", str(folder / "a.png")]
    run([*python, "-m", "flashgen", "generate", str(artifact.absolute()), *PROMPTS, *options], PYTHONPATH=str(REPOSITORY))
    return np.stack([np.asarray(Image.open(folder / f"a-{i + 1}.png")) for i in range(len(PROMPTS))])


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Lowest PSNR between pictures of the same place, in dB."""
    return min(psnr(a, b) for a, b in zip(ours, theirs, strict=True))


def loaders(root: Path, peer: str) -> list[Bar]:
    """Bars of optimum, in its own environment, and of diffusers, in this one."""
    bars = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, what in EXPORTS.items():
            file = Path(scratch, f"{name}.npy")
            run(
                [peer, "-m", "benchmarks.in_optimum", str(open_artifact(root / name).path), str(file), *PROMPTS],
                PYTHONPATH=str(REPOSITORY), HF_HUB_OFFLINE="1",
            )  # fmt: skip
            ours = drawn(root / name, [sys.executable], Path(scratch))
            bars.append(Bar(f"optimum, {what}", worst(ours, np.load(file)), ">= 40"))
    no_t5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    bars.append(Bar("diffusers, student", in_diffusers(root / "student", PROMPTS), ">= 40"))
    bars.append(Bar("diffusers, student without T5", in_diffusers(root / "slim", PROMPTS, **no_t5), ">= 40"))
    bars.append(Bar("diffusers, quantized", in_diffusers(root / "int4", PROMPTS), ">= 40"))
    for name, what in {"student": "student", "int4": "quantized"}.items():
        made = open_artifact(root / f"{name}-gguf")
        transformer = SD3Transformer2DModel.from_single_file(
            str(made.path / "transformer" / "model.gguf"), config=str(made.path), subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32), torch_dtype=torch.float32,
        )  # fmt: skip
        metrics = made.manifest.metrics
        print(f"GGUF of the {what}: tensors by type {metrics['types']}, the worst at {metrics['psnr_db']['transformer']} dB")
        bars.append(Bar(f"diffusers, GGUF of the {what}", in_diffusers(root / name, PROMPTS, transformer=transformer), ">= 40"))
    return bars


def arm64(root: Path, machine: str) -> list[Bar]:
    """Bars of the base install under qemu, with the root and the wheels that the Makefile put into `machine`."""
    rootfs = Path(machine, "root").absolute()
    (rootfs / "proc").mkdir(exist_ok=True)
    (rootfs / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(i) for i in range(os.cpu_count() or 1)))
    site = f"PYTHONPATH={REPOSITORY}:{Path(machine, 'site').absolute()}"
    python = ["qemu-aarch64-static", "-cpu", "cortex-a76", "-L", str(rootfs), "-E", site, str(rootfs / "usr/bin/python3")]
    print(run([*python, "-c", "import onnxruntime, platform; print(platform.machine(), 'onnxruntime', onnxruntime.__version__)"]).strip())
    bars = []
    for name, what in EXPORTS.items():
        with tempfile.TemporaryDirectory() as x86, tempfile.TemporaryDirectory() as arm:
            ours, theirs = drawn(root / name, [sys.executable], Path(x86)), drawn(root / name, python, Path(arm))
        bars.append(Bar(f"aarch64, {what}", worst(ours, theirs), ">= 35"))
    return bars


class OrtFormat(Engine):
    """Runs the .ort files in `folder`."""

    def __init__(self, source: Artifact, folder: Path) -> None:
        super().__init__(source)
        self.folder = folder

    def network(self, component: str, feeds: Mapping[str, Array] | None = None) -> Network:
        """The network of `component`, opened anew for every run."""
        return OnnxRuntimeNetwork(self.folder / component / "model.ort")


def mobile(root: Path) -> list[Bar]:
    """Print what onnxruntime reports on each component for phones; the bar compares pictures from its .ort format."""
    source = open_artifact(root / "device")
    bars = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "device")
        shutil.copytree(source.path, copy)
        for model in sorted(copy.glob("*/model.onnx")):
            output = run([sys.executable, "-m", "onnxruntime.tools.check_onnx_model_mobile_usability", str(model)])
            verdicts = re.findall(r"Model should perform well with (.+?)( if modified to have fixed input shapes| as is)(: \w+)", output)
            print(f"{model.parent.name}: {'; '.join(map(''.join, verdicts))}; {output.strip().splitlines()[-1]}")
        convert = "onnxruntime.tools.convert_onnx_models_to_ort"
        run([sys.executable, "-m", convert, str(copy), "--optimization_style", "Fixed", "--target_platform", "arm"])
        for model in sorted(copy.glob("*/model.onnx")):
            print(f"{model.parent.name}: .onnx {model.stat().st_size} bytes, .ort {model.with_suffix('.ort').stat().st_size} bytes")
        pipe = DevicePipeline(source)
        seeds = list(range(len(PROMPTS)))
        ours = pipe.sample(PROMPTS, seeds)
        pipe.engine = OrtFormat(source, copy)
        bars.append(Bar(".ort against .onnx, INT4", worst(ours, pipe.sample(PROMPTS, seeds)), ">= 60"))
    return bars


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    what, root, *more = sys.argv[1:]
    targets: dict[str, Callable[..., list[Bar]]] = {"loaders": loaders, "arm64": arm64, "mobile": mobile}
    found = targets[what](Path(root), *more)
    report(found, Path(root, f"{what}.json"), f"make test-{what if what != 'loaders' else 'interchange'}")
    sys.exit(not all(bar.met for bar in found))
