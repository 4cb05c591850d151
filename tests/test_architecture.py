"""Dependencies point downwards, and the device side stays free of torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashgen"
BESIDE = {"artifact", "recipe"}  # usable from everywhere, using nothing of ours but errors and progress
LAYERS = [{"flow", "shapes", "device"}, {"objectives", "models"}, {"training", "quant", "export", "metrics"}, {"stages"}, {"cli"}]
ALLOWED = {name: set().union(*LAYERS[: depth + 1]) | BESIDE for depth, names in enumerate(LAYERS) for name in names}
ALLOWED |= {name: {name} for name in BESIDE}
ALLOWED |= {
    "flow": {"flow"},
    "shapes": {"shapes"},
    "objectives": {"objectives", "flow"},
    "device": {"device", "flow", "artifact"},
    "__main__": {"cli"},
    "__init__": set(),
    "cache": set(),
    "errors": set(),
    "progress": set(),
    "randomness": set(),
    "processes": set(),
    "timing": set(),
}
COMMON = {"cache", "errors", "processes", "progress", "randomness", "timing", "__version__"}


def imports(path: Path) -> Iterator[str]:
    """First part below flashgen of everything that the file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "flashgen":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashgen."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("flashgen."))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_file_imports_only_what_lies_below_it(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"say in this test where {part} belongs"
    wrong = set(imports(path)) - ALLOWED[part] - COMMON
    assert not wrong, f"{path.name} of {part} imports {sorted(wrong)}"


def test_no_file_uses_relative_imports() -> None:
    for path in FILES:
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level], path


HEAVY = {"torch", "diffusers", "transformers", "onnx", "accelerate", "safetensors"}
PROBE = """
import importlib, json, pkgutil, sys
import flashgen.cli.app
light = sorted(sys.modules)
import flashgen.device
names = [m.name for m in pkgutil.walk_packages(flashgen.device.__path__, "flashgen.device.")]
for name in [*names, "flashgen.artifact.store", "flashgen.recipe.load", "flashgen.stages.generate", "flashgen.stages.bench"]:
    importlib.import_module(name)
print(json.dumps([light, sorted(sys.modules)]))
"""


def test_device_side_and_help_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for_help, for_device = (set(modules) for modules in json.loads(done.stdout))
    assert not for_help & (HEAVY | {"numpy", "rich", "pydantic", "yaml", "PIL", "onnxruntime", "scipy", "importlib.metadata"})
    assert not for_device & HEAVY
