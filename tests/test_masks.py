"""Masks of attention made by kernels of ours, against onnxruntime; which are left to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx_encoders import LEAST, Builder, attention
from onnx_models import FLOAT, model_of
from test_native_networks import reference

from headrace.networks.network import Network, network_of

WIDTH, HEADS, KEYS = 32, 2, 21
BOOL, INT32, INT64 = TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64
DTYPES = {BOOL: np.bool_, INT32: np.int32, INT64: np.int64, TensorProto.UINT8: np.uint8}
Mask = Callable[[Builder], str]


def _spread(b: Builder, name: str) -> str:
    return b.add("Unsqueeze", b.add("Unsqueeze", name, b.put([1], np.int64)), b.put([2], np.int64))


def _product(b: Builder) -> str:
    there = b.add("Cast", _spread(b, "mask"), to=FLOAT)
    return b.add("Mul", b.put(-10000), b.add("Sub", b.put(1), there))


def _product_later_spread(b: Builder) -> str:
    absent = b.add("Sub", b.put([1]), b.add("Cast", "mask", to=FLOAT))
    return _spread(b, b.add("Mul", absent, b.put(-0.3)))


def _choice(b: Builder) -> str:
    there = b.add("Cast", _spread(b, "mask"), to=BOOL)
    return b.add("Where", there, b.put(0.25), b.put(-np.inf))


def _filled(b: Builder) -> str:
    """As `transformers` has it: spread over queries first."""
    sizes = b.put([1, 1, KEYS, 1], np.int64)
    there = b.add("Cast", b.add("Expand", _spread(b, "mask"), sizes), to=FLOAT)
    absent = b.add("Sub", b.put(1), there)
    return b.add("Where", b.add("Cast", absent, to=BOOL), b.put(LEAST), absent)


def _low_halves(b: Builder) -> str:
    return b.add("Where", b.add("Cast", _spread(b, b.add("Cast", "mask", to=INT32)), to=BOOL),
                 b.put(0), b.put(-5))  # fmt: skip


def _of_integers(b: Builder) -> str:
    absent = b.add("Sub", b.put(1, DTYPES[INT64]), _spread(b, "mask"))  # by the host
    return b.add("Mul", b.add("Cast", absent, to=FLOAT), b.put(-10000))


MASKS: tuple[Mask, ...] = (
    _product, _product_later_spread, _choice, _filled, _low_halves, _of_integers,
)  # fmt: skip


def _model(mask: Mask, elem_type: int, rank: int = 2) -> Any:
    b = Builder(np.random.default_rng(5))
    attention(b, "x", mask(b), HEADS, WIDTH, "new")
    b.nodes[-1].output[0] = "y"
    sizes = ["batch", KEYS] if rank == 2 else [KEYS, KEYS]
    inputs = {"x": (FLOAT, ["batch", KEYS, WIDTH]), "mask": (elem_type, sizes)}
    return model_of(b.nodes, inputs, ["y"], b.constants, opset=17)


def _inputs(batch: int, elem_type: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    mask = rng.integers(0, 2, (batch, KEYS)).astype(DTYPES[elem_type])
    mask[:, 3] = 1
    if elem_type == INT64:
        mask[0, :3] = 1 << 32, -1, (1 << 32) + 1
    if elem_type in (INT32, TensorProto.UINT8):
        mask[-1, :2] = 7, 2
    x = rng.standard_normal((batch, KEYS, WIDTH)).astype(np.float32)
    return {"x": x, "mask": mask}


def _kernels(network: Network, inputs: dict[str, np.ndarray]) -> set[str]:
    return {one.kernel for run in network.plan(inputs).natives for one in run.operations}


@pytest.mark.parametrize("elem_type", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_exporters_write(mask: Mask, elem_type: int) -> None:
    if mask in (_low_halves, _of_integers) and elem_type != INT64:
        pytest.skip("it is of int64")
    model = _model(mask, elem_type)
    with network_of(model, threads=2) as network:
        for batch in (1, 3):
            inputs = _inputs(batch, elem_type)
            kinds = [one.ours for one in network.plan(inputs).regions]
            assert kinds == ([False, True] if mask is _of_integers else [True])
            assert "rows_of_mask" in _kernels(network, inputs)
            # Sums of up to 32 terms of about 1; scores of up to 5.
            found, expected = network(inputs)["y"], reference(model, inputs)["y"]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def _of_queries(b: Builder) -> str:
    there = b.add("Cast", b.add("Unsqueeze", "mask", b.put([0, 1], np.int64)), to=FLOAT)
    return b.add("Mul", b.add("Sub", b.put(1), there), b.put(-3))


def _turned(b: Builder) -> str:
    """Spread over queries, then turned: one number for each query."""
    spread = b.add("Expand", _spread(b, "mask"), b.put([1, 1, KEYS, 1], np.int64))
    there = b.add("Cast", b.add("Transpose", spread, perm=[0, 1, 3, 2]), to=FLOAT)
    return b.add("Mul", b.add("Sub", b.put(1), there), b.put(-3))


@pytest.mark.parametrize("mask", [_of_queries, _turned])
def test_masks_that_the_host_makes(mask: Mask) -> None:
    model = _model(mask, INT32, 3 if mask is _of_queries else 2)
    with network_of(model, threads=2) as network:
        for batch in (1, KEYS):  # of which the latter has as many elements as one of queries
            inputs = _inputs(batch, INT32)
            if mask is _of_queries:
                inputs["mask"] = _inputs(KEYS, INT32)["mask"]
            assert "rows_of_mask" not in _kernels(network, inputs)
            found, expected = network(inputs)["y"], reference(model, inputs)["y"]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
