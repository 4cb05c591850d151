"""Import contracts per module, what only a family may know, and the sizes of files. Each contract is shown to fail by a planted fault."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashgen"
Sources = Mapping[str, str]  # source text by module, without the leading `flashgen.`

# What a module may import, by the longest prefix of its name that is listed. `base` is for everyone.
BASE = {"", "errors", "pixels", "noise", "cache", "progress", "randomness", "runtime"}
ARTIFACTS = {"artifact", "recipe", "png"}
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "__main__": {"cli"},
    "errors": set(),
    "pixels": {"errors"},
    "noise": set(),
    "cache": set(),
    "randomness": set(),
    "progress": {"runtime"},
    "runtime": {"errors", "runtime"},
    "png": {"", "errors", "pixels", "artifact.files"},
    "flow": {"errors", "flow"},
    "objectives": {"flow", "objectives"},
    "quant": {"errors", "quant"},
    "recipe": {"errors", "pixels", "recipe"},
    "artifact": {"", "errors", "pixels", "cache", "progress", "artifact"},
    "judges": BASE | ARTIFACTS | {"worlds", "judges"},
    "judges.base": {"errors"},
    "arena": {"errors", "png", "progress", "artifact.files", "recipe.base", "arena"},
    "worlds": {"errors", "judges.base", "worlds"},
    "families": BASE | ARTIFACTS | {"families", "flow"},
    "families.sd3": BASE | ARTIFACTS | {"families", "flow", "models", "device"},
    "families.sd3.pretraining": BASE | ARTIFACTS | {"families", "models", "training", "worlds"},
    "families.sd3.teacher": BASE | ARTIFACTS | {"families", "models", "training", "worlds"},
    "device": BASE | ARTIFACTS | {"families", "flow", "device"},
    "models": BASE | ARTIFACTS | {"families", "flow", "device", "quant", "models"},
    "training": BASE | ARTIFACTS | {"families", "flow", "objectives", "quant", "models", "training"},
    "export": BASE | ARTIFACTS | {"families", "flow", "quant", "models", "device", "export"},
    "metrics": BASE | ARTIFACTS | {"judges.base", "families", "flow", "models", "device", "metrics"},
    "report": BASE | {"artifact.files", "png", "report"},
    "stages": BASE
    | ARTIFACTS
    | {
        "families",
        "worlds",
        "judges",
        "flow",
        "objectives",
        "quant",
        "models",
        "device",
        "training",
        "export",
        "metrics",
        "report",
        "stages",
    },
    "cli": BASE | ARTIFACTS | {"stages", "arena", "cli"},
}
TYPES_ONLY = {
    "families": {"models", "worlds"},
    "families.sd3": {"worlds"},
    "training": {"judges.base", "worlds"},
    "stages": set(),
    "models": {"worlds"},
}
SD3_WORDS = re.compile(
    r"SD3Transformer2DModel|StableDiffusion3Pipeline|CLIPTextModelWithProjection|T5EncoderModel|text_encoder_3|tokenizer_3|joint_blocks|\bpooled"
)
VAE_FACTOR = re.compile(r"\b\w*(size|side|height|width|px)\w*(\.\w+)?\s*(//|\*|/)\s*8\b|\b8\s*\*\s*\w*(size|side|height|width|px)")
MAX_FILE, MAX_FUNCTION = 300, 60


def sources() -> dict[str, str]:
    """The package as it is."""
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: path.read_text() for name, path in names.items()}


def imported(tree: ast.AST, modules: set[str], types: bool) -> Iterator[str]:
    """Modules of the package that a file imports: under TYPE_CHECKING if `types`, else everywhere else, inside functions too."""
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if (id(node) in guarded) != types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashgen":
            base = str(node.module).removeprefix("flashgen").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in modules else base
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("flashgen").lstrip(".") for alias in node.names if alias.name.split(".")[0] == "flashgen")


def rule(name: str, table: Mapping[str, set[str]]) -> set[str]:
    """The entry of the longest prefix of `name`."""
    parts = name.split(".")
    return next((table[key] for n in range(len(parts), -1, -1) if (key := ".".join(parts[:n])) in table), set())


def layers(files: Sources) -> list[str]:
    """Imports that a contract does not allow."""
    wrong = []
    for name, text in files.items():
        tree, allowed = ast.parse(text), rule(name, ALLOWED)
        for target in imported(tree, set(files), types=False):
            if not any(target == part or (part and target.startswith(f"{part}.")) for part in allowed):
                wrong.append(f"{name or 'flashgen'} imports {target or 'flashgen'}")
        more = allowed | rule(name, TYPES_ONLY)
        for target in imported(tree, set(files), types=True):
            if not any(target == part or (part and target.startswith(f"{part}.")) for part in more):
                wrong.append(f"{name or 'flashgen'} imports {target or 'flashgen'} for types")
    return wrong


def circles(files: Sources) -> list[str]:
    """Circles of modules that import each other, lazily or not; imports for types alone do not count."""
    graph = {
        name: {t for t in imported(ast.parse(text), set(files), types=False) if t in files and t != name} for name, text in files.items()
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [" -> ".join([*path[path.index(name) :], name])]
        if name in done:
            return []
        ends = [circle for target in sorted(graph[name]) for circle in visit(target, [*path, name])]
        done.add(name)
        return ends

    return [circle for name in sorted(graph) for circle in visit(name, [])]


def sd3_knowledge(files: Sources) -> list[str]:
    """Names and numbers of SD3 outside of its family."""
    return [
        f"{name}: {line.strip()}"
        for name, text in files.items()
        if not name.startswith("families.sd3")
        for line in text.splitlines()
        if SD3_WORDS.search(line) or VAE_FACTOR.search(line)
    ]


def forward_calls(files: Sources) -> list[str]:
    """Functions that call a transformer: the keyword return_dict, which every diffusers transformer has (VAEs apart)."""
    calls = []
    for name, text in files.items():
        for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                callee = ast.unparse(call.func)
                if any(keyword.arg == "return_dict" for keyword in call.keywords) and not callee.endswith((".decode", ".encode")):
                    calls.append(f"{name}.{function.name}")
    return calls


def encode_calls(files: Sources) -> list[str]:
    """Functions that call a family's `encode`."""
    return [
        f"{name}.{function.name}"
        for name, text in files.items()
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("family.encode")
    ]


