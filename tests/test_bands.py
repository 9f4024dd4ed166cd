"""Large images that run band by band: the same bits as layer by layer, in less memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of

from headrace.kernels.sparse_product import sparse_weights
from headrace.networks.network import network_of
from headrace.networks.passes import bands


def inverted_residuals(rng: np.random.Generator, size: int, zeros: float) -> Any:
    """A stem and three blocks, with strides, other taps and a sum, of images of such a size."""
    constants: dict[str, np.ndarray] = {}
    nodes = []

    def conv(x: str, y: str, shape: tuple[int, ...], clip: bool = True, **more: Any) -> str:
        pointwise = shape[1:] == (shape[1], 1, 1) and shape[1] > 3
        w = rng.standard_normal(shape, np.float32) * float(np.prod(shape[1:])) ** -0.5
        if pointwise:
            w = sparse_weights(rng, shape[:2], 4, 1 - zeros).reshape(shape)
        constants[f"{y}w"], constants[f"{y}b"] = w, rng.standard_normal(shape[0], np.float32)
        nodes.append(helper.make_node("Conv", [x, f"{y}w", f"{y}b"], [f"{y}c"], **more))
        if clip:
            nodes.append(helper.make_node("Relu", [f"{y}c"], [y]))
        else:
            nodes[-1].output[0] = y
        return y

    x = conv("x", "stem", (20, 3, 3, 3), pads=[1] * 4)
    for i, (taps, stride, channels) in enumerate(((3, 1, 20), (5, 2, 24), (3, 1, 24))):
        read = 20 if i < 2 else 24
        y = conv(x, f"e{i}", (40, read, 1, 1))
        pads = [taps // 2] * 4
        y = conv(y, f"d{i}", (40, 1, taps, taps), strides=[stride] * 2, pads=pads, group=40)
        y = conv(y, f"p{i}", (channels, 40, 1, 1), clip=False)
        if i == 0:
            nodes.append(helper.make_node("Add", [x, y], ["s0"]))
            y = "s0"
        x = y
    inputs = {"x": (FLOAT, [1, 3, size, size + 5])}
    return model_of(nodes, inputs, [x], constants)


def run(model: Any, x: np.ndarray, threads: int) -> tuple[np.ndarray, int, int]:
    """Its output, its operations and its arena."""
    with network_of(model, threads=threads) as network:
        (y,) = network({"x": x}).values()
        (native,) = network.plan({"x": x}).natives
        return y, len(native.operations), native.arena_bytes


@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_bands_change_no_bit(monkeypatch: pytest.MonkeyPatch, zeros: float) -> None:
    rng = np.random.default_rng(1)
    model = inverted_residuals(rng, 90, zeros)
    x = rng.standard_normal((1, 3, 90, 95)).astype(np.float32)
    found = [run(model, x, threads) for threads in (1, 3)]
    for far, near in ((1 << 60, 0), (4096, 400_000), (4096, 1)):  # none, some, one row each
        monkeypatch.setattr(bands, "FAR", far)
        monkeypatch.setattr(bands, "NEAR", near)
        found.append(run(model, x, 2))
    whole, some, rows = found[2:]
    for one in found:
        np.testing.assert_array_equal(one[0], whole[0])
    assert whole[1] < found[0][1] < some[1] < rows[1]
    assert rows[2] < some[2] < found[0][2] < whole[2]


def test_what_others_read_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    model = inverted_residuals(rng, 20, 0)
    x = rng.standard_normal((1, 3, 20, 25)).astype(np.float32)
    model.graph.output.append(helper.make_tensor_value_info("e1", FLOAT, [1, 40, 20, 25]))
    with network_of(model) as network:
        expected = network({"x": x})
    monkeypatch.setattr(bands, "FAR", 4096)
    monkeypatch.setattr(bands, "NEAR", 8192)
    with network_of(model) as network:
        found = network({"x": x})
        plan = network.plan({"x": x})
        (native,) = plan.natives
        made = [one.makes for one in native.operations]
    assert any(name.startswith("d0/") for name in made)  # parts of it
    assert not any(name.startswith("e1/") for name in made)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
