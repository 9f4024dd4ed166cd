"""What only moves runs of channels is one copy: recurrent layers on top of each other, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
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


class Windows:
    """Attention in shifted windows of padded images, and a merger of pixels, as PyTorch writes it.

    Args:
        images: [batch, channels, rows, columns].
        exporter: how windows are masked and pixels merged: "timm" or "torchvision".
    """

    def __init__(self, images: tuple[int, ...], window: int, heads: int, exporter: str) -> None:
        self.images, self.window, self.heads, self.exporter = images, window, heads, exporter
        self.shift = window // 2
        rng = np.random.default_rng(sum(images))
        _, c, *sizes = images
        self.padded = [-(-n // window) * window for n in sizes]
        counts = [n // window for n in self.padded]
        self.counts, self.windows, tokens = counts, counts[0] * counts[1], window**2
        regions = np.zeros(self.padded)
        for i, down in enumerate(self._cuts(self.padded[0])):
            for j, across in enumerate(self._cuts(self.padded[1])):
                regions[down, across] = 3 * i + j
        apart = regions.reshape(counts[0], window, counts[1], window).swapaxes(1, 2)
        apart = apart.reshape(self.windows, 1, tokens)
        mask = np.where(apart != apart.swapaxes(1, 2), -100, 0)
        self.constants: dict[str, np.ndarray] = {
            "wqkv": rng.standard_normal((c, 3 * c)) * c**-0.5, "bqkv": rng.standard_normal(3 * c),
            "wo": rng.standard_normal((c, c)) * c**-0.5, "bo": rng.standard_normal(c),
            "wm": rng.standard_normal((4 * c, 2 * c)) * c**-0.5,
            "places": rng.standard_normal((1, heads, tokens, tokens)),
            "mask": mask[None, :, None], "scale": np.array((c // heads) ** -0.5),
            "lw": rng.standard_normal(c), "lb": rng.standard_normal(c),
        }  # fmt: skip
        self.constants = {name: a.astype(np.float32) for name, a in self.constants.items()}
        self.nodes: list[Any] = []

    def _cuts(self, n: int) -> list[slice]:
        first, last = n - self.window, n - self.shift
        return [slice(0, first), slice(first, last), slice(last, n)]

    def _whole(self, *numbers: int) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.array(numbers)
        return name

    def _add(self, op: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"v{len(self.nodes)}"], **attributes))
        return f"v{len(self.nodes) - 1}"

    def _slice(self, x: str, begin: int, end: int, axis: int, step: int = 1) -> str:
        return self._add("Slice", x, *(self._whole(n) for n in (begin, end, axis, step)))

    def _rolled(self, x: str, shift: int) -> str:
        for axis in (1, 2):
            size = self.padded[axis - 1]
            at = -shift % size
            parts = self._slice(x, at, 2**63 - 1, axis), self._slice(x, 0, at, axis)
            x = self._add("Concat", *parts, axis=axis)
        return x

    def model(self) -> Any:
        (b, c, h, w), n, heads = self.images, self.window, self.heads
        (down, across), tokens = self.counts, self.window**2
        rows = self._add("Transpose", "x", perm=[0, 2, 3, 1])
        x = self._add("LayerNormalization", rows, "lw", "lb", axis=-1)
        pads = 0, 0, 0, 0, 0, self.padded[0] - h, self.padded[1] - w, 0
        x = self._rolled(self._add("Pad", x, self._whole(*pads)), -self.shift)
        x = self._add("Reshape", x, self._whole(b, down, n, across, n, c))
        x = self._add("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = self._add("Reshape", x, self._whole(-1, tokens, c))
        x = self._add("Add", self._add("MatMul", x, "wqkv"), "bqkv")
        x = self._add("Reshape", x, self._whole(-1, tokens, 3, heads, c // heads))
        x = self._add("Transpose", x, perm=[2, 0, 3, 1, 4])
        q, k, v = (self._add("Gather", x, self._single(i), axis=0) for i in range(3))
        q = self._add("Mul", q, "scale")
        x = self._add("MatMul", q, self._add("Transpose", k, perm=[0, 1, 3, 2]))
        x = self._add("Add", x, "places")
        x = self._add("Reshape", x, self._whole(b, self.windows, heads, tokens, tokens))
        x = self._add("Add", x, "mask")
        x = self._add("Reshape", x, self._whole(-1, heads, tokens, tokens))
        x = self._add("MatMul", self._add("Softmax", x, axis=-1), v)
        x = self._add("Transpose", x, perm=[0, 2, 1, 3])
        x = self._add("Reshape", x, self._whole(-1, tokens, c))
        x = self._add("Add", self._add("MatMul", x, "wo"), "bo")
        x = self._add("Reshape", x, self._whole(b, down, across, n, n, c))
        x = self._add("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = self._rolled(self._add("Reshape", x, self._whole(b, *self.padded, c)), self.shift)
        x = self._slice(self._slice(x, 0, h, 1), 0, w, 2)
        x = self._merged(self._add("Add", rows, x))
        x = self._add("MatMul", x, "wm")
        self.nodes.append(node("Transpose", x, perm=[0, 3, 1, 2]))
        return model_of(self.nodes, {"x": (FLOAT, list(self.images))}, ["y"], self.constants, 18)

    def _single(self, i: int) -> str:
        name = self._whole(i)
        self.constants[name] = np.array(i)
        return name

    def _merged(self, x: str) -> str:
        """Two by two pixels, zeros beside the last ones, as channels of one."""
        b, c, h, w = self.images
        x = self._add("Pad", x, self._whole(0, 0, 0, 0, 0, h % 2, w % 2, 0))
        down, across = -(-h // 2), -(-w // 2)
        if self.exporter == "timm":
            x = self._add("Reshape", x, self._whole(b, down, 2, across, 2, c))
            x = self._add("Transpose", x, perm=[0, 1, 3, 4, 2, 5])
            return self._add("Reshape", x, self._whole(b, down, across, 4 * c))
        parts = [
            self._slice(self._slice(x, i, 2**63 - 1, 1, 2), j, 2**63 - 1, 2, 2)
            for j in (0, 1)
            for i in (0, 1)
        ]
        return self._add("Concat", *parts, axis=-1)

    def reference(self, images: np.ndarray) -> np.ndarray:
        """Token by token, in float64."""
        of = {name: a.astype(np.float64) for name, a in self.constants.items()}
        (b, c, h, w), n, heads = self.images, self.window, self.heads
        rows = images.astype(np.float64).transpose(0, 2, 3, 1)
        apart = rows - rows.mean(-1, keepdims=True)
        x = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5) * of["lw"] + of["lb"]
        whole = np.zeros((b, *self.padded, c))
        whole[:, :h, :w] = x
        whole = np.roll(whole, (-self.shift,) * 2, (1, 2))
        made = np.zeros_like(whole)
        for i in range(b):
            for k in range(self.windows):
                row, column = (n * at for at in divmod(k, self.counts[1]))
                at = i, slice(row, row + n), slice(column, column + n)
                qkv = (whole[at].reshape(-1, c) @ of["wqkv"] + of["bqkv"]).reshape(
                    -1, 3, heads, c // heads
                )
                q, key, v = qkv.transpose(1, 2, 0, 3)
                scores = q @ key.swapaxes(1, 2) * of["scale"] + of["places"][0] + of["mask"][0, k]
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                mixed = (shares / shares.sum(-1, keepdims=True)) @ v
                out = mixed.swapaxes(0, 1).reshape(-1, c) @ of["wo"] + of["bo"]
                made[at] = out.reshape(n, n, c)
        made = np.roll(made, (self.shift,) * 2, (1, 2))[:, :h, :w] + rows
        made = np.pad(made, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        order = ((0, 0), (1, 0), (0, 1), (1, 1))
        x = np.concatenate([made[:, i::2, j::2] for i, j in order], -1)
        found: np.ndarray = (x @ of["wm"]).transpose(0, 3, 1, 2)
        return found


@pytest.mark.parametrize("exporter", ["timm", "torchvision"])
@pytest.mark.parametrize(
    ("images", "window", "heads"),
    [((2, 20, 7, 11), 4, 2), ((1, 96, 14, 14), 7, 3), ((3, 36, 5, 5), 3, 3)],
)
def test_shifted_windows(
    exporter: str, images: Any, window: int, heads: int, tmp_path: Path
) -> None:
    of = Windows(images, window, heads, exporter)
    x = np.random.default_rng(window).standard_normal(images).astype(np.float32)
    x[0, :, 0, 0] *= 1e4
    x[-1, 0, -1, -1] = -1e4
    kernels = check_alone(of.model(), {"x": x}, tmp_path, of.reference(x), 3e-6)
    assert kernels.count("rows_take_runs") == 3
    assert "attention_rows_f32" in kernels


@pytest.mark.parametrize("exporter", ["timm", "torchvision"])
def test_windows_of_any_number_of_images(exporter: str) -> None:
    """Plans of several batches share weights; masks of all their windows are each plan's own."""
    of = Windows((2, 20, 7, 11), 4, 2, exporter)
    model = of.model()
    for tensor in model.graph.initializer:
        sizes = numpy_helper.to_array(tensor)
        if sizes.dtype == np.int64 and sizes.size >= 4 and sizes[0] == 2:
            free = np.array([-1, *sizes[1:]])
            tensor.CopyFrom(numpy_helper.from_array(free, tensor.name))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "images"
    rng = np.random.default_rng(3)
    with network_of(model, threads=2) as network:
        for images in (1, 5, 2, 1):
            x = rng.standard_normal((images, 20, 7, 11)).astype(np.float32)
            plan = network.plan({"x": x})
            assert "attention_rows_f32" in {
                o.kernel for run in plan.natives for o in run.operations
            }
            of.images = (images, 20, 7, 11)
            np.testing.assert_allclose(network({"x": x})["y"], of.reference(x), atol=2e-5)


