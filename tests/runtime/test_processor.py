"""Kinds of processors, by what systems tell of them."""

from __future__ import annotations

import pytest

from flashgen.runtime.processor import Processor, read_cpuinfo, read_sysctl, this_processor

XEON = (
    "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\n"
    "flags\t\t: fpu sse4_2 avx2 f16c avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8\n"
)
EPYC = "model name\t: AMD EPYC 7B13\nflags\t\t: fpu sse4_2 avx2 f16c\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm asimddp i8mm sve\n"
APPLE = "machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_SME: 0\n"
INTEL_MAC = (
    "machdep.cpu.brand_string: Intel(R) Core(TM) i7-1068NG7\nmachdep.cpu.features: FPU SSE4.2 F16C\n"
    "machdep.cpu.leaf7_features: AVX2 AVX512F AVX512VNNI\nhw.optional.avx2_0: 1\n"
)


@pytest.mark.parametrize(
    ("processor", "name", "kind"),
    [
        (read_cpuinfo(XEON), "Intel(R) Xeon(R) Platinum 8481C", "amx"),
        (read_cpuinfo(XEON.replace("amx_int8", "")), "Intel(R) Xeon(R) Platinum 8481C", "vnni"),
        (read_cpuinfo(EPYC), "AMD EPYC 7B13", "avx2"),
        (read_cpuinfo(EPYC.replace("avx2", "avx")), "AMD EPYC 7B13", ""),
        (read_cpuinfo(ARM), None, "arm"),
        (read_sysctl(APPLE), "Apple M2", "arm"),
        (read_sysctl(INTEL_MAC), "Intel(R) Core(TM) i7-1068NG7", "vnni"),
        (read_sysctl(INTEL_MAC.replace("AVX512VNNI", "")), "Intel(R) Core(TM) i7-1068NG7", "avx2"),
        (read_sysctl(""), None, ""),
    ],
)
def test_processors_are_known_by_their_features(processor: Processor, name: str | None, kind: str) -> None:
    assert processor.kind == kind
    assert name is None or processor.name == name


def test_this_processor_has_a_name() -> None:
    assert this_processor().name
