"""Channels of networks in another order: the same outputs, and less lost by pruning groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import FLOAT, model_of

from headrace.networks.compression.pruning import prune, staying
from headrace.networks.compression.rearrangement import grouped, rearrange
from headrace.networks.compression.sparse_layers import sparse_layers


def network(rng: np.random.Generator, *, hidden: str = "Relu") -> Any:
    """Two inverted residuals with a sum and a gate, a 3x3 convolution, a mean and a classifier."""
    constants: dict[str, np.ndarray] = {"two": np.float32(2)}
    nodes: list[Any] = []

    def conv(x: str, y: str, *shape: int, **more: Any) -> str:
        # Channels of very different sizes, and inputs that matter to few of them.
        sizes = rng.lognormal(0, 1, (shape[0], 1, 1, 1)) * rng.lognormal(0, 1, (*shape[:2], 1, 1))
        w = rng.standard_normal(shape) * sizes * float(np.prod(shape[1:])) ** -0.5
        constants[f"{y}w"] = w.astype(np.float32)
        constants[f"{y}b"] = rng.standard_normal(shape[0], np.float32)
        nodes.append(helper.make_node("Conv", [x, f"{y}w", f"{y}b"], [y], **more))
        return y

    def apply(op: str, inputs: list[str], y: str, **more: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [y], **more))
        return y

    x = apply("Relu", [conv("x", "stem", 24, 3, 3, 3, pads=[1] * 4)], "stem_r")
    for i in range(2):
        y = apply(hidden, [conv(x, f"e{i}", 40, 24, 1, 1)], f"e{i}_r")
        y = conv(y, f"d{i}", 40, 1, 3, 3, pads=[1] * 4, group=40)
        mean = apply("GlobalAveragePool", [y], f"m{i}")
        gate = apply("Sigmoid", [conv(mean, f"g{i}", 40, 40, 1, 1)], f"g{i}_s")
        y = apply("Mul", [y, gate], f"d{i}_g")
        y = apply("Mul", [conv(y, f"p{i}", 24, 40, 1, 1), "two"], f"p{i}_2")
        x = apply("Add", [x, y], f"s{i}")
    x = apply("Relu", [conv(x, "last", 36, 24, 3, 3)], "last_r")
    x = apply("Flatten", [apply("GlobalAveragePool", [x], "mean")], "flat")
    constants["classes"] = rng.standard_normal((18, 36), np.float32)
    apply("Gemm", [x, "classes"], "y", transB=1)
    model = model_of(nodes, {"x": (FLOAT, [1, 3, 12, 12])}, ["y", "s0"], constants)
    return onnx.shape_inference.infer_shapes(model)


def run(model: Any, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


def rearranged(model: Any, rows: int) -> int:
    layers = sparse_layers(model)
    return rearrange(model, layers, [np.square(one.matrix()) for one in layers], rows, 0.5)


def moved(model: Any, other: Any) -> set[str]:
    """Constants that are not as they were."""
    return {
        one.name
        for one, was in zip(model.graph.initializer, other.graph.initializer, strict=True)
        if not np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(was))
    }


@pytest.mark.parametrize("rows", [4, 16])
def test_the_dense_network_gives_what_it_gave(rows: int) -> None:
    rng = np.random.default_rng(rows)
    model, x = network(rng), rng.standard_normal((1, 3, 12, 12), np.float32)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    assert rearranged(model, rows) == 2  # e0 to g0, and e1 to g1
    names = {f"{name}{i}{of}" for name in "edg" for i in (0, 1) for of in "wb"}
    # What "s0" has is wanted outside, and is what the sums and the stem have.
    assert moved(model, other) == names | {"p0w", "p1w"}
    for one, was in zip(run(model, x), run(other, x), strict=True):
        np.testing.assert_allclose(one, was, rtol=1e-4, atol=1e-4 * float(np.abs(was).max()))


def test_sums_have_one_order() -> None:
    rng = np.random.default_rng(7)
    model, x = network(rng), rng.standard_normal((1, 3, 12, 12), np.float32)
    del model.graph.output[1]
    other = onnx.ModelProto()
    other.CopyFrom(model)
    assert rearranged(model, 4) == 3
    assert {"stemw", "stemb", "p0w", "p0b", "p1b", "lastw", "e0w"} <= moved(model, other)
    assert not {"lastb", "classes", "two"} & moved(model, other)  # nothing of them is pruned
    for one, was in zip(run(model, x), run(other, x), strict=True):
        np.testing.assert_allclose(one, was, rtol=1e-4, atol=1e-4 * float(np.abs(was).max()))


def test_what_is_not_known_keeps_its_order() -> None:
    model = network(np.random.default_rng(1), hidden="Softmax")
    other = onnx.ModelProto()
    other.CopyFrom(model)
    assert rearranged(model, 4) == 0
    assert not moved(model, other)


@pytest.mark.parametrize(("rows", "sparsity"), [(4, 0.3), (4, 0.7), (16, 0.3)])
def test_less_is_lost(rows: int, sparsity: float) -> None:
    rng = np.random.default_rng(3)
    scores = [
        np.square(rng.standard_normal((70, n)) * rng.lognormal(0, 1, (70, 1))).astype(np.float32)
        for n in (30, 50)
    ]
    order = grouped(scores, rows, sparsity)
    assert sorted(order) == list(range(70))

    def lost(of: np.ndarray) -> float:
        return float((of * ~staying(of, rows, sparsity)).sum() / of.sum())

    before, after = (sum(lost(one[o]) for one in scores) for o in (np.arange(70), order))
    assert after < 0.8 * before
    by_size = np.argsort(-sum(one.sum(axis=1) / one.mean() for one in scores), kind="stable")
    assert after < sum(lost(one[by_size]) for one in scores)


def test_pruning_puts_channels_in_order_first() -> None:
    rng = np.random.default_rng(5)
    model = network(rng)
    before = {one.node.name or one.node.output[0]: one.matrix() for one in sparse_layers(model)}
    layers = prune(model, 0.5, 16, None)
    kept = {one.node.output[0]: float(np.square(one.matrix()).sum()) for one in layers}
    plain = {
        name: float((np.square(w) * staying(np.square(w), 16, 0.5)).sum())
        for name, w in before.items()
    }
    assert sum(kept.values()) > 1.02 * sum(plain[name] for name in kept)
