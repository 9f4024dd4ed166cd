"""What `check` computes for a token equals what `decode` does, bit for bit, everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from foreign import FOREIGN, MOST, param
from targets_here import WHOLE, spared_format

from headrace.kernels import attention
from headrace.kernels.prepare import kernel as producer
from headrace.plan import Mode, check_mode, modes
from headrace.sparse.format import Format
from headrace.sparse.linear import activation_bytes, kernels
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.machines import NATIVE
from headrace.targets.emulation.run import run
from headrace.targets.host import runnable_targets
from headrace.targets.table import Kernel
from headrace.targets.target import Target, all_targets

NATIVE_TARGETS = {target.name: target for target in runnable_targets()}
# CI's part under emulation: integer products wherever activations lie in another way, the rest
# on the first of these.
QUICK = {name: {"q4_0"} for name in MOST} | {
    "aarch64-dotprod": {"q4_0", "q4_k", "f16"},
    "aarch64-i8mm": {"q4_0", "q4_k"},
}
QUICK_ATTENTION = {*WHOLE, "aarch64-dotprod", "riscv64-v256-zvfh"}
ROWS, TOKENS = 37, 7
HEAD = 64


def launch(kernel: Kernel, target: Target, machine: str, launches: list[list[Any]]) -> None:
    code = KernelStore(target).objects([kernel])[kernel.name]
    run(kernel.name, code, target, machine, [(slots, 1) for slots in launches])


def machines() -> list[tuple[Target, str]]:
    return [
        (target, machine)
        for target in (*NATIVE_TARGETS.values(), *FOREIGN.values())
        for machine in (target.machines[:1] if target.name in FOREIGN else [NATIVE])
    ]


def products() -> list[Any]:
    def slow(target: Target, name: str) -> bool:
        if target.name in WHOLE:
            return spared_format(name, target.name)
        return name not in QUICK.get(target.name, ())

    return [
        param(target, machine, name, slow=slow(target, name))
        for target, machine in machines()
        for name in FORMATS
    ]


def inputs(
    mode: Mode, kind: str, x: np.ndarray, target: Target, machine: str
) -> tuple[np.ndarray, int]:
    """Activations of the rows of x as a program makes them, and the bytes of a group."""
    tokens, n = x.shape
    group = mode.group(kind)
    stride = activation_bytes(kind, n) * group
    out = np.zeros((-(-tokens // group), stride), np.uint8)
    slots = [
        x, x, 0, 0, out, n, np.array([tokens]), np.zeros(1, np.int64), n * 4, n * 4, stride, group,
        0, 0, np.zeros(n, np.float32), 0, 1e-5, 0,
    ]  # fmt: skip
    launch(producer("copy", kind), target, machine, [slots])
    return out, stride


def multiplied(
    mode: Mode, fmt: Format, raw: np.ndarray, x: np.ndarray, target: Target, machine: str
) -> np.ndarray:
    """The product of a program: [tokens, rows]."""
    kind = mode.kind(fmt.activation)
    group = mode.group(kind)
    y = np.zeros((-(-len(x) // group) * group, 48), np.float32)
    packed, stride = inputs(mode, kind, x, target, machine)
    bias = np.linspace(-3, 3, 48, dtype=np.float32)
    slots = [
        fmt.tile(raw), packed, y, x.shape[1] // fmt.block, 3, np.array([len(x)]), 0, y.strides[0],
        bias, stride, *unpacking_slots(fmt, x.shape[1], target.gemm_tiles),
    ]  # fmt: skip
    launch(kernels(fmt)[mode.operation(fmt.activation)], target, machine, [slots])
    return y[: len(x), :ROWS]


@pytest.mark.parametrize(("target_name", "machine", "format_name"), products())
def test_products_of_a_few_tokens(target_name: str, machine: str, format_name: str) -> None:
    target, fmt = all_targets()[target_name], FORMATS[format_name]
    rng = np.random.default_rng(3)
    n = fmt.block * 3 if fmt.block > 1 else 32 * 3 + 16
    if fmt.written:
        raw = fmt.encode(rng.standard_normal((ROWS, n)).astype(np.float32))
    else:
        raw = fmt.unpacked.examples(rng, ROWS, n)
    x = (rng.standard_normal((TOKENS, n)) * 10.0 ** rng.integers(-3, 3, (TOKENS, 1))).astype("f4")
    check, decode = check_mode(target), modes(target)["decode"]
    found = multiplied(check, fmt, raw, x, target, machine)
    one = [multiplied(decode, fmt, raw, x[i : i + 1], target, machine)[0] for i in range(TOKENS)]
    assert np.abs(found).max() > 1
    assert np.array_equal(found, one)


@pytest.mark.parametrize(
    ("target_name", "machine"),
    [param(t, m, slow=t.name not in QUICK_ATTENTION) for t, m in machines()],
)
def test_attention_of_a_few_tokens(target_name: str, machine: str) -> None:
    target = all_targets()[target_name]
    rows = attention.kernels(HEAD)
    for few, one in zip(
        rows["rope"].cases(target, np.random.default_rng(5)),
        rows["rope"].cases(target, np.random.default_rng(5)),
        strict=True,
    ):
        q, k, v, *_ = one.slots
        tokens, start = min(5, len(q)), int(one.slots[25][0])
        few.slots[27][0] = tokens
        launch(rows["rope"], target, machine, [few.slots])
        launch(rows["short"], target, machine, [few.slots])
        for i in range(tokens):
            slots = list(one.slots)
            slots[:3] = q[i], k[i], v[i]
            slots[20] = one.slots[20][i]
            slots[25] = np.array([start + i])
            launch(rows["decode"], target, machine, [slots])
        found, expected = few.slots[20][:tokens], one.slots[20][:tokens]
        assert np.abs(expected).max() > 0.1
        assert np.array_equal(found, expected), one.label
        for cache in (3, 4):
            assert np.array_equal(few.slots[cache], one.slots[cache]), one.label
