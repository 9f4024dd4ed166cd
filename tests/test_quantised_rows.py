"""Rows of tables of bytes, dequantised before they are taken or behind that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_models import model_of
from test_encoders import native
from test_native_operators import node
from test_quantised_networks import onnxruntimes

from headrace.errors import HeadraceError
from headrace.networks.network import network_of

INT64 = 7
ENTRIES = 9


def embedding(
    order: str, dtype: Any, width: int = 20, zero: int | None = None, axis: int = 0
) -> Any:
    """Rows of a table times weights: [n, 6] ids to [n, 6, 24]."""
    rng = np.random.default_rng(width)
    limits = np.iinfo(dtype)
    table = rng.integers(limits.min, limits.max + 1, (ENTRIES, width)).astype(dtype)
    table[0, :2] = limits.min, limits.max
    constants: dict[str, Any] = {
        "table": table, "scale": np.float32(0.0123),
        "w": rng.standard_normal((width, 24)).astype(np.float32),
    }  # fmt: skip
    by = "scale"
    if zero is not None:
        constants["zero"] = np.array(zero, dtype)
        by += " zero"
    if order == "dequantised first":
        nodes = [
            node("DequantizeLinear", f"table {by}", "floats"),
            node("Gather", "floats ids", "rows", axis=axis),
        ]
    else:
        nodes = [
            node("Gather", "table ids", "codes", axis=axis),
            node("DequantizeLinear", f"codes {by}", "rows"),
        ]
    nodes += [node("Relu", "rows", "r"), node("MatMul", "r w", "y")]
    return model_of(nodes, {"ids": (INT64, ["n", 6])}, ["y", "rows"], constants, opset=13)


@pytest.mark.parametrize("order", ["dequantised first", "taken first"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(("width", "zero", "axis"), [(32, None, 0), (20, 100, -2), (5, 0, 0)])
def test_rows_are_those_of_the_file(
    order: str, dtype: Any, width: int, zero: int | None, axis: int
) -> None:
    model = embedding(order, dtype, width, zero, axis)
    rng = np.random.default_rng(2)
    with network_of(model, threads=2) as network:
        for n in (1, 3):
            ids = rng.integers(-ENTRIES, ENTRIES, (n, 6))
            ids[0, :2] = 0, -ENTRIES
            (region,) = native(network, {"ids": ids})
            assert region.operations[0].kernel == "rows_byte_gather"
            right = onnxruntimes(model, {"ids": ids}, optimised=False)
            found = network({"ids": ids})
            # Up to 32 terms of up to 3 times 3, summed in another order.
            np.testing.assert_allclose(found["y"], right, rtol=1e-5, atol=1e-4)
            codes = network_table(model)[ids].astype(np.int32) - (zero or 0)
            np.testing.assert_array_equal(
                found["rows"], codes.astype(np.float32) * np.float32(0.0123)
            )
        ids[-1, -1] = ENTRIES
        with pytest.raises(HeadraceError, match=str(ENTRIES)):
            network({"ids": ids})


def network_table(model: Any) -> np.ndarray:
    """The table as the file has it."""
    from onnx import numpy_helper

    found: np.ndarray = numpy_helper.to_array(
        next(one for one in model.graph.initializer if one.name == "table")
    )
    return found


@pytest.mark.parametrize("change", ["columns", "a scale for each column", "a scale that is read"])
def test_what_is_no_table_of_rows_is_not_changed(change: str) -> None:
    rng = np.random.default_rng(4)
    constants: dict[str, Any] = {
        "table": rng.integers(-128, 128, (ENTRIES, ENTRIES)).astype(np.int8),
        "scale": np.float32(0.02), "w": rng.standard_normal((ENTRIES, 24)).astype(np.float32),
    }  # fmt: skip
    shapes: dict[str, Any] = {"ids": (INT64, [6])}
    inputs: dict[str, np.ndarray] = {"ids": rng.integers(-ENTRIES, ENTRIES, 6)}
    if change == "a scale for each column":
        constants["scale"] = rng.uniform(0.01, 0.02, ENTRIES).astype(np.float32)
    if change == "a scale that is read":
        inputs["scale"] = np.array([constants.pop("scale")]).reshape(())
        shapes["scale"] = (1, [])
    nodes = [
        node("Gather", "table ids", "codes", axis=int(change == "columns")),
        node("DequantizeLinear", "codes scale", "rows"),
        node("Transpose", "rows", "turned", perm=[1, 0] if change == "columns" else [0, 1]),
    ]
    back = "turned"
    if change == "columns":
        nodes.append(node("Transpose", "turned", "back", perm=[1, 0]))
        constants["w"], back = constants["w"][:6], "back"
    nodes.append(node("MatMul", f"{back} w", "y"))
    model = model_of(nodes, shapes, ["y"], constants, opset=13)
    right = onnxruntimes(model, inputs, optimised=False)
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network(inputs)["y"], right, rtol=1e-5, atol=1e-4)
