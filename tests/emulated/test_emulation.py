"""The emulator harness itself: what it must notice, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import FOREIGN, param

from headrace.errors import KernelError
from headrace.targets import backend, linker
from headrace.targets.emulation import lmul, wasm
from headrace.targets.emulation.count import count_instructions, plugin
from headrace.targets.emulation.image import Image
from headrace.targets.emulation.machines import why_not
from headrace.targets.emulation.run import run
from headrace.targets.host import same_architecture
from headrace.targets.ir_text import constant_bytes
from headrace.targets.table import symbol_of
from headrace.targets.target import Target, all_targets
from headrace.targets.vector_length import READ_BYTES

EVERY = [param(target, target.machines[0]) for target in FOREIGN.values()]
FIRST = EVERY[:1]
VECTORS = [
    param(target, machine)
    for target in [FOREIGN.get("riscv64-v128")]
    if target
    for machine in target.machines
]

# Slots: 0 numbers (int64), 1 how many, 2 a float32 that is stored behind them.
SUM_UP = """
define void @{symbol}(ptr %args, i64 %thread, i64 %threads) {{
entry:
  %p = load ptr, ptr %args
  %n_at = getelementptr i64, ptr %args, i64 1
  %n = load i64, ptr %n_at
  %f_at = getelementptr i64, ptr %args, i64 2
  %f = load float, ptr %f_at
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i1, %loop ]
  %s = phi i64 [ 0, %entry ], [ %s1, %loop ]
  %at = getelementptr i64, ptr %p, i64 %i
  %v = load volatile i64, ptr %at
  %s1 = add i64 %s, %v
  %i1 = add i64 %i, 1
  %more = icmp slt i64 %i1, %n
  br i1 %more, label %loop, label %done
done:
  %sum_at = getelementptr i64, ptr %p, i64 %n
  %mine = getelementptr i64, ptr %sum_at, i64 %thread
  store i64 %s1, ptr %mine
  %f_to = getelementptr i64, ptr %sum_at, i64 %threads
  store float %f, ptr %f_to
  ret void
}}
"""


def sum_up(target: Target) -> bytes:
    return backend.emit_object(SUM_UP.format(symbol=symbol_of("sum_up")), target, "sum_up")


def slots(room: int) -> list[Any]:
    numbers = np.zeros(room, np.int64)
    numbers[:3] = 5, 7, -100
    return [numbers, 3, 1.5]


@pytest.mark.parametrize(("target_name", "machine"), EVERY)
def test_arrays_integers_and_floats_arrive_and_come_back(target_name: str, machine: str) -> None:
    target = FOREIGN[target_name]
    one, three = slots(8), slots(8)
    run("sum_up", sum_up(target), target, machine, [(one, 1), (three, 3)])
    half = int(np.float32(1.5).view(np.int32))
    assert one[0].tolist() == [5, 7, -100, -88, half, 0, 0, 0]
    assert three[0].tolist() == [5, 7, -100, -88, -88, -88, half, 0]


@pytest.mark.parametrize(("target_name", "machine"), FIRST)
def test_a_store_beside_an_array_is_an_error(target_name: str, machine: str) -> None:
    target = FOREIGN[target_name]
    with pytest.raises(KernelError, match=r"sum_up.*outside of an array.*at byte 32"):
        run("sum_up", sum_up(target), target, machine, [(slots(4), 1)])


def test_a_store_before_an_array_is_an_error() -> None:
    array = np.arange(4)
    image = Image([([array], 1)])
    data = bytearray(image.data)
    data[data.index(array.tobytes()) - 1] = 0
    with pytest.raises(KernelError, match=r"outside of an array.*at byte -1"):
        image.restore(bytes(data))


def test_views_of_one_array_stay_together() -> None:
    array = np.arange(64)
    image = Image([([array[8:], array], 1)])
    block = np.frombuffer(image.data, np.int64)
    first, second = block[block[2] // 8 :][:2]
    assert first - second == 64
    assert image.data.count(array.tobytes()) == 1


@pytest.mark.parametrize(("target_name", "machine"), FIRST)
def test_a_crash_names_kernel_target_and_machine(target_name: str, machine: str) -> None:
    target = FOREIGN[target_name]
    with pytest.raises(KernelError, match=rf"sum_up of {target_name} on {machine}.*-11"):
        run("sum_up", sum_up(target), target, machine, [([0, 3, 1.5], 1)])


@pytest.mark.parametrize(("target_name", "machine"), EVERY)
def test_both_ways_of_counting_agree(target_name: str, machine: str) -> None:
    target = FOREIGN[target_name]
    if plugin() is None:
        pytest.skip("no C compiler builds the plugin")
    code, counts = sum_up(target), []
    loaded: list[Any] = []
    for n in (3, 103):
        numbers = np.zeros(200, np.int64)
        for compiled in (True, False):
            count = count_instructions(
                "sum_up", code, target, machine, [([numbers, n, 1.5], 1)], compiled_plugin=compiled
            )
            counts.append(count.instructions)
            loaded.append(count.loaded_bytes)
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]
    assert 2 * 100 <= counts[2] - counts[0] <= 16 * 100  # a load and an addition at least
    if machine != wasm.MACHINE:
        assert loaded[2] - loaded[0] == 8 * 100


@pytest.mark.skipif(not same_architecture(all_targets()["x86-64-v2"]), reason="x86-64 only")
def test_native_steps_are_counted() -> None:
    target = all_targets()["x86-64-v2"]
    counts = []
    for n in (3, 103):
        numbers = np.zeros(200, np.int64)
        launch = ([numbers, n, 1.5], 1)
        count = count_instructions("sum_up", sum_up(target), target, "", [launch])
        counts.append(count.instructions)
    assert 1 * 100 <= counts[1] - counts[0] <= 8 * 100  # an addition from memory at least


@pytest.mark.parametrize(("target_name", "machine"), FIRST)
def test_code_that_llvm_gives_up_on_is_an_error_with_its_ir_kept(
    target_name: str, machine: str
) -> None:
    # Inline assembly needs an assembler for the target: without one LLVM ends the process.
    text = f"""
