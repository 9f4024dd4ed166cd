"""Values whose sizes nobody knows before stay within `memory`, or what is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import FLOAT, INT64, model_of, save

from headrace.errors import BudgetError, HeadraceError
from headrace.networks.network import load_network, network_of

ROOM = 30_000_000


def _doubling(times: int) -> Any:
    """A Loop that lays what it has behind itself."""
    nodes = [
        helper.make_node("Identity", ["go"], ["on"]),
        helper.make_node("Concat", ["v", "v"], ["twice"], axis=0),
    ]
    value = helper.make_tensor_value_info
    given = [value("i", INT64, []), value("go", TensorProto.BOOL, []), value("v", FLOAT, None)]
    made = [value("on", TensorProto.BOOL, None), value("twice", FLOAT, None)]
    body = helper.make_graph(nodes, "body", given, made)
    loop = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)
    return model_of([loop], {"x": (FLOAT, [2, 3])}, ["y"], {"times": np.array(times)})


def test_loops() -> None:
    x = np.ones((2, 3), np.float32)
    with network_of(_doubling(60), memory=ROOM) as network:
        for _ in range(2):
            with pytest.raises(HeadraceError, match=r"Loop y: values become larger than .*memory"):
                network({"x": x})
    with network_of(_doubling(5), memory=ROOM) as network:
        assert network({"x": x})["y"].shape == (64, 3)


def test_numbers_that_are_no_arrays() -> None:
    model = _doubling(3)
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("times", INT64, []))
    inputs = {"x": np.ones((2, 3), np.float32), "times": np.int64(2)}
    with network_of(model) as network:
        assert network(inputs)["y"].shape == (8, 3)
        assert network.plan(inputs) is network.plan({**inputs, "times": np.array(4)})


def test_lengths_that_inputs_say() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["end"], keepdims=0),
        helper.make_node("Range", ["begin", "end", "step"], ["r"]),
        helper.make_node("ReduceSum", ["r"], ["y"], keepdims=0),
    ]
    constants = {"begin": np.float32(0), "step": np.float32(1)}
    model = model_of(nodes, {"x": (FLOAT, [2])}, ["y"], constants)
    with network_of(model, memory=ROOM) as network:
        assert network({"x": np.array([3, 5], np.float32)})["y"] == 10
        with pytest.raises(HeadraceError, match="values become larger"):
            network({"x": np.array([3, 1e9], np.float32)})
        assert network({"x": np.array([3, 5], np.float32)})["y"] == 10


def test_memory_that_changes_meanwhile() -> None:
    x = np.ones((2, 3), np.float32)
    with network_of(_doubling(20), memory=ROOM) as network:
        for memory, fits in ((ROOM, False), (10 * ROOM, True), (ROOM, False)):
            network.memory = memory
            if fits:
                assert network({"x": x})["y"].shape == (2**21, 3)
                continue
            with pytest.raises(HeadraceError, match="values become larger"):
                network({"x": x})


@pytest.mark.parametrize("first", ["ConstantOfShape", "Shape"])
def test_constants_that_are_laid_behind_themselves(first: str) -> None:
    made = [helper.make_node(first, ["s" if first == "ConstantOfShape" else "x"], ["c0"])]
    made += [
        helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(36)
    ]
    made += [
        helper.make_node("ReduceSum", ["c36"], ["d"], keepdims=0),
        helper.make_node("Cast", ["d"], ["e"], to=FLOAT),
        helper.make_node("Add", ["x", "e"], ["y"]),
    ]  # fmt: skip
    model = model_of(made, {"x": (FLOAT, [2, 3])}, ["y"], {"s": np.array([4])})
    with network_of(model) as network, pytest.raises(BudgetError, match="does not fit"):
        network({"x": np.ones((2, 3), np.float32)})


def test_weights_that_are_larger_than_memory(tmp_path: Path) -> None:
    """Of a sparse file beside the model, which takes no room on the disk."""
    weight = TensorProto(name="w", data_type=FLOAT, dims=(2**40,))
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("length", str(4 * 2**40))):
        weight.external_data.add(key=key, value=value)
    try:
        with open(tmp_path / "w.bin", "wb") as file:
            file.truncate(4 * 2**40)
    except OSError:
        pytest.skip("the file system has no such large files")
    add = helper.make_node("Add", ["x", "w"], ["y"])
    model = model_of([add], {"x": (FLOAT, [1])}, ["y"])
    model.graph.initializer.append(weight)
    path = save(model, tmp_path / "m.onnx")
    assert onnx.load(path, load_external_data=False).graph.initializer
    with load_network(path) as network, pytest.raises(BudgetError, match=r"are free: .*Add y"):
        network({"x": np.ones(1, np.float32)})
