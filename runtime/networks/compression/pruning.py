"""Weights that go, and the rest that makes up for them.

Without inputs the smallest go. With inputs, layer by layer in the order of the network, what goes
is what can best be made up for (optimal brain surgeon: w^2 / [H^-1]_cc, added up over a block), in
some rounds (Frantar and Alistarh, "Optimal Brain Compression", 2208.11580); what stays gets the
weights with the least squared error of the outputs (`headrace.sparse.gqs_pruning.refit`). The
error is that of `reconstruction`. Means are kept by biases, where there are some. Where outputs go
together, channels are brought into an order first in which less is lost by that (`rearrangement`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headrace.networks.compression.rearrangement import rearrange
from headrace.networks.compression.reconstruction import Moments, in_order
from headrace.networks.compression.samples import Sample
from headrace.networks.compression.sparse_layers import SparseLayer, sparse_layers
from headrace.sparse.format import Floats
from headrace.sparse.gptq import inverse_factor
from headrace.sparse.gqs_pruning import refit

PATTERNS = {"1x1": 1, "4x1": 4, "group": 16}  # outputs that go and stay together, of one input
ROUNDS = 4


def prune(
    model: Any, sparsity: float, rows: int, samples: Sequence[Sample] | None, *, ends: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> list[SparseLayer]:  # fmt: skip
    """Make weights of a model zero, in place; channels get another order first.

    Args:
        model: ModelProto with its weights inside, and shapes.
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
    if rows > 1:
        scores = [np.square(layer.matrix()) for layer in layers]
        if samples is not None:
            found = in_order(model, layers, samples, lambda text: None)
            scores = [_scores(layer.matrix(), of) for layer, of in found]
        rearrange(model, layers, scores, rows, sparsity, notice)
    if samples is None:
        for layer in layers:
            w = layer.matrix()
            layer.put(np.where(staying(np.square(w), rows, sparsity), w, np.float32(0)))
        return layers
    for layer, of in in_order(model, layers, samples, notice):
        _reconstruct(layer, sparsity, rows, of)
    return layers


def _scores(w: Floats, of: Moments) -> Floats:
    """What is lost with each weight, where others make up for it."""
    upper = inverse_factor(of.zz)
    found: Floats = np.square(w) / np.square(upper).sum(axis=0)  # the diagonal of H^-1
    return found


def _reconstruct(layer: SparseLayer, sparsity: float, rows: int, of: Moments) -> None:
    made_up = np.square(inverse_factor(of.zz)).sum(axis=0)
    wanted = of.wanted(layer.matrix())
    best = wanted
    for step in range(1, ROUNDS + 1):
        share = sparsity * (1 - (1 - step / ROUNDS) ** 3)  # fewer each time
        stays = staying(np.square(best) / made_up, rows, share)
        best = refit(wanted, stays, of.zz)
    of.put(layer, best)


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
