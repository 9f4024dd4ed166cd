"""Small encoders as exporters and optimisers spell them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnx_models import FLOAT, INT64, model_of

VOCABULARY, MOST_TOKENS, INNER = 50, 40, 64
LEAST = float(np.finfo(np.float32).min)


class Builder:
    """Nodes of a graph and its constants, whose names it makes."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.nodes, self.constants = rng, [], {}  # type: ignore[var-annotated]

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], domain=domain, **attributes))
        return name

    def put(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def weights(self, *shape: int) -> str:
        return self.put(self.rng.standard_normal(shape) * shape[0] ** -0.5)

    def scale(self, n: int) -> tuple[str, str]:
        return self.put(1 + self.rng.standard_normal(n) / 9), self.put(self.rng.standard_normal(n))


def _norm(b: Builder, x: str, width: int, spelling: str) -> str:
    weight, bias = b.scale(width)
    if spelling != "old":
        return b.add("LayerNormalization", x, weight, bias, epsilon=1e-6)
    mean = b.add("ReduceMean", x, axes=[-1])
    apart = b.add("Sub", x, mean)
    variance = b.add("ReduceMean", b.add("Pow", apart, b.put(2)), axes=[-1])
    root = b.add("Sqrt", b.add("Add", variance, b.put(1e-6)))
    return b.add("Add", b.add("Mul", b.add("Div", apart, root), weight), bias)


def _linear(b: Builder, x: str, read: int, made: int) -> str:
    product = b.add("MatMul", x, b.weights(read, made))
    return b.add("Add", product, b.put(b.rng.standard_normal(made)))


def _heads(b: Builder, x: str, heads: int, width: int, perm: list[int]) -> str:
    sizes = b.put([0, 0, heads, width // heads], np.int64)
    return b.add("Transpose", b.add("Reshape", x, sizes), perm=perm)


def attention(b: Builder, x: str, mask: str, heads: int, width: int, spelling: str) -> str:
    q, k, v = (_linear(b, x, width, width) for _ in range(3))
    head = width // heads
    q, v = (_heads(b, one, heads, width, [0, 2, 1, 3]) for one in (q, v))
    if spelling == "old":  # keys by two transpositions
        k = b.add("Transpose", _heads(b, k, heads, width, [0, 2, 1, 3]), perm=[0, 1, 3, 2])
    else:
        k = _heads(b, k, heads, width, [0, 2, 3, 1])
    if spelling == "sdpa":  # half of the scale on each side
        q, k = (b.add("Mul", one, b.put(head**-0.25)) for one in (q, k))
        scores = b.add("MatMul", q, k)
    else:
        scores = b.add("Div", b.add("MatMul", q, k), b.put(head**0.5))
    weights = b.add("Softmax", b.add("Add", scores, mask), axis=-1)
    if spelling == "sdpa":
        weights = b.add("Where", b.add("IsNaN", weights), b.put(0), weights)
    mixed = b.add("Transpose", b.add("MatMul", weights, v), perm=[0, 2, 1, 3])
    return b.add("Reshape", mixed, b.put([0, 0, width], np.int64))


def _mask(b: Builder, spelling: str) -> str:
    there = b.add("Unsqueeze", "attention_mask", b.put([1, 2], np.int64))
    if spelling == "sdpa":
        lowest = b.put(-np.inf)
        return b.add("Where", b.add("Cast", there, to=TensorProto.BOOL), b.put(0), lowest)
    absent = b.add("Sub", b.put(1), b.add("Cast", there, to=FLOAT))
    return b.add("Mul", absent, b.put(LEAST))


def _plain_layer(b: Builder, x: str, mask: str, heads: int, width: int, spelling: str) -> str:
    mixed = _linear(b, attention(b, x, mask, heads, width, spelling), width, width)
    x = _norm(b, b.add("Add", mixed, x), width, spelling)
    inner = _linear(b, x, width, INNER)
    if spelling == "old":
        scaled = b.add("Mul", inner, b.put(0.5**0.5))
        half = b.add("Mul", inner, b.put(0.5))
        inner = b.add("Mul", half, b.add("Add", b.put(1), b.add("Erf", scaled)))
    else:
        error = b.add("Erf", b.add("Div", inner, b.put(2**0.5)))
        inner = b.add("Mul", b.add("Mul", inner, b.add("Add", error, b.put(1))), b.put(0.5))
    return _norm(b, b.add("Add", _linear(b, inner, INNER, width), x), width, spelling)


def _fused_layer(b: Builder, x: str, mask: str, heads: int, width: int) -> str:
    own = {"domain": "com.microsoft"}
    bias = b.put(b.rng.standard_normal(3 * width))
    mixed = b.add("Attention", x, b.weights(width, 3 * width), bias, mask, num_heads=heads, **own)
    mixed = b.add("MatMul", mixed, b.weights(width, width))
    more = b.put(b.rng.standard_normal(width))
    x = b.add("SkipLayerNormalization", mixed, x, *b.scale(width), more, epsilon=1e-6, **own)
    inner = b.add("MatMul", x, b.weights(width, INNER))
    inner = b.add("BiasGelu", inner, b.put(b.rng.standard_normal(INNER)), **own)
    out = _linear(b, inner, INNER, width)
    return b.add("SkipLayerNormalization", out, x, *b.scale(width), epsilon=1e-6, **own)


def _embedded(b: Builder, width: int) -> tuple[str, str]:
    ids, mask = (b.add("Cast", n, to=TensorProto.INT32) for n in ("input_ids", "attention_mask"))
    sizes = (VOCABULARY, width), (MOST_TOKENS, width), (2, width)
    words, places, kinds = (b.put(b.rng.standard_normal(of)) for of in sizes)
    given = [ids, mask, words, places, kinds, *b.scale(width), mask]  # of two kinds: as the mask
    x = b.add("EmbedLayerNormalization", *given, domain="com.microsoft", epsilon=1e-6)
    counts = f"{x}_counts"
    b.nodes[-1].output.append(counts)
    return x, counts


def encoder(
    rng: np.random.Generator, spelling: str, *, heads: int = 3, width: int = 48, layers: int = 2
) -> Any:
    """An encoder with random weights, of [batch, tokens] tokens and a mask of ones and zeros.

    `spelling`: "new" (operator set 17), "old" (no LayerNormalization), "sdpa" (PyTorch's own
    attention), "raw" or "counts" (onnxruntime's fused operators; masks as given, or as numbers of
    tokens), "embedded" (its fused embedding, which makes these numbers).
    """
    b = Builder(rng)
    fused = spelling in ("raw", "counts", "embedded")
    if spelling == "embedded":
        x, mask = _embedded(b, width)
    else:
        x = b.add("Gather", b.put(rng.standard_normal((VOCABULARY, width))), "input_ids")
    if fused and spelling != "embedded":
        mask = b.add("Cast", "attention_mask", to=TensorProto.INT32)
        if spelling == "counts":
            mask = b.add("ReduceSum", mask, b.put([1], np.int64), keepdims=0)
    elif not fused:
        mask = _mask(b, spelling)
    for _ in range(layers):
        if fused:
            x = _fused_layer(b, x, mask, heads, width)
        else:
            x = _plain_layer(b, x, mask, heads, width, spelling)
    b.nodes[-1].output[0] = "y"
    inputs = {name: (INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")}
    return model_of(b.nodes, inputs, ["y"], b.constants, opset=13 if spelling == "old" else 17)


def tokens(rng: np.random.Generator, batch: int, count: int) -> dict[str, np.ndarray]:
    """Inputs, of which the first has all tokens and others fewer."""
    lengths = np.maximum(1, count - 3 * np.arange(batch))
    return {
        "input_ids": rng.integers(0, VOCABULARY, (batch, count)),
        "attention_mask": (np.arange(count) < lengths[:, None]).astype(np.int64),
    }
