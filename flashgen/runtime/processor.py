"""This machine's processor: its name, and the instruction sets that decide how fast engines multiply integers."""

from __future__ import annotations

import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

CPUINFO = Path("/proc/cpuinfo")
FEATURES = (
    "sse4_2", "avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
# Kinds of processors by what multiplies 8-bit integers, best first.
KINDS = {"amx": {"amx_int8"}, "vnni": {"avx512_vnni", "avx_vnni"}, "avx2": {"avx2"}, "arm": {"asimddp", "i8mm"}}
DARWIN = {"avx512vnni": "avx512_vnni", "feat_dotprod": "asimddp", "feat_i8mm": "i8mm"}  # sysctl's names of features


class Processor(NamedTuple):
    """Name and instruction sets, those of `FEATURES` that it has. Empty where the system does not tell."""

    name: str
    features: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The first of `KINDS` that it is; empty for none."""
        return next((kind for kind, any_of in KINDS.items() if any_of & {*self.features}), "")

    @property
    def has_bf16(self) -> bool:
        """Return True if it multiplies bf16; where it does not, torch takes minutes for what it does in seconds in fp32."""
        return bool({"avx512_bf16", "amx_bf16"} & {*self.features})


@cache
def this_processor() -> Processor:
    """The processor of this machine, by /proc/cpuinfo on Linux and sysctl on macOS."""
    with suppress(OSError, ValueError):
        return read_cpuinfo(CPUINFO.read_text())
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(["sysctl", "machdep.cpu", "hw.optional"], capture_output=True, text=True, timeout=5)
        return read_sysctl(done.stdout)
    return Processor(platform.processor() or platform.machine(), ())


def read_cpuinfo(text: str) -> Processor:
    """The processor that the text of /proc/cpuinfo describes. ARM's has no name there."""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(name, tuple(feature for feature in FEATURES if feature in flags))


def read_sysctl(text: str) -> Processor:
    """The processor that the output of `sysctl machdep.cpu hw.optional` describes."""
    fields = dict(re.findall(r"^([\w.]+): (.*)$", text, re.MULTILINE))
    words = " ".join(value for key, value in fields.items() if key.endswith("features")).lower().split()
    words += [key.rpartition(".")[2].lower() for key, value in fields.items() if key.startswith("hw.optional.") and value == "1"]
    known = {DARWIN.get(word.removesuffix("_0"), word) for word in words}
    name = fields.get("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    return Processor(name, tuple(feature for feature in FEATURES if feature in known))