def sizes(files: Sources) -> list[str]:
    """Files and functions that are too long."""
    long = [f"{name}: {n} lines" for name, text in files.items() if (n := len(text.splitlines())) > MAX_FILE]
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (n := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION:
                long.append(f"{name}.{node.name}: {n} lines")
    return long


def relative(files: Sources) -> list[str]:
    """Relative imports."""
    return [name for name, text in files.items() if any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(ast.parse(text)))]


CONTRACTS: dict[Callable[[Sources], list[str]], dict[str, str]] = {  # and faults that must be seen: source text to add, by module
    layers: {
        "quant.pack": "from flashgen.recipe.schema import Recipe",
        "objectives.matching": "import flashgen.models.sample",
        "flow.ode": "from flashgen import randomness",
        "training.loop": "def f():\n    from flashgen.worlds.shapes import scene",
        "export.write": "from flashgen import worlds",
        "device.engine": "from flashgen.models.stream import read",
        "artifact.store": "from flashgen.runtime.processes import rank",
    },
    circles: {
        "artifact.files": "from flashgen.artifact.draft import Draft",
        "cli.run": "def f():\n    from flashgen.cli.options import Options",
    },
    sd3_knowledge: {
        "models.sample": "x = pipe.text_encoder_3",
        "training.roles": "from diffusers import SD3Transformer2DModel",
        "stages.report": "side = size_px // 8",
        "device.sampler": "feeds['pooled_projections'] = 1",
    },
    relative: {"flow.grid": "from . import ode"},
    sizes: {"flow.grid": "\n" * 300, "flow.ode": "def f():\n" + "    x = 1\n" * 60},
}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract_holds(contract: Callable[[Sources], list[str]]) -> None:
    wrong = contract(sources())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("contract", "module", "fault"),
    [(contract, module, fault) for contract, faults in CONTRACTS.items() for module, fault in faults.items()],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:24],
)
def test_contract_fails_when_a_fault_is_planted(contract: Callable[[Sources], list[str]], module: str, fault: str) -> None:
    files = sources()
    assert set(contract(files | {module: f"{files[module]}\n{fault}\n"})) > set(contract(files))


def test_a_transformer_is_called_in_one_place_and_prompts_are_encoded_in_one() -> None:
    files = sources()
    assert forward_calls(files) == ["families.base.predict"]
    assert encode_calls(files) == ["models.prompts.encode_prompts"]
    planted = "def f(net, family):\n    family.encode(1)\n    return net(x, return_dict=False)[0]"
    files["training.loop"] += f"\n{planted}\n"
    assert (len(forward_calls(files)), len(encode_calls(files))) == (2, 2)


def test_the_page_knows_no_family() -> None:
    for path in (PACKAGE / "export" / "web").glob("*"):
        wrong = [line for line in path.read_text().splitlines() if SD3_WORDS.search(line) or VAE_FACTOR.search(line)]
        assert not wrong, f"{path.name}: {wrong}"


HEAVY = {"torch", "diffusers", "transformers", "onnx", "accelerate", "safetensors"}
PROBE = """
import importlib, json, pkgutil, sys
import flashgen.cli.app
light = sorted(sys.modules)
import flashgen.device
names = [m.name for m in pkgutil.walk_packages(flashgen.device.__path__, "flashgen.device.")]
stages = [f"flashgen.stages.{name}" for name in ("base", "generate", "bench")]
families = ["flashgen.families.sd3", "flashgen.families.sd3.description"]
for name in [*names, *stages, *families, "flashgen.worlds.shapes", "flashgen.recipe.load"]:
    importlib.import_module(name)
print(json.dumps([light, sorted(sys.modules)]))
"""


def test_device_side_and_help_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for_help, for_device = (set(modules) for modules in json.loads(done.stdout))
    assert not for_help & (HEAVY | {"numpy", "rich", "pydantic", "yaml", "PIL", "onnxruntime", "scipy", "importlib.metadata"})
    assert not for_device & HEAVY
