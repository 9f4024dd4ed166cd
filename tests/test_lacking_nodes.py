"""Nodes without inputs or outputs that they should have are refused, whatever the operator."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of

from headrace.errors import HeadraceError
from headrace.networks.network import network_of

OPERATORS = sorted({one.name for one in onnx.defs.get_all_schemas() if not one.domain})
INPUTS = ([], [""], ["x"], ["w"], ["x", "", "w"])
OUTPUTS = (["y"], ["y", "z"], [""])


@pytest.mark.parametrize("first", range(8))
def test_nodes_that_lack_something(first: int) -> None:
    x = np.ones((1, 4, 4, 4), np.float32)
    for op, given, made in product(OPERATORS[first::8], INPUTS, OUTPUTS):
        nodes = [
            helper.make_node("Relu", ["x"], ["r"]), helper.make_node(op, given, made),
            helper.make_node("Relu", ["y" if "y" in made else "r"], ["o"]),
        ]  # fmt: skip
        constants = {"w": np.ones((4, 4, 1, 1), np.float32)}
        model = model_of(nodes, {"x": (FLOAT, [1, 4, 4, 4])}, ["o"], constants, opset=17)
        try:
            with network_of(model, threads=1) as network:
                assert set(network({"x": x})) == {"o"}
        except HeadraceError as error:
            assert str(error)
