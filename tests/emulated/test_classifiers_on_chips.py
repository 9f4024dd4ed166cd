"""Classifiers whose codes and numbers run in one network, on emulated chips beside numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_classifiers import CLASSIFIERS, quantised, samples_of

from headrace.micro.arithmetic import computed
from headrace.micro.choice import plan_within
from headrace.micro.emulate import Emulated
from headrace.micro.packing import ALIGNED
from headrace.micro.plan import plan_network
from headrace.micro.ports import to_chip
from headrace.micro.reading import read_network
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import microcontrollers

CHIPS = microcontrollers()
CASES = [
    ("normed", "compressed", "cortex-m55"),
    ("joined", "compressed", "cortex-m4f"),
    ("gated", "compressed", "rv32-zvfh"),
    ("rows", "compressed", "cortex-m3"),
    ("joined", "signed", "cortex-m3"),
    ("joined", "floats", "cortex-m55"),
]


@pytest.mark.parametrize(("name", "way", "chip"), CASES)
def test_a_classifier_bit_for_bit(name: str, way: str, chip: str, tmp_path: Path) -> None:
    target = CHIPS[chip]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    network = read_network(quantised(name, way, tmp_path))
    plan = plan_network(network, target)
    runs = [to_chip(network, {"x": x}) for x in samples_of(CLASSIFIERS[name](), 2, 5)]
    program = Emulated(plan.program, tmp_path)
    for given, found in zip(runs, program.run(runs), strict=True):
        expected = computed(network, target, given)
        for one, value in found.items():
            assert value.dtype == expected[one].dtype
            assert value.tobytes() == expected[one].tobytes()
            assert np.isfinite(value.astype(np.float64)).all() and value.any()
    used = program.used(runs[0]).arena_bytes
    assert plan.arena_bytes - ALIGNED <= used <= plan.arena_bytes


def test_rows_of_codes_and_numbers(tmp_path: Path) -> None:
    target = CHIPS["cortex-m55"]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    network = read_network(quantised("normed", "compressed", tmp_path))
    plan = plan_within(network, target, plan_network(network, target).arena_bytes // 2)
    assert plan.by_rows
    given = to_chip(network, {"x": samples_of(CLASSIFIERS["normed"](), 1, 5)[0]})
    (found,) = Emulated(plan.program, tmp_path).run([given])
    expected = computed(network, target, given)
    assert all(value.tobytes() == expected[name].tobytes() for name, value in found.items())