define void @{symbol_of("bad")}(ptr %args, i64 %thread, i64 %threads) {{
  call void asm sideeffect "nop", ""()
  ret void
}}
"""
    with pytest.raises(KernelError, match=r"bad.*its IR is in") as caught:
        backend.emit_object(text, FOREIGN[target_name], "bad")
    kept = Path(str(caught.value).rpartition("its IR is in ")[2])
    assert "asm sideeffect" in kept.read_text()
    kept.unlink()


def test_without_a_linker_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    linker.find_linker.cache_clear()
    try:
        with pytest.raises(KernelError, match="install Debian's package lld"):
            linker.find_linker()
        assert why_not("python3 -c pass") is not None
    finally:
        linker.find_linker.cache_clear()


@pytest.mark.parametrize(("target_name", "machine"), VECTORS)
def test_the_length_of_vectors_is_read(target_name: str, machine: str) -> None:
    target, name = FOREIGN[target_name], "vector_bytes"
    text = f"""
define internal i64 @read() noinline optnone align 16 \
prologue {constant_bytes(READ_BYTES)} {{
  unreachable
}}

define void @{symbol_of(name)}(ptr %args, i64 %thread, i64 %threads) {{
  %to = load ptr, ptr %args
  %n = call i64 @read()
  store i64 %n, ptr %to
  ret void
}}
"""
    found = np.zeros(1, np.int64)
    run(name, backend.emit_plain(text, target), target, machine, [([found], 1)])
    assert 8 * found[0] == int(machine.rpartition("vlen=")[2])


def test_instructions_on_register_groups_count_as_many() -> None:
    words = [
        0xCD127057,  # vsetivli zero, 4, e32, m2
        0x02C60457,  # vadd.vv v8, v12, v12
        0x02056407,  # vle32.v v8, (a0)
        0x02050407,  # vle8.v v8, (a0): a quarter of the bits, in half a register
        0x42802557,  # vmv.x.s a0, v8
        0x9E83B457,  # vmv8r.v v8, v8
        0x00000013,  # nop
    ]
    code = b"".join(word.to_bytes(4, "little") for word in words)
    assert list(lmul.costs(code).values()) == [1, 2, 2, 1, 1, 8, 1]


def test_where_ways_meet_the_larger_group_counts() -> None:
    words = [
        0xCD127057,  # vsetivli zero, 4, e32, m2
        0x00050463,  # beqz a0, 8
        0xCC207057,  # vsetivli zero, 0, e8, m4
        0x02C60457,  # vadd.vv v8, v12, v12
    ]
    code = b"".join(word.to_bytes(4, "little") for word in words)
    assert list(lmul.costs(code).values()) == [1, 1, 1, 4]


def test_vectors_of_unknown_type_cannot_be_counted() -> None:
    with pytest.raises(KernelError, match="offset 0x0"):
        lmul.costs((0x02C60457).to_bytes(4, "little"))
