"""Random networks on emulated microcontrollers, bit for bit what numpy says they compute."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of, save
from random_micro_networks import quantised, random_network

from headrace.errors import BudgetError
from headrace.micro.arithmetic import computed
from headrace.micro.choice import plan_within
from headrace.micro.emulate import Emulated
from headrace.micro.network import MicroNetwork
from headrace.micro.plan import MicroPlan, plan_network
from headrace.micro.ports import to_chip
from headrace.micro.reading import read_network
from headrace.micro.stack import stack_bytes
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import microcontrollers

CHIPS = microcontrollers()


of_both = pytest.mark.parametrize("numbers", ["halves", "codes"])


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(i, marks=pytest.mark.slow) for i in range(3, 40))]
)
@pytest.mark.parametrize("chip", ["cortex-m4f", "cortex-m55", "rv32-zvfh"])
@of_both
def test_a_chip_gives_what_numpy_does(numbers: str, chip: str, seed: int, tmp_path: Path) -> None:
    pick = random.Random(seed).choice
    model, x = random_network(pick, seed, norms=numbers == "halves")
    if numbers == "codes":
        model = quantised(model, x, pick)
    same_on(chip, model, x, tmp_path)


@pytest.mark.parametrize("pads", [(0, 0, 3, 0), (3, 0, 0, 0)], ids=["below", "above"])
@pytest.mark.parametrize("group", [1, 16])
@of_both
def test_windows_of_pads_alone(
    numbers: str, group: int, pads: tuple[int, ...], tmp_path: Path
) -> None:
    """Rows are so wide that few of them have a copy at a time."""
    rng = np.random.default_rng(group)
    weights, shape = rng.standard_normal((16, 16 // group, 2, 2)), (1, 16, 4, 600)
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=group, pads=pads, strides=[1, 3])
    constants = {"w": weights.astype(np.float32)}
    model = model_of([node], {"x": (FLOAT, shape)}, ["y"], constants)
    x = rng.standard_normal(shape).astype(np.float32)
    if numbers == "codes":
        model = quantised(model, x, random.Random(0).choice)
    same_on("cortex-m55", model, x, tmp_path)


def test_outputs_in_the_middle_within_the_least_memory(tmp_path: Path) -> None:
    """They stay to the end, so layers that make them do not run by rows with others."""
    rng = np.random.default_rng(1)
    shapes = {"wide": (9, 2, 3, 3), "narrow": (2, 9, 3, 3), "same": (2, 2, 3, 3)}
    constants = {name: rng.standard_normal(of).astype(np.float32) for name, of in shapes.items()}
    ways = ("x", "wide", "a"), ("a", "narrow", "b"), ("b", "same", "c"), ("b", "same", "y")
    nodes = [
        helper.make_node("Conv", [read, weights], [made], pads=[1, 1, 1, 1])
        for read, weights, made in ways
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 2, 16, 20])}, ["c", "y"], constants)
    network = read_network(save(model, tmp_path / "x.onnx"))
    target = CHIPS["cortex-m55"]
    with pytest.raises(BudgetError) as refused:
        plan_within(network, target, 1)
    plan = plan_within(network, target, refused.value.needed_bytes)
    assert plan.by_rows and plan.arena_bytes < plan_network(network, target).arena_bytes
    x = rng.standard_normal((1, 2, 16, 20)).astype(np.float32)
    same(network, plan, x, tmp_path)


def test_a_stack_of_a_few_bytes(tmp_path: Path) -> None:
    """Fewer than painting sees."""
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [1, 4])}, ["y"])
    x = np.random.default_rng(1).standard_normal((1, 4)).astype(np.float32)
    pick = random.Random(0).choice
    same_on("rv32-zvfh", quantised(model, x, pick), x, tmp_path)


def same_on(chip: str, model: Any, x: np.ndarray, tmp_path: Path) -> None:
    target = CHIPS[chip]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    network = read_network(save(model, tmp_path / "x.onnx"))
    same(network, plan_network(network, target), x, tmp_path)


def same(network: MicroNetwork, plan: MicroPlan, x: np.ndarray, tmp_path: Path) -> None:
    given = to_chip(network, {"x": x})
    program = Emulated(plan.program, tmp_path)
    expected = computed(network, plan.target, given)
    (found,) = program.run([given])
    for name, value in found.items():
        assert value.tobytes() == expected[name].tobytes()
    used = program.used(given)
    assert used.arena_bytes <= plan.arena_bytes and used.stack_bytes <= stack_bytes(plan.program)
