"""Random networks on emulated microcontrollers, bit for bit what numpy says they compute."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from onnx_models import save
from random_micro_networks import quantised, random_network

from headrace.micro.arithmetic import computed
from headrace.micro.emulate import Emulated
from headrace.micro.plan import plan_network
from headrace.micro.ports import to_chip
from headrace.micro.reading import read_network
from headrace.micro.stack import stack_bytes
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import microcontrollers

CHIPS = microcontrollers()


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(i, marks=pytest.mark.slow) for i in range(3, 40))]
)
@pytest.mark.parametrize("chip", ["cortex-m4f", "cortex-m55", "rv32-zvfh"])
@pytest.mark.parametrize("numbers", ["halves", "codes"])
def test_a_chip_gives_what_numpy_does(numbers: str, chip: str, seed: int, tmp_path: Path) -> None:
    target = CHIPS[chip]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    pick = random.Random(seed).choice
    model, x = random_network(pick, seed, norms=numbers == "halves")
    if numbers == "codes":
        model = quantised(model, x, pick)
    network = read_network(save(model, tmp_path / "x.onnx"))
    given = to_chip(network, {"x": x})
    plan = plan_network(network, target)
    program = Emulated(plan.program, tmp_path)
    expected = computed(network, target, given)
    (found,) = program.run([given])
    for name, value in found.items():
        assert value.tobytes() == expected[name].tobytes()
    used = program.used(given)
    assert used.arena_bytes <= plan.arena_bytes and used.stack_bytes <= stack_bytes(plan.program)
