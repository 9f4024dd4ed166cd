"""The table of CPUs says what LLVM's own definitions of them say."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import pytest

from headrace.errors import KernelError
from headrace.targets import features, host_amx
from headrace.targets.cpus import CPUS
from headrace.targets.naming import choose, choose_one
from headrace.targets.target import all_targets

TARGETS = all_targets().values()
_SUM = """
declare <{n} x i32> @llvm.vector.partial.reduce.add(<{n} x i32>, <{m} x i32>)
define <{n} x i32> @f(<{n} x i32> %s, <{m} x i8> %a, <{m} x i8> %b) {{
  %x = {kind} <{m} x i8> %a to <{m} x i32>
  %y = sext <{m} x i8> %b to <{m} x i32>
  %p = mul <{m} x i32> %x, %y
  %r = call <{n} x i32> @llvm.vector.partial.reduce.add(<{n} x i32> %s, <{m} x i32> %p)
  ret <{n} x i32> %r
}}
"""
_ADD = "define <{n} x {t}> @f(<{n} x {t}> %a, <{n} x {t}> %b) #0 {{ %r = {add} <{n} x {t}> %a, %b\n"
_ADD += ' ret <{n} x {t}> %r }}\nattributes #0 = {{ "min-legal-vector-width"="512" }}'
_FMA = "declare <4 x float> @llvm.fma(<4 x float>, <4 x float>, <4 x float>)\n"
_FMA += "define <4 x float> @f(<4 x float> %a) {\n"
_FMA += " %r = call <4 x float> @llvm.fma(<4 x float> %a, <4 x float> %a, <4 x float> %a)\n"
_FMA += " ret <4 x float> %r }"
_OVER = "declare {t} @llvm.{name}({t}{more})\ndefine {t} @f({t} %a) {{\n"
_OVER += " %r = call {t} @llvm.{name}({t} %a{value})\n ret {t} %r }}"
_CAST = "define <{n} x {to}> @f(<{n} x {t}> %a) {{ %r = {how} <{n} x {t}> %a to <{n} x {to}>\n"
_CAST += " ret <{n} x {to}> %r }}"
_WORDS = """
declare <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16>, <8 x i16>)
define <4 x i32> @f(<4 x i32> %s, <8 x i16> %a, <8 x i16> %b) {
  %p = call <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16> %a, <8 x i16> %b)
  %r = add <4 x i32> %s, %p
  ret <4 x i32> %r
}
"""
_SVE = """
define void @f(ptr %a) vscale_range(2,2) {
  %x = load <8 x i32>, ptr %a
  %r = add <8 x i32> %x, %x
  store <8 x i32> %r, ptr %a
  ret void
}
"""
_COMPARE = "define <2 x i64> @f(<2 x i64> %a, <2 x i64> %b) { %c = icmp sgt <2 x i64> %a, %b\n"
_COMPARE += " %r = sext <2 x i1> %c to <2 x i64>\n ret <2 x i64> %r }"
_SHIFT = "define i64 @f(i64 %a, i64 %b) { %r = shl i64 %a, %b\n ret i64 %r }"

# For each architecture and feature: IR that any CPU can do, and the instruction that only CPUs
# with the feature do it with.
PROBES: dict[str, dict[str, tuple[str, str]]] = {
    "aarch64": {
        "dotprod": (_SUM.format(n=4, m=16, kind="sext"), "sdot\t"),
        "i8mm": (_SUM.format(n=4, m=16, kind="zext"), "usdot\t"),
        "fullfp16": (_ADD.format(n=8, t="half", add="fadd"), "fadd\tv0.8h"),
        "sve": (_SVE, "z0"),
    },
    "armv7a": {
        "neon": (_ADD.format(n=4, t="i32", add="add"), "vadd.i32\tq"),
        "vfp4": (_FMA, "vfma.f32\tq"),
    },
    "x86_64": {
        "sse4.2": (_COMPARE, "pcmpgtq"),
        "ssse3": (_OVER.format(t="<16 x i8>", name="abs", more=",i1", value=",i1 0"), "pabsb"),
        "popcnt": (_OVER.format(t="i64", name="ctpop", more="", value=""), "popcnt"),
        "avx2": (_ADD.format(n=8, t="i32", add="add"), "vpaddd\t%ymm"),
        "fma": (_FMA, "vfm"),
        "f16c": (_CAST.format(n=4, t="half", to="float", how="fpext"), "vcvtph2ps"),
        "bmi2": (_SHIFT, "shlx"),
        "avx512f": (_ADD.format(n=16, t="i32", add="add"), "zmm"),
        "avx512bw": (_ADD.format(n=32, t="i16", add="add"), "zmm"),
        "vnni": (_WORDS, "vpdpwssd"),
        "bf16": (_CAST.format(n=16, t="float", to="bfloat", how="fptrunc"), "vcvtneps2bf16"),
    },
}
# Names of the same instructions with shorter vectors.
SAME = {"avx512vnni": "vnni", "avxvnni": "vnni", "avx512bf16": "bf16"}
NO_BF16 = {"arrowlake", "lunarlake", "sierraforest"}  # have it for shorter vectors alone


def machine(architecture: str, cpu: str) -> llvm.TargetMachine:
    target = next(one for one in TARGETS if one.architecture == architecture)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    abi = "lp64d" if architecture == "riscv64" else ""
    made: llvm.TargetMachine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=cpu, features="", opt=2, abiname=abi
    )
    return made


@pytest.mark.parametrize(
    ("architecture", "cpu"), [(a, cpu) for a in PROBES for cpu in CPUS[a]], ids=str
)
def test_llvm_knows_the_cpu_alike(architecture: str, cpu: str) -> None:
    code = machine(architecture, cpu)
    found = {
        feature
        for feature, (text, instruction) in PROBES[architecture].items()
        if instruction in code.emit_assembly(llvm.parse_assembly(text))
    }
    if cpu in NO_BF16:
        found.remove("bf16")
    said = {SAME.get(feature, feature) for feature in CPUS[architecture][cpu]}
    assert found == said & PROBES[architecture].keys()


@pytest.mark.parametrize("cpu", CPUS["riscv64"])
def test_llvm_knows_riscv_alike(cpu: str) -> None:
    text = machine("riscv64", cpu).emit_assembly(
        llvm.parse_assembly("define void @f() { ret void }")
    )
    (line,) = [line for line in text.splitlines() if line.strip().startswith(".attribute\t5")]
    words = line.split('"')[1].removeprefix("rv64").split("_")
    names = {re.sub(r"\d+p\d+$", "", word) for word in words}  # without their versions
    wanted = {f for t in TARGETS if t.architecture == "riscv64" for f in t.needs} | {"zvl512b"}
    assert CPUS["riscv64"][cpu] == names & wanted


@pytest.mark.parametrize(
    ("what", "cpu", "best"),
    [
        ("aarch64-linux", "cortex-a72", "aarch64-neon"),
        ("aarch64-linux", "cortex-a55", "aarch64-dotprod"),
        ("aarch64-linux", "apple-m1", "aarch64-dotprod"),
        ("aarch64-linux", "cortex-a510", "aarch64-i8mm"),
        ("aarch64-linux", "Neoverse-N2", "aarch64-i8mm"),
        ("aarch64-linux", "neoverse-v1", "aarch64-sve256"),
        ("aarch64-linux", "a64fx", "aarch64-sve512"),
        ("x86_64-linux", "x86-64-v3", "x86-64-v3"),
        ("x86_64-linux", "alderlake", "x86-64-v3-vnni"),
        ("x86_64-linux", "znver4", "x86-64-v4-bf16"),
        ("x86_64-linux", "sapphirerapids", "x86-64-v4-amx"),
        ("riscv64-linux", "spacemit-x60", "riscv64-v256-zvfh"),
        ("riscv64-linux", "generic-rv64", "riscv64"),
        ("armv7-linux", "cortex-a72", "armv7-neon"),
        ("aarch64-linux", "generic", "aarch64-neon"),
    ],
)
def test_a_cpu_means_its_best_target(what: str, cpu: str, best: str) -> None:
    assert choose_one(TARGETS, what, cpu).name == best
    assert choose(TARGETS, what, cpu)[-1].name == best


def test_levels_that_a_cpu_cannot_run_are_left_out() -> None:
    names = [target.name for target in choose(TARGETS, "aarch64-linux", "a64fx")]
    assert names == ["aarch64-neon", "aarch64-sve256", "aarch64-sve512"]
    assert [target.name for target in choose(TARGETS, "riscv64-linux", "generic")] == ["riscv64"]


def test_cpus_that_do_not_fit() -> None:
    with pytest.raises(KernelError, match=r"unknown CPU 'z80'; CPUs of aarch64: generic, cortex"):
        choose(TARGETS, "aarch64-linux", "z80")
    with pytest.raises(KernelError, match=r"haswell is a CPU of x86_64; CPUs of aarch64"):
        choose(TARGETS, "aarch64-linux", "haswell")
    with pytest.raises(KernelError, match="cortex-a8 cannot run armv7-neon: it lacks vfp4"):
        choose(TARGETS, "armv7-linux", "cortex-a8")
    with pytest.raises(KernelError, match="cortex-a53 cannot run aarch64-i8mm: it lacks dotprod"):
        choose_one(TARGETS, "aarch64-i8mm-linux", "cortex-a53")


def test_matrix_registers_are_used_where_the_system_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = features._cpuinfo_flags("processor\t: 0\nflags\t\t: avx2 sse4_1 avx512_vnni\n")
    assert plain == {"avx2", "sse4.1", "avx512vnni"}
    more = features._cpuinfo_flags("flags : avx2 amx_tile amx_int8 amx_bf16\n")
    assert more is not None and more > host_amx.FEATURES
    asked: list[bool] = []

    def answer(given: bool) -> bool:
        asked.append(given)
        return given

    monkeypatch.setattr(host_amx, "_asked", lambda: answer(True))
    assert host_amx.usable(plain) == plain and not asked  # there is nothing to ask for
    assert host_amx.usable(more) == more
    monkeypatch.setattr(host_amx, "_asked", lambda: answer(False))
    assert host_amx.usable(more) == more - host_amx.FEATURES and asked == [True, False]
    monkeypatch.undo()
    monkeypatch.setattr(host_amx.sys, "platform", "win32")
    assert host_amx.usable(more) == more - host_amx.FEATURES
