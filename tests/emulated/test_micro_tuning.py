"""Tiles and blocks of training steps, chosen by counted instructions within a chip's memories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_micro_half import Layers
from training_networks import NETS, TARGETS, everything, inputs_of, memory_of

from headrace.errors import BudgetError, UnsupportedError
from headrace.micro.autotune import Costs, argument_block, tuned_step
from headrace.micro.half import machine
from headrace.micro.half.machine import LINES_OF
from headrace.micro.kernels import matmul
from headrace.micro.kernels.table import kernel_table
from headrace.micro.learning import Learning, Trained, last_layers, with_weights
from headrace.micro.lowered import At, Step
from headrace.micro.network import Windows
from headrace.micro.stack import stack_bytes
from headrace.micro.training import TrainingStep, training_step
from headrace.micro.tuned import tuned_plan
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import count_instructions, plugin
from headrace.targets.emulation.machines import why_not


def test_a_few_lines_tell_what_all_cost() -> None:
    """Counts of whole calls, and those that are made of counts of some lines."""
    network, target = NETS["pools"](), TARGETS["cortex-m55"]
    if (reason := why_not(target.machines[0])) or plugin() is None:
        pytest.skip(reason or "no C compiler to build the counting plugin with")
    step = training_step(network, target, Learning(everything(network), 0.1))
    calls: dict[str, Step] = {}
    for of in ("matmul_half", "depthwise_half", "depthwise_gradient_half", "pad_half", "turn_half"):
        calls[of] = max(
            (one for one in step.steps if one.kernel == of), key=lambda one: one.slots[LINES_OF[of]]
        )
    long = matmul.Product(At("a"), At("b"), At("c"), At("d"), 61, 5, 16, 10, 2, 32, 32)
    calls["rows"] = Step(matmul.NAME, long.slots)
    costs = Costs(target)
    for one in calls.values():
        launch = [(argument_block(one), 1)]
        code = KernelStore(target).objects([kernel_table()[one.kernel]])[one.kernel]
        whole = count_instructions(one.kernel, code, target, target.machines[0], launch)
        assert costs.instructions(one) == whole.instructions, one


def test_tuning_stays_within_fast_memory() -> None:
    of = Layers(8, 8, 16).convolution(64, Windows((3, 3), pads=(1, 1)), 1)
    of.pool("mean", Windows((8, 8))).convolution(4, Windows())
    network, target = of.network(), TARGETS["cortex-m55"]
    if (reason := why_not(target.machines[0])) or plugin() is None:
        pytest.skip(reason or "no C compiler to build the counting plugin with")
    first = with_weights(network)[-1].name
    how = Learning({first: Trained()}, 0.1)
    plain_step, most = training_step(network, target, how), 20_000
    assert max(map(machine.touched_bytes, plain_step.steps)) > most
    tuned, costs = tuned_step(network, target, how, fast_bytes=most), Costs(target)
    assert max(map(machine.touched_bytes, tuned.steps)) <= most

    def total(step: TrainingStep) -> int:
        return sum(costs.instructions(one) for one in step.steps if machine.operands_of(one))

    blocks = {one.kernel for one in tuned.steps if one.kernel.startswith("matmul")}
    assert blocks - {matmul.NAME}
    assert total(tuned) < 1.05 * total(plain_step)
    x, wanted = inputs_of(network, np.float16)
    results = []
    for step in (plain_step, tuned):
        memory = memory_of(step, x, wanted)
        machine.run(step.steps, target, memory)
        results.append({name: memory[name].tobytes() for name in step.state})
    assert results[0] == results[1]
    with pytest.raises(UnsupportedError, match="smallest tile takes"):
        tuned_step(network, target, how, fast_bytes=100)


def test_the_tuner_stays_within_sram(tmp_path: Any, monkeypatch: Any) -> None:
    of = Layers(25, 5, 64).depthwise(Windows((3, 3), pads=(1, 1)), 1)
    of.pool("mean", Windows((25, 5))).convolution(4, Windows())
    network, target = of.network(), TARGETS["cortex-m55"]
    if (reason := why_not(target.machines[0])) or plugin() is None:
        pytest.skip(reason or "no C compiler to build the counting plugin with")
    how = Learning(last_layers(network, 1), 0.1, 0.9)
    fastest = tuned_plan(network, target, how).plan
    taken = fastest.program.arena_bytes + stack_bytes(fastest.program)
    with pytest.raises(BudgetError, match="does not learn in") as raised:
        tuned_plan(network, target, how, taken // 2)
    least = raised.value.needed_bytes
    assert taken // 2 < least < taken
    smaller = tuned_plan(network, target, how, least).plan
    assert smaller.program.arena_bytes + stack_bytes(smaller.program) <= least

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr("headrace.micro.tuned.Tuner", never)
    assert tuned_plan(network, target, how, least).plan.program == smaller.program
    monkeypatch.setattr("headrace.micro.tuned.why_not", lambda _: "no emulator")
    found = tuned_plan(network, target, how)
    assert found.not_counted == "no emulator" and found.plan.program.functions
