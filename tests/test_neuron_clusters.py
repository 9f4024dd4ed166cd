"""Clusters of neurons, and routers that find them, on layers that are known to have some."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from headrace.errors import UnsupportedError
from headrace.neuron_clusters import balanced, cluster, cluster_energy, most
from headrace.refactor_experts import Cut, Parts, choose_parts, nearest_cut

GROUPS, INNER, SHARED, WIDTH = 6, 32, 24, 40


class Layer:
    """Neurons of which each group is active where its direction is what is read.

    `owner` is the group of each neuron, -1 of those that are always active.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        owners = np.repeat(np.arange(-1, GROUPS), [SHARED] + [INNER] * GROUPS)
        self.owner = rng.permutation(owners)
        self.directions = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0][:GROUPS]
        self.down = rng.standard_normal((WIDTH, len(owners))).astype(np.float32)
        self.rng = rng

    def text(self, tokens: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The groups of tokens, what is read, and the neurons' values."""
        rng = self.rng
        chosen = np.stack([rng.permutation(GROUPS)[:groups] for _ in range(tokens)])
        on = np.zeros((tokens, GROUPS + 1))
        np.put_along_axis(on, chosen, 1, axis=1)
        on[:, -1] = 3  # owner -1
        x = on[:, :-1] @ self.directions + 0.01 * rng.standard_normal((tokens, WIDTH))
        values = on[:, self.owner] * rng.uniform(0.5, 1.5, (tokens, len(self.owner)))
        values += 0.01 * rng.standard_normal(values.shape)
        return chosen, x.astype(np.float32), values.astype(np.float32)


@pytest.fixture(scope="module")
def found() -> tuple[Layer, Parts]:
    layer = Layer()
    _, x, values = layer.text(2000, 2)
    cut = Cut(GROUPS, 2, INNER, SHARED)
    return layer, choose_parts(x, values, layer.down, cut, 2)


def test_every_neuron_is_somewhere_once(found: tuple[Layer, Parts]) -> None:
    layer, parts = found
    every = np.concatenate([parts.shared, parts.experts.ravel()])
    assert np.array_equal(np.sort(every), np.arange(len(layer.owner)))


def test_clusters_are_the_groups(found: tuple[Layer, Parts]) -> None:
    layer, parts = found
    assert (layer.owner[parts.shared] == -1).all()
    owners = layer.owner[parts.experts]
    assert (owners == owners[:, :1]).all()
    assert sorted(owners[:, 0]) == list(range(GROUPS))


def test_the_router_finds_the_groups_of_another_text(found: tuple[Layer, Parts]) -> None:
    layer, parts = found
    group_of = layer.owner[parts.experts[:, 0]]
    for groups in (1, 2, 3):
        wanted, x, _ = layer.text(500, groups)
        logits = x @ parts.router.T + parts.bias
        best = np.argsort(-logits, axis=1)[:, :groups]
        assert np.array_equal(np.sort(group_of[best], axis=1), np.sort(wanted, axis=1))


def test_the_same_twice_and_on_any_number_of_threads() -> None:
    layer = Layer()
    _, x, values = layer.text(600, 3)
    # Neurons that belong nowhere: there is something to decide.
    values *= np.random.default_rng(1).lognormal(size=values.shape).astype(np.float32)
    kept = values.copy()
    one, two = (
        choose_parts(x, values, layer.down, Cut(GROUPS, 2, INNER, SHARED), n) for n in (1, 3)
    )
    assert np.array_equal(values, kept)
    for a, b in ((one.shared, two.shared), (one.experts, two.experts), (one.router, two.router)):
        assert np.array_equal(a, b)


def test_a_fitted_shared_part_leaves_less_out() -> None:
    layer = Layer()
    _, x, values = layer.text(3000, 4)
    cut = Cut(GROUPS, 2, INNER, SHARED, fit_shared=True)
    # What is left out follows from what is always active, in part.
    values[:, layer.owner == -1] += 0.5 * values[:, layer.owner == 0][:, :SHARED]
    parts = choose_parts(x[:2000], values[:2000], layer.down, cut, 2)
    assert parts.correction is not None
    x, values = x[2000:], values[2000:]
    chosen = most(x @ parts.router.T + parts.bias, 2)
    missing = np.zeros((len(x), WIDTH))
    for e, neurons in enumerate(parts.experts):
        missing += (1 - chosen[:, e, None]) * values[:, neurons] @ layer.down[:, neurons].T
    left = missing - values[:, parts.shared] @ parts.correction.T
    assert np.square(left).sum() < 0.9 * np.square(missing).sum()


def test_balanced_is_near_the_best() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        gain = rng.standard_normal((6, 3))
        at = balanced(gain)
        assert np.bincount(at, minlength=3).tolist() == [2, 2, 2]
        every = set(permutations([0, 0, 1, 1, 2, 2]))
        best = max(gain[range(6), list(one)].sum() for one in every)
        reached = gain[range(6), at].sum()
        assert reached >= best - 0.25 * abs(best)
        for i, j in combinations(range(6), 2):  # no exchange of two wins anything
            other = at.copy()
            other[[i, j]] = at[[j, i]]
            assert gain[range(6), other].sum() <= reached + 1e-5


def test_neurons_go_where_they_belong_however_they_begin() -> None:
    rng = np.random.default_rng(4)
    owner = rng.permutation(np.repeat(np.arange(4), 8))
    on = np.eye(4)[rng.integers(0, 4, 400)]
    energy = (on[:, owner] * rng.uniform(0.5, 1, (400, 32))).astype(np.float32)
    for seed in range(5):
        at = cluster(energy, 4, 1, seed)
        kept = most(cluster_energy(energy, at, 4), 1) * cluster_energy(energy, at, 4)
        assert kept.sum() >= 0.99 * energy.sum()


def test_of_equals_the_first() -> None:
    values = np.array([[1, 3, 3, 2], [0, 0, 0, 0]], np.float32)
    assert most(values, 2).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("neurons", "experts", "shared", "inner", "left"),
    [
        (1536, 16, 1 / 3, 64, 512),
        (1536, 16, 0.0, 96, 0),
        (1536, 16, 0.25, 64, 512),  # 72 are no whole blocks
        (1536, 12, 0.25, 96, 384),
        (1536, 24, 0.5, 32, 768),
        (172, 4, 0.9, 32, 44),
        (11008, 16, 1 / 3, 448, 3840),
    ],
)
def test_sizes(neurons: int, experts: int, shared: float, inner: int, left: int) -> None:
    cut = nearest_cut(neurons, experts, 2, shared)
    assert (cut.inner, cut.shared, cut.neurons) == (inner, left, neurons)
    assert cut.share == (2 * inner + left) / neurons


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1536, 16, 17, 0.3), "--active is from 1 to 16"),
        ((1536, 16, 0, 0.3), "--active is from 1 to 16"),
        ((1536, 0, 1, 0.3), "--experts"),
        ((1536, 4, 5, 0.3), "--active is from 1 to 4"),
        ((1536, 16, 4, 1.0), "--shared"),
        ((1536, 16, 4, float("nan")), "--shared"),
        ((1536, 64, 4, 0.3), "too few for 64 experts"),
        ((1536, 16, 4, 0.0, True), "--fit-shared"),
    ],
)
def test_what_cannot_be_cut(arguments: tuple, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        nearest_cut(*arguments)
