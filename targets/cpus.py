"""Features of CPUs by the names that LLVM and GCC give them, for `--cpu`.

Source: LLVM's definitions of processors (AArch64Processors.td, ARMProcessors.td, X86.td,
RISCVProcessors.td); `tests/test_cpus.py` compares what LLVM generates for each name with this
table. How long vectors of SVE are, LLVM does not say: 256 bits in Neoverse V1 and 512 in A64FX by
their makers' manuals, 128 in all of the others.

Only features that some target needs are here.
"""

from __future__ import annotations

from headrace.errors import KernelError
from headrace.targets.sve_length import up_to

# LLVM's names of no CPU in particular: what an architecture's lowest target asks for.
GENERIC = ("generic", "generic-rv64")

_NEON = frozenset({"neon"})
_DOTPROD = _NEON | {"dotprod", "fullfp16"}
_I8MM = _DOTPROD | {"i8mm"}
_SVE = {"sve"}

_VFP4 = frozenset({"neon", "vfp4"})

_V2 = frozenset({"sse4.2", "ssse3", "popcnt"})
_V3 = _V2 | {"avx2", "fma", "f16c", "bmi2"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_VNNI = _V4 | {"avx512vnni"}
_BF16 = _VNNI | {"avx512bf16"}
_AMX = _BF16 | {"amx-int8"}

_RV64 = frozenset({"m", "a", "f", "d", "c"})
_RVV = _RV64 | {"v", "zvl128b"}
_HALVES = {"zfhmin", "zvfhmin"}


def _each(names: str, features: frozenset[str]) -> dict[str, frozenset[str]]:
    return dict.fromkeys(names.split(), features)


CPUS: dict[str, dict[str, frozenset[str]]] = {
    "aarch64": {
        **_each("cortex-a34 cortex-a35 cortex-a53 cortex-a57 cortex-a72 cortex-a73", _NEON),
        **_each("cortex-a55 cortex-a65 cortex-a75 cortex-a76 cortex-a77 cortex-a78", _DOTPROD),
        **_each("cortex-x1 neoverse-n1 apple-a13 apple-a14 apple-m1", _DOTPROD),
        **_each("apple-m2 apple-m3 apple-m4 ampere1", _I8MM),
        **_each("cortex-a510 cortex-a520 cortex-a710 cortex-a715", _I8MM | _SVE | up_to(128)),
        **_each("cortex-a720 cortex-a725 cortex-x2 cortex-x3", _I8MM | _SVE | up_to(128)),
        **_each("cortex-x4 neoverse-n2 neoverse-n3", _I8MM | _SVE | up_to(128)),
        **_each("neoverse-v2 neoverse-v3", _I8MM | _SVE | up_to(128)),
        **_each("neoverse-v1", _I8MM | _SVE | up_to(256)),
        **_each("a64fx", _NEON | {"fullfp16"} | _SVE | up_to(512)),
    },
    "armv7a": {
        **_each("cortex-a5 cortex-a7 cortex-a12 cortex-a15 cortex-a17 cortex-a32", _VFP4),
        **_each("cortex-a35 cortex-a53 cortex-a55 cortex-a57 cortex-a72 cortex-a73", _VFP4),
        **_each("cortex-a75 cortex-a76 cortex-a77 cortex-a78", _VFP4),
        **_each("cortex-a8 cortex-a9", _NEON),
    },
    "riscv64": {
        **_each("sifive-u54 sifive-u74 veyron-v1", _RV64),
        **_each("sifive-p670", _RVV | {"zfhmin"}),
        **_each("xiangshan-kunminghu", _RVV | _HALVES),
        **_each("spacemit-x60 tt-ascalon-d8", _RVV | {"zvl256b"} | _HALVES),
        **_each("sifive-x280", _RVV | {"zvl256b", "zvl512b"} | _HALVES),
    },
    "x86_64": {
        **_each("x86-64", frozenset()),
        **_each("x86-64-v2 nehalem westmere sandybridge silvermont goldmont", _V2),
        **_each("ivybridge", _V2 | {"f16c"}),
        **_each("x86-64-v3 haswell broadwell skylake znver1 znver2 znver3", _V3),
        **_each("alderlake raptorlake meteorlake arrowlake lunarlake", _V3 | {"avxvnni"}),
        **_each("gracemont sierraforest", _V3 | {"avxvnni"}),
        **_each("x86-64-v4 skylake-avx512", _V4),
        **_each("cascadelake icelake-client icelake-server tigerlake rocketlake", _VNNI),
        **_each("cooperlake znver4", _BF16),
        **_each("znver5", _BF16 | {"avxvnni"}),
        **_each("sapphirerapids emeraldrapids graniterapids", _AMX | {"avxvnni"}),
    },
}


def features_of(cpu: str, architecture: str) -> frozenset[str]:
    """What a CPU has of the features that targets of an architecture need.

    Raises:
        KernelError: it is not known, or of another architecture.
    """
    known = CPUS.get(architecture, {})
    if cpu in known:
        return known[cpu]
    elsewhere = [other for other, names in CPUS.items() if cpu in names]
    what = f"{cpu} is a CPU of {', '.join(elsewhere)}" if elsewhere else f"unknown CPU {cpu!r}"
    raise KernelError(f"{what}; CPUs of {architecture}: {', '.join([GENERIC[0], *known])}")
