"""What only moves runs of channels is one copy: recurrent layers on top of each other, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of
from onnx_references import as_the_file_says, check_alone
from test_native_operators import node

from headrace.networks.network import network_of

GATES = {"LSTM": 4, "GRU": 3}


def _sigmoid(v: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        found: np.ndarray = 1 / (1 + np.exp(-v))
    return found


def recurrent(op: str, x: np.ndarray, w: Any, r: Any, b: Any) -> np.ndarray:
    """One layer in both directions [steps, batch, 2 x n], in float64, as ONNX says."""
    x, w, r, b = (a.astype(np.float64) for a in (x, w, r, b))
    n, gates = r.shape[2], GATES[op]
    y = np.zeros((*x.shape[:2], 2, n))
    for d in (0, 1):
        h, c = np.zeros((2, x.shape[1], n))
        for t in range(len(x))[:: -1 if d else 1]:
            of_x = (x[t] @ w[d].T + b[d, : gates * n]).reshape(-1, gates, n)
            of_h = (h @ r[d].T + b[d, gates * n :]).reshape(-1, gates, n)
            if op == "LSTM":
                i, o, f, g = (of_x + of_h).transpose(1, 0, 2)
                c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
                h = _sigmoid(o) * np.tanh(c)
            else:
                z, reset = (_sigmoid(of_x[:, k] + of_h[:, k]) for k in (0, 1))
                h = (1 - z) * np.tanh(of_x[:, 2] + reset * of_h[:, 2]) + z * h
            y[t, :, d] = h
    return y.reshape(*x.shape[:2], 2 * n)


class Stack:
    """Layers as PyTorch's exporters write them, with a product behind."""

    def __init__(self, op: str, layers: int, read: int, n: int, batch_first: bool) -> None:
        self.op, self.batch_first, self.n = op, batch_first, n
        rng = np.random.default_rng(layers + n)
        self.constants = {"o": self._of(rng, 2 * n, 11)}
        for i in range(layers):
            width, gates = 2 * n if i else read, GATES[op] * n
            self.constants |= {
                f"w{i}": self._of(rng, 2, gates, width), f"r{i}": self._of(rng, 2, gates, n),
                f"b{i}": self._of(rng, 2, 2 * gates),
            }  # fmt: skip
        self.layers = layers

    @staticmethod
    def _of(rng: np.random.Generator, *shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    def model(self, shape: tuple[int, ...], *, constant: bool) -> Any:
        """With shapes that the newer exporter has as constants, or with 0 and -1."""
        sizes = (shape[1], shape[0]) if self.batch_first else shape[:2]
        to = [*sizes, 2 * self.n] if constant else [0, 0, -1]
        constants = self.constants | {
            "shape": np.array(to), "h": np.zeros((2, sizes[1], self.n), np.float32)
        }  # fmt: skip
        nodes, x = [], "x"
        if self.batch_first:
            nodes, x = [node("Transpose", "x", "x0", perm=[1, 0, 2])], "x0"
        of = {"linear_before_reset": 1} if self.op == "GRU" else {}
        for i in range(self.layers):
            inputs = [x, f"w{i}", f"r{i}", f"b{i}", "", "h", *["h"][: self.op == "LSTM"]]
            nodes += [
                helper.make_node(
                    self.op, inputs, [f"y{i}"], hidden_size=self.n, direction="bidirectional", **of
                ),
                node("Transpose", f"y{i}", f"t{i}", perm=[0, 2, 1, 3]),
                node("Reshape", f"t{i} shape", f"s{i}"),
            ]
            x = f"s{i}"
        if self.batch_first:
            nodes.append(node("Transpose", x, "back", perm=[1, 0, 2]))
            x = "back"
        nodes.append(node("MatMul", f"{x} o"))
        return model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], constants, 17)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Of the values, not of the nodes."""
        x = x.swapaxes(0, 1) if self.batch_first else x
        for i in range(self.layers):
            x = recurrent(self.op, x, *(self.constants[f"{k}{i}"] for k in "wrb"))
        x = x.swapaxes(0, 1) if self.batch_first else x
        return x @ self.constants["o"].astype(np.float64)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("layers", "batch_first", "shape", "n"),
    [
        (2, True, (1, 13, 20), 32), (2, False, (9, 3, 16), 37), (3, True, (5, 7, 33), 20),
        (2, True, (2, 1, 5), 4), (2, False, (1, 6, 40), 48),
    ],
)  # fmt: skip
def test_stacked_layers(
    op: str, constant: bool, layers: int, batch_first: bool, shape: Any, n: int, tmp_path: Path
) -> None:
    stack = Stack(op, layers, shape[2], n, batch_first)
    x = np.random.default_rng(n).standard_normal(shape).astype(np.float32)
    x[0, 0, 0], x[-1, -1, -1] = 60, -60  # gates as far open as they get
    model = stack.model(shape, constant=constant)
    kernels = check_alone(model, {"x": x}, tmp_path, stack.reference(x), 2e-6 * layers)
    assert kernels.count("rows_take_runs") >= layers
    assert kernels.count(f"{op.lower()}_f32") == layers


def test_runs_that_are_too_short_are_left_alone() -> None:
    model = Stack("GRU", 2, 9, 3, True).model((7, 4, 9), constant=True)
    x = {"x": np.random.default_rng(0).standard_normal((7, 4, 9)).astype(np.float32)}
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network(x)["y"], as_the_file_says(model, x)[0], atol=2e-6)
        assert {on for on, _ in network.plan(x).where()} == {"onnxruntime"}
