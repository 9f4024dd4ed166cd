"""Clusters of equal size of neurons that are active together: numpy only, and deterministic.

What a neuron adds to a token is its energy, as a share of the token's: float32 [tokens, neurons].
"""

from __future__ import annotations

import numpy as np

from headrace.sparse.format import Floats

_KMEANS_ROUNDS = 8
_ROUNDS = 12  # of choosing experts and neurons in turn
_SWEEPS = 4  # of exchanges over all pairs of clusters
_ENOUGH = 1e-5  # of the energy that a round has to win


def cluster(energy: Floats, count: int, active: int, seed: int = 0) -> np.ndarray:
    """The cluster of each neuron, such that the best few of a token have most of its energy.

    Balanced k-means of what neurons add to tokens; from there on, in turn, each token takes the
    `active` clusters with most energy, and neurons go where the tokens are to which they add most.

    Args:
        energy: float32 [tokens, neurons], neurons a multiple of `count`.

    Returns:
        int64 [neurons] of 0 .. count - 1, all equally often.
    """
    at = _kmeans(np.sqrt(energy), count, seed)
    best, found = -1.0, at
    for _ in range(_ROUNDS):
        sums = cluster_energy(energy, at, count)
        chosen = most(sums, active)
        of_chosen = float(np.einsum("ij,ij->", chosen, sums, dtype=np.float64))
        if of_chosen <= best * (1 + _ENOUGH):
            break
        best, found = of_chosen, at
        at = balanced(energy.T @ chosen)
    return found


def cluster_energy(energy: Floats, at: np.ndarray, count: int) -> Floats:
    """Sums of the neurons of each cluster: float32 [tokens, count]."""
    return np.stack([energy[:, at == e].sum(axis=1) for e in range(count)], axis=1)


def most(values: Floats, n: int) -> Floats:
    """Ones where the n largest values of a row are, of equal ones the first, else zeros."""
    best = np.argsort(-values, axis=1, kind="stable")[:, :n]
    chosen = np.zeros(values.shape, np.float32)
    np.put_along_axis(chosen, best, 1, axis=1)
    return chosen


def _kmeans(profiles: Floats, count: int, seed: int) -> np.ndarray:
    """Balanced k-means of columns by the cosine of their angle."""
    length = np.sqrt(np.einsum("ij,ij->j", profiles, profiles))
    unit = profiles / np.maximum(length, np.finfo(np.float32).tiny)
    first = np.random.default_rng(seed).permutation(unit.shape[1])[:count]
    centres, at = unit[:, first], np.empty(0, np.int64)
    for _ in range(_KMEANS_ROUNDS):
        last, at = at, balanced(unit.T @ centres)
        if np.array_equal(last, at):
            break
        centres = np.stack([unit[:, at == e].sum(axis=1) for e in range(count)], axis=1)
        length = np.sqrt(np.einsum("ij,ij->j", centres, centres))
        centres /= np.maximum(length, np.finfo(np.float32).tiny)
    return at


def balanced(gain: Floats, exchange: bool = True) -> np.ndarray:
    """A place for each row, every place equally often, so that the sum of gains is large.

    Those choose first for whom most depends on it; then rows are exchanged in pairs while that
    wins something.

    Args:
        gain: float [rows, places], rows a multiple of places.
        exchange: whether rows are exchanged, which takes a time quadratic in places.

    Returns:
        int64 [rows].
    """
    rows, places = gain.shape
    at = np.empty(rows, np.int64)
    room = np.full(places, rows // places)
    ranked = np.sort(gain, axis=1)
    urgent = ranked[:, -1] - ranked[:, -2] if places > 1 else ranked[:, -1]
    for row in np.argsort(-urgent, kind="stable").tolist():
        at[row] = np.where(room > 0, gain[row], -np.inf).argmax()
        room[at[row]] -= 1
    least = 1e-6 * float(np.abs(gain).max(initial=0))
    for _ in range(_SWEEPS if exchange else 0):
        if not any([_exchange(gain, at, a, b, least) for a in range(places) for b in range(a)]):
            break
    return at


def _exchange(gain: Floats, at: np.ndarray, a: int, b: int, least: float) -> bool:
    """Exchange rows of two places where the sum wins more than `least`; whether there were any."""
    ours, theirs = np.flatnonzero(at == a), np.flatnonzero(at == b)
    go, come = gain[ours, b] - gain[ours, a], gain[theirs, a] - gain[theirs, b]
    ours, theirs = (
        rows[np.argsort(-wins, kind="stable")] for rows, wins in ((ours, go), (theirs, come))
    )
    n = int((np.sort(go)[::-1] + np.sort(come)[::-1] > least).sum())
    at[ours[:n]], at[theirs[:n]] = b, a
    return n > 0