def test_chains_without_end() -> None:
    """More moves than anybody writes: not looked through one by one, nor each way of joins."""
    turns, joins = 1500, 9
    nodes = [
        node("Transpose", f"t{i}" if i else "x", f"t{i + 1}", perm=[0, 2, 1, 3])
        for i in range(turns)
    ]
    nodes += [
        node("Concat", f"c{i} c{i}" if i else f"t{turns} t{turns}", f"c{i + 1}", axis=0)
        for i in range(joins)
    ]
    nodes.append(node("CumSum", f"c{joins} axis"))
    x = np.random.default_rng(1).standard_normal((1, 4, 6, 5)).astype(np.float32)
    model = model_of(nodes, {"x": (FLOAT, list(x.shape))}, ["y"], {"axis": np.array(1)})
    with network_of(model, threads=1) as network:
        expected = np.repeat(x, 2**joins, axis=0).cumsum(1)
        np.testing.assert_allclose(network({"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


def test_patches_whose_channels_are_joined_with_rows_on_the_way(tmp_path: Path) -> None:
    """As MobileViT makes them, and images of them."""
    (b, c, h, w), (tall, wide) = (2, 20, 6, 8), (2, 4)
    down, across, patch = h // tall, w // wide, tall * wide
    product = np.random.default_rng(0).standard_normal((c, c)).astype(np.float32)
    constants = {
        "k0": np.array([b * c * down, tall, across, wide]), "p": product,
        "k1": np.array([b, c, down * across, patch]), "k2": np.array([b * patch, -1, c]),
        "k3": np.array([b, patch, down * across, c]),
        "k4": np.array([b * c * down, across, tall, wide]), "k5": np.array([b, c, h, w]),
    }  # fmt: skip
    nodes = [
        node("Reshape", "x k0", "a"), node("Transpose", "a", "b", perm=[0, 2, 1, 3]),
        node("Reshape", "b k1", "c"), node("Transpose", "c", "d", perm=[0, 3, 2, 1]),
        node("Reshape", "d k2", "e"), node("MatMul", "e p", "f"), node("Reshape", "f k3", "g"),
        node("Transpose", "g", "h", perm=[0, 3, 2, 1]), node("Reshape", "h k4", "i"),
        node("Transpose", "i", "j", perm=[0, 2, 1, 3]), node("Reshape", "j k5", "k"),
        node("Add", "k x"),
    ]  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [b, c, h, w])}, ["y"], constants, 17)
    x = np.random.default_rng(1).standard_normal((b, c, h, w)).astype(np.float32)
    expected = np.einsum("bchw,cd->bdhw", x.astype(np.float64), product) + x
    kernels = check_alone(model, {"x": x}, tmp_path, expected, 2e-6)
    assert kernels.count("rows_take_runs") == 2


@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 5, 16, 8)], ids=str)
def test_what_moves_without_kernels_around_it_stays_with_the_host(shape: Any) -> None:
    """Runs of inputs that are images, and not rows."""
    perm = [1, 0, *range(2, len(shape))]
    nodes = [node("Transpose", "x", "a", perm=perm), node("Sin", "a")]
    model = model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], {}, 17)
    x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network(x)["y"], as_the_file_says(model, x)[0], atol=1e-6)
