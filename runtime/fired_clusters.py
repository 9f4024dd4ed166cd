"""Neurons of a ReLU feed-forward in clusters of those that fire together.

After PowerInfer-2 (2406.06282). A neuron fires for a token where its gate is above 0; of a layer's
clusters those are read of which any neuron fires, so that what counts is how many do, for a token
of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.calibration import LayerInputs
from headrace.calibration_pass import Read
from headrace.errors import UnsupportedError
from headrace.families.decoder import Layer
from headrace.families.headrace_clusters import STEP
from headrace.least_memory import Need
from headrace.loaders.expert_tensors import MAX_EXPERTS
from headrace.neuron_clusters import balanced
from headrace.refactor_experts import WRITTEN
from headrace.sparse.format import Floats

TOKENS = 8192  # of calibration, unless told otherwise
_ROUNDS = 6  # of moving neurons to where others fire
_BANDS = (8, 1)  # of neurons that fire about as often; and as many as clusters


@dataclass(frozen=True)
class Clustered:
    """The neurons of a layer in clusters, the hottest first.

    Attributes:
        neurons: of each cluster: int64 [clusters, size].
        clusters_fired, neurons_fired: the share of tokens that fired each, float32, in that order.
    """

    neurons: np.ndarray
    clusters_fired: Floats
    neurons_fired: Floats


def nearest_count(neurons: int, wanted: int) -> int:
    """How many clusters of equal size there can be: as many as wanted, or the next number to that.

    Raises:
        UnsupportedError: there can be none.
    """
    if not 1 <= wanted <= MAX_EXPERTS:
        raise UnsupportedError(f"--neuron-clusters is from 1 to {MAX_EXPERTS}, not {wanted}")
    if neurons % STEP:
        raise UnsupportedError(
            f"{neurons} neurons of a layer cannot be cut into clusters, which have a multiple of "
            f"{STEP}"
        )
    most = neurons // STEP
    counts = [n for n in range(1, min(most, MAX_EXPERTS) + 1) if most % n == 0]
    return min(counts, key=lambda n: (abs(n - wanted), -n))


def needs(inputs: LayerInputs, layers: tuple[Layer, ...]) -> list[Need]:
    """What `clusters_of` takes beside what the process has."""

    def held(layer: Layer) -> int:
        return inputs.tokens * layer.feed_forward.inner  # a byte each

    # What fires, as bytes, as float32, and of a band.
    work = max(held(layer) * (1 + 4 + 4) for layer in layers)
    return [*inputs.needs_watched(held), ("clustering the neurons of a layer", work)]


def clusters_of(inputs: LayerInputs, index: int, layer: Layer, count: int) -> Clustered:
    """Cluster the neurons of a layer, which is the next one of `inputs` or a later one.

    Raises:
        what `LayerInputs.watch` raises, and `LayerInputs.no_numbers` where that is so.
    """
    fires = np.empty((inputs.tokens, layer.feed_forward.inner), np.bool_)
    finite = True

    def see(window: int, reader: int, read: Read) -> None:
        nonlocal finite
        if reader == WRITTEN:
            found = read().T
            finite = finite and bool(np.isfinite(found).all())
            fires[window * len(found) : (window + 1) * len(found)] = found != 0

    inputs.watch(index, fires.nbytes, see)
    if not finite:
        raise inputs.no_numbers(index)
    return choose_clusters(fires, count)


def choose_clusters(fires: np.ndarray, count: int) -> Clustered:
    """Choose clusters of which few fire for a token.

    Neurons are put in bands by how often they fire, so that the hot ones lie together, and within a
    band in clusters by when they do; then, in turn, neurons go where others fire for their tokens.
    Of several numbers of bands (as many as clusters: how often is all that counts; one: when is)
    that one is taken with which fewest clusters fire.

    Args:
        fires: bool [tokens, neurons], neurons a multiple of `count`.
    """
    ones = fires.astype(np.float32)
    often = ones.mean(axis=0)
    order = np.argsort(-often, kind="stable")
    best, found = np.inf, order
    for bands in dict.fromkeys((count, *(n for n in _BANDS if n < count))):
        at = _in_bands(ones, order, count, bands)
        last = np.inf
        for _ in range(_ROUNDS):
            some = _sums(ones, at, count) > 0
            now = float(some.sum(axis=1).mean())
            if now < best:
                best, found = now, at
            if now >= last:
                break
            last = now
            at = balanced(ones.T @ some.astype(np.float32), exchange=False)
    shares = (_sums(ones, found, count) > 0).mean(axis=0).astype(np.float32)
    hottest = np.argsort(-shares, kind="stable")
    neurons = np.stack([np.flatnonzero(found == c) for c in hottest])
    return Clustered(neurons, shares[hottest], often[neurons].reshape(-1).astype(np.float32))


def _sums(ones: Floats, at: np.ndarray, count: int) -> Floats:
    """Neurons of each cluster that fire: float32 [tokens, count]."""
    member = (at[:, None] == np.arange(count)).astype(np.float32)
    sums: Floats = ones @ member
    return sums


def _in_bands(ones: Floats, order: np.ndarray, count: int, bands: int) -> np.ndarray:
    """The cluster of each neuron, where clusters are made band by band of an order of neurons."""
    at, size = np.empty(len(order), np.int64), len(order) // count
    for some in np.array_split(np.arange(count), bands):
        neurons = order[some[0] * size : (some[-1] + 1) * size]
        at[neurons] = some[0] + _together(ones[:, neurons], len(some))
    return at


def _together(ones: Floats, count: int) -> np.ndarray:
    """Balanced k-means of neurons by when they fire."""
    at: np.ndarray = np.arange(ones.shape[1]) * count // ones.shape[1]
    for _ in range(_ROUNDS if count > 1 else 0):
        centres = _sums(ones, at, count)
        centres /= np.maximum(np.sqrt(np.square(centres).sum(axis=0)), 1)
        last, at = at, balanced(ones.T @ centres, exchange=False)
        if np.array_equal(last, at):
            break
    return at
