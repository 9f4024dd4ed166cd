"""A dense gated feed-forward cut into a shared part and experts, by what is active together.

After Read-ME (2410.19123): a neuron is a row of gate and up and a column of down, so any parts of
all neurons add up to the dense output. The shared part has the neurons that add most on a text;
the others form clusters (`headrace.neuron_clusters`). A router is fitted to how much each cluster
adds, by ridge regression on what gate and up read; neurons then move to where it brings the tokens
that want them, and it is fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.calibration import LayerInputs
from headrace.calibration_pass import Read, add_products
from headrace.errors import UnsupportedError
from headrace.families.common import MAX_ACTIVE
from headrace.families.decoder import FeedForward, Layer
from headrace.least_memory import Need
from headrace.loaders.expert_tensors import MAX_EXPERTS
from headrace.neuron_clusters import balanced, cluster, cluster_energy, most
from headrace.sparse.format import Floats

EXPERTS, ACTIVE, SHARED = 16, 4, 1 / 3
TOKENS = 16384  # of calibration, unless told otherwise
STEP = 32  # experts have a multiple of so many neurons: blocks of most formats
_ROUNDS = 6  # of fitting the router and moving neurons in turn
_ENOUGH = 1e-4  # of the energy that a round has to win
_RIDGE = 1e-2  # of the mean square of the router's inputs
READ, WRITTEN = 2, 3  # places in `Unit.readers` of gate and up, and of down


@dataclass(frozen=True)
class Cut:
    """How many neurons experts and the shared part of a layer have.

    `fit_shared`: the shared part's down makes up, as well as it can, for experts not chosen.
    """

    experts: int
    active: int
    inner: int
    shared: int
    fit_shared: bool = False

    @property
    def neurons(self) -> int:
        """Of the dense feed-forward."""
        return self.experts * self.inner + self.shared

    @property
    def share(self) -> float:
        """Of the neurons that are active for a token."""
        return (self.active * self.inner + self.shared) / self.neurons


def nearest_cut(
    neurons: int, experts: int, active: int, shared: float, fit_shared: bool = False
) -> Cut:
    """The cut nearest to a share of neurons in the shared part, with experts of whole blocks.

    Raises:
        UnsupportedError: there is none.
    """
    if not 1 <= experts <= MAX_EXPERTS:
        raise UnsupportedError(f"--experts is from 1 to {MAX_EXPERTS}, not {experts}")
    if not 1 <= active <= min(experts, MAX_ACTIVE):
        raise UnsupportedError(
            f"--active is from 1 to {min(experts, MAX_ACTIVE)} of {experts} experts, not {active}"
        )
    if not 0 <= shared < 1:
        raise UnsupportedError(f"--shared is a share from 0 to less than 1, not {shared}")
    most = neurons // experts // STEP
    if most < 1:
        raise UnsupportedError(
            f"{neurons} neurons of a layer are too few for {experts} experts, of {STEP} at least"
        )
    inner = STEP * min(max(1, round(neurons * (1 - shared) / experts / STEP)), most)
    left = neurons - experts * inner
    if fit_shared and not left:
        raise UnsupportedError("--fit-shared needs a shared part; give --shared a larger share")
    return Cut(experts, active, inner, left, fit_shared)


@dataclass(frozen=True)
class Parts:
    """Which neurons go where, and what chooses experts.

    Attributes:
        shared: the neurons of the shared part, ascending: int64 [shared].
        experts: those of each expert: int64 [experts, inner].
        router: float32 [experts, width].
        bias: added to the router's logits: float32 [experts].
        correction: added to the shared part's columns of down: float32 [width, shared].
    """

    shared: np.ndarray
    experts: np.ndarray
    router: Floats
    bias: Floats
    correction: Floats | None = None


class Samples:
    """What the neurons of a layer were like on a text."""

    def __init__(self, tokens: int, width: int, neurons: int) -> None:
        self.inputs = np.empty((tokens, width), np.float32)
        self.values = np.empty((tokens, neurons), np.float32)

    @staticmethod
    def bytes_of(layer: Layer, tokens: int) -> int:
        """What collecting takes."""
        f = layer.feed_forward
        assert isinstance(f, FeedForward)
        return 4 * tokens * (f.up.columns + f.down.columns)

    def see(self, window: int, reader: int, read: Read) -> None:
        """Keep what matrices read, as `LayerInputs.watch` gives it."""
        kept = {READ: self.inputs, WRITTEN: self.values}.get(reader)
        if kept is not None:
            found = read()
            kept[window * found.shape[1] : (window + 1) * found.shape[1]] = found.T


def needs(inputs: LayerInputs, layers: tuple[Layer, ...], cut: Cut) -> list[Need]:
    """What `parts_of` takes beside what the process has."""
    tokens = inputs.tokens

    def fitting(layer: Layer) -> int:
        # Profiles of neurons and their lengths while they are clustered; then the statistics.
        width = layer.attention.query.columns
        clustering = 2 * cut.neurons + width + 4 * cut.experts
        work = 4 * (tokens * (cut.neurons + clustering) + width * cut.neurons)
        work += 24 * max(width, cut.shared * cut.fit_shared) ** 2
        return Samples.bytes_of(layer, tokens) + work

    return [
        *inputs.needs_watched(lambda layer: Samples.bytes_of(layer, tokens)),
        ("clustering the neurons of a layer", max(map(fitting, layers))),
    ]


def parts_of(
    inputs: LayerInputs, index: int, layer: Layer, down: Floats, cut: Cut, n_threads: int
) -> Parts:
    """Cut the feed-forward of a layer, which is the next one of `inputs` or a later one.

    Args:
        down: the matrix, float32 [width, neurons].

    Raises:
        what `LayerInputs.watch` raises, and `LayerInputs.no_numbers` where that is so.
    """
    assert isinstance(layer.feed_forward, FeedForward)
    samples = Samples(inputs.tokens, layer.attention.query.columns, cut.neurons)
    inputs.watch(index, Samples.bytes_of(layer, inputs.tokens), samples.see)
    if not (np.isfinite(samples.values).all() and np.isfinite(samples.inputs).all()):
        raise inputs.no_numbers(index)
    return choose_parts(samples.inputs, samples.values, down, cut, n_threads)


def choose_parts(inputs: Floats, values: Floats, down: Floats, cut: Cut, n_threads: int) -> Parts:
    """Choose neurons and fit a router.

    Args:
        inputs: what gate and up read: float32 [tokens, width].
        values: what down reads: float32 [tokens, neurons].
        down: the matrix, float32 [width, neurons].
    """
    energy = values * np.sqrt(np.einsum("ij,ij->j", down, down))
    largest = np.abs(energy).max(axis=1, keepdims=True)
    energy /= np.maximum(largest, np.finfo(np.float32).tiny)  # its squares are then in range
    np.square(energy, out=energy)
    energy /= np.maximum(energy.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    order = np.argsort(-energy.mean(axis=0, dtype=np.float64), kind="stable")
    shared, rest = np.sort(order[: cut.shared]), np.sort(order[cut.shared :])
    routed = energy[:, rest]
    fit = _Ridge(inputs, n_threads)
    at = cluster(routed, cut.experts, cut.active)
    router, bias, chosen, caught = _fitted(fit, inputs, routed, at, cut)
    for _ in range(_ROUNDS):
        # Neurons go where the router, not the truth, brings the tokens that want them.
        new = balanced(routed.T @ chosen)
        *found, more = _fitted(fit, inputs, routed, new, cut)
        if more <= caught * (1 + _ENOUGH):
            break
        at, caught = new, more
        router, bias, chosen = found
    experts = np.stack([rest[at == e] for e in range(cut.experts)])
    correction = None
    if cut.fit_shared:
        missing = np.zeros((len(values), len(down)), np.float32)
        for e, neurons in enumerate(experts):
            missing += ((1 - chosen[:, e, None]) * values[:, neurons]) @ down[:, neurons].T
        correction, _ = _Ridge(values[:, shared], n_threads, centred=False).of(missing)
    return Parts(shared, experts, router, bias, correction)


def _fitted(
    fit: _Ridge, inputs: Floats, energy: Floats, at: np.ndarray, cut: Cut
) -> tuple[Floats, Floats, Floats, float]:
    """A router for clusters, what it chooses (ones in [tokens, experts]), and how much that has."""
    sums = cluster_energy(energy, at, cut.experts)
    router, bias = fit.of(np.sqrt(sums))
    chosen = most(inputs @ router.T + bias, cut.active)
    return router, bias, chosen, float(np.einsum("ij,ij->", chosen, sums, dtype=np.float64))


class _Ridge:
    """Ridge regression on the same inputs, float32 [tokens, inputs]."""

    def __init__(self, x: Floats, n_threads: int, centred: bool = True) -> None:
        self._mean = x.mean(axis=0, dtype=np.float64) * centred
        self._offset = centred
        self._centred = np.ascontiguousarray((x - self._mean.astype(np.float32)).T)
        h = np.zeros((x.shape[1],) * 2, np.float32)
        add_products(h, self._centred, n_threads)
        full = np.triu(h).astype(np.float64)
        full += np.triu(full, 1).T
        full[np.diag_indices_from(full)] += _RIDGE * max(np.trace(full) / len(full), 1e-30)
        self._inverse = np.linalg.inv(full)

    def of(self, y: Floats) -> tuple[Floats, Floats]:
        """(w, b), so that x w^T + b is nearest to y: float32 [outputs, inputs], [outputs]."""
        wanted = y.mean(axis=0, dtype=np.float64) * self._offset
        products = self._centred @ (y - wanted.astype(np.float32))
        found = (self._inverse @ products).T
        return np.ascontiguousarray(found, np.float32), (wanted - found @ self._mean).astype("f4")
