"""Weights that go, and the rest that makes up for them.

Without inputs the smallest go. With inputs, layer by layer in the order of the network, what goes
is what can best be made up for (optimal brain surgeon: w^2 / [H^-1]_cc, added up over a block), in
some rounds (Frantar and Alistarh, "Optimal Brain Compression", 2208.11580); what stays gets the
weights with the least squared error of the outputs (`headrace.sparse.gqs_pruning.refit`). The
error is measured against the outputs of the whole network as it was, for inputs as the layers in
front give them, which are sparse already: so a layer makes up for those as well. Means are kept
by biases, where there are some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from headrace.networks.compression.float_model import Stepwise
from headrace.networks.compression.samples import Sample
from headrace.networks.compression.sparse_layers import SparseLayer, sparse_layers
from headrace.sparse.format import Floats
from headrace.sparse.gptq import DAMPING, inverse_factor
from headrace.sparse.gqs_pruning import refit

PATTERNS = {"1x1": 1, "4x1": 4, "group": 16}  # outputs that go and stay together, of one input
ROUNDS = 4


def prune(
    model: Any, sparsity: float, rows: int, samples: Sequence[Sample] | None, *, ends: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> list[SparseLayer]:  # fmt: skip
    """Make weights of a model zero, in place.

    Args:
        model: ModelProto with its weights inside.
        sparsity: share of each layer's weights that goes.
        rows: outputs that go together.
        samples: inputs to look at; None: the smallest weights go.
        ends: prune the layers that outputs come out of as well.
        notice: is told what happens.

    Returns:
        the layers that were pruned.

    Raises:
        UnsupportedError: onnxruntime does not run it.
    """
    layers = [layer for layer in sparse_layers(model) if ends or not layer.ends]
    if samples is None:
        for layer in layers:
            w = layer.matrix()
            layer.put(np.where(staying(np.square(w), rows, sparsity), w, np.float32(0)))
        return layers
    source = onnx.ModelProto()
    source.CopyFrom(model)
    before, after = Stepwise(source, samples), Stepwise(model, samples)
    for i, layer in enumerate(layers):
        notice(f"layer {i + 1} of {len(layers)}: {layer.node.name or layer.node.output[0]}")
        for run in (before, after):
            if layer.node.input[0] not in run.values[0]:
                run.run_to(layer.node.input[0])
        name = layer.node.input[0]
        pairs = zip(before.values, after.values, strict=True)
        found = _moments(layer, [(a[name], b[name]) for a, b in pairs])
        _reconstruct(layer, sparsity, rows, found)
    return layers


@dataclass(frozen=True)
class _Moments:
    """Of inputs x as they were and z as they are now, around their means if there is a bias."""

    zz: Floats
    xz: Floats
    mean_x: Floats
    mean_z: Floats


def _moments(layer: SparseLayer, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Moments:
    n = layer.matrix().shape[1]
    zz, xz = np.zeros((2, n, n))
    sum_x, sum_z = np.zeros((2, n))
    count = 0
    for was, now in pairs:
        x, z = layer.rows(was), layer.rows(now)
        zz += z @ z.T
        xz += x @ z.T
        sum_x += x.sum(axis=1, dtype=np.float64)
        sum_z += z.sum(axis=1, dtype=np.float64)
        count += x.shape[1]
    mean_x, mean_z = sum_x / count, sum_z / count
    zz, xz = zz / count, xz / count
    if layer.bias is not None:
        zz -= np.outer(mean_z, mean_z)
        xz -= np.outer(mean_x, mean_z)
    return _Moments(
        zz.astype(np.float32), xz.astype(np.float32), mean_x.astype(np.float32),
        mean_z.astype(np.float32),
    )  # fmt: skip


def _reconstruct(layer: SparseLayer, sparsity: float, rows: int, of: _Moments) -> None:
    w = layer.matrix()
    upper = inverse_factor(of.zz)
    made_up = np.square(upper).sum(axis=0)  # the diagonal of H^-1
    # The weights without zeros that are best for inputs as they are now.
    damped = of.zz.astype(np.float64)
    np.einsum("ii->i", damped)[:] += DAMPING * (float(np.diag(of.zz).mean()) or 1.0)
    apart = of.xz.astype(np.float64) - of.zz
    wanted = w + np.linalg.solve(damped, (w @ apart).T).T.astype(np.float32)
    best = wanted
    for step in range(1, ROUNDS + 1):
        share = sparsity * (1 - (1 - step / ROUNDS) ** 3)  # fewer each time
        stays = staying(np.square(best) / made_up, rows, share)
        best = refit(wanted, stays, of.zz)
    layer.put(best)
    if layer.bias is not None:
        bias = onnx.numpy_helper.to_array(layer.bias).reshape(-1)
        layer.put_bias(bias + w @ of.mean_x - best @ of.mean_z)


def staying(score: Floats, rows: int, sparsity: float) -> np.ndarray:
    """Which weights stay, of those with such scores [outputs, channels]: bool.

    Of the blocks of `rows` outputs those with the least sums go, so many that the share of weights
    that go is the nearest to `sparsity`.
    """
    outputs, channels = score.shape
    padded = np.zeros((-(-outputs // rows) * rows, channels), np.float32)
    padded[:outputs] = score
    of_blocks = padded.reshape(-1, rows, channels).sum(axis=1)
    go = round(sparsity * of_blocks.size)
    stays = np.ones(of_blocks.size, bool)
    stays[np.argsort(of_blocks, axis=None, kind="stable")[:go]] = False
    found: np.ndarray = stays.reshape(of_blocks.shape).repeat(rows, axis=0)[:outputs]
    return found
