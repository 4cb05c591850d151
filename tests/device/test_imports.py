"""The base install has no torch: nothing on the device path may import it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashgen.artifact.store import Artifact

CHECK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "accelerate"):
            raise ImportError(f"{name} is not in the base install")
sys.meta_path.insert(0, Refuse())
"""


def run_without_torch(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHECK + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_guard_itself_works() -> None:
    with pytest.raises(AssertionError, match="not in the base install"):
        run_without_torch("import torch")


def test_device_pipeline_draws_without_torch(handmade_device: Artifact, tmp_path: Path) -> None:
    path, file = str(handmade_device.path), str(tmp_path / "a.png")
    run_without_torch(
        f"""
from pathlib import Path
from flashgen.artifact.store import open_artifact
from flashgen.device.sampler import DevicePipeline
from flashgen.png import write_png
picture = DevicePipeline(open_artifact({path!r})).sample(["a red circle"], [1])[0]
assert picture.shape == (64, 96, 3)
write_png(Path({file!r}), picture, {{}})
"""
    )
    assert Path(file).exists()


def test_no_library_reports_to_its_makers(handmade_device: Artifact, tmp_path: Path) -> None:
    """onnxruntime and OpenVINO keep an identifier in the home folder and send what they run, but for CI and where they are told not to."""
    code = f"""
import os
from flashgen.artifact.store import open_artifact
from flashgen.device.sampler import DevicePipeline
DevicePipeline(open_artifact({str(handmade_device.path)!r})).sample(["a red circle"], [1])
import importlib.util
if importlib.util.find_spec("openvino"):
    import openvino
"""
    left_out = ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()} <= {(".cache", "flashgen")}


def test_generate_and_bench_run_on_a_device_artifact_without_torch(tiny_int4_device: Artifact, tmp_path: object) -> None:
    path = str(tiny_int4_device.path)
    run_without_torch(
        f"""
from pathlib import Path
from flashgen.artifact.store import open_artifact
from flashgen.metrics.worker import Job, Session
from flashgen.stages import bench
from flashgen.stages.generate import generate
from flashgen.stages.request import Request
file = Path({str(tmp_path)!r}) / "a.png"
assert generate(open_artifact({path!r}), Request(["a red circle"], [1]), file, engine="onnxruntime")[0].exists()
session = Session(Job({path!r}, "onnxruntime", tuple(open_artifact({path!r}).manifest.sampler.sigmas)))
assert session.draw(["a red circle"], [1], 1).shape == (1, 64, 64, 3)
"""
    )
