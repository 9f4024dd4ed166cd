"""What the shared part of a mixture can make up for where experts are rounded.

All tokens take the shared part, so that what rounding changes in a layer's output is known to it
as far as its neurons go with those of experts. With s what the shared part's down reads, z_e what
an expert's down V_e does (times its weight for the token), and z'_e the same of the rounded expert,
the shared part's down gets the D more that minimises, over a text,

    sum |D s - sum_e (V_e z_e - V'_e z'_e)|^2,
    D sum(s s^T) = sum_e (V_e sum(z_e s^T) - V'_e sum(z'_e s^T)),

so that sums which are taken once give D for every choice of widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from headrace.calibration import LayerInputs
from headrace.calibration_pass import Read, add_products, mirror
from headrace.errors import HeadraceError
from headrace.families.decoder import Experts, FeedForward
from headrace.least_memory import Need
from headrace.placing import Placed, PlacedMatrix, dense
from headrace.row_file import RowFile
from headrace.sparse.format import Floats

RIDGE = 0.01  # of the mean of the squares of what the shared part's down reads, added to them
_FLOAT_BITS = 16  # changed weights would be rounded, too, in formats of fewer

_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu": lambda a: a / (1 + np.exp(-1.5957691216 * (a + np.float32(0.044715) * a * a * a))),
    "relu": lambda a: np.maximum(a, 0),
}


def shared_downs(
    mixtures: Mapping[int, Experts], placed: Sequence[Placed]
) -> dict[int, PlacedMatrix]:
    """Downs of the shared parts that can make up for experts, by layer.

    A shared part has to be there for every token alike, and its down in floats.
    """
    by_name, found = {p.matrix.name: p for p in placed}, dict[int, PlacedMatrix]()
    for layer, mixture in mixtures.items():
        if mixture.shared is not None and mixture.shared_gate is None:
            down = dense(by_name[mixture.shared.down.name])
            if down.format.bits_per_weight >= _FLOAT_BITS:
                found[layer] = down
    return found


def needs(
    inputs: LayerInputs, downs: Mapping[int, PlacedMatrix], mixtures: Mapping[int, Experts],
    widths: Sequence[int],
) -> list[Need]:  # fmt: skip
    """What `SharedSums` take at a time, for the downs of `shared_downs`."""
    if not downs:
        return []
    watching, fitting = [], []
    for layer, down in downs.items():
        n, rows = down.matrix.columns, down.matrix.rows
        inner = max(one.inner for one in mixtures[layer].computed)
        watching.append(4 * (n * n + (1 + len(widths)) * inner * (n + 2 * rows)))
        fitting.append(24 * n * n + 24 * n * rows)
    most = max(watching)
    return [*inputs.needs_watched(lambda layer: most), ("fitting a shared part", max(fitting))]


@dataclass(frozen=True)
class _Layer:
    """A layer of which sums are kept: where, and its shared part's down."""

    at: int
    down: PlacedMatrix
    mixture: Experts


class SharedSums:
    """Sums over a text of which corrections of shared parts follow, in a file.

    Of a layer there are sum(s s^T), then for each expert sum(s z^T) as it is and at each width.

    Attributes:
        size: of the file.
    """

    def __init__(
        self, mixtures: Mapping[int, Experts], downs: Mapping[int, PlacedMatrix],
        widths: Sequence[int], at: int,
    ) -> None:  # fmt: skip
        """Lay out the file from the offset `at` on.

        Args:
            downs: of the shared parts that make up for rounding, by layer; see `shared_downs`.
        """
        self.widths = tuple(widths)
        self.layers = dict[int, _Layer]()
        for layer, down in downs.items():
            mixture = mixtures[layer]
            self.layers[layer] = _Layer(at, down, mixture)
            inner = [one.inner for one in mixture.computed]
            n = down.matrix.columns
            at += 4 * n * (n + (1 + len(self.widths)) * sum(inner))
        self.size = at

    def collect(
        self, layer: int, rounded: Callable[[int, int], Sequence[Floats]], inputs: LayerInputs,
        write: Callable[[int, np.ndarray], None], n_threads: int,
    ) -> None:  # fmt: skip
        """Sum up what a layer computes, which is the next one of `inputs` or a later one.

        Args:
            rounded: gives gate (if there is one) and up of an expert at a width.

        Raises:
            HeadraceError: the layer computes no finite numbers; what `LayerInputs.watch` raises.
        """
        one = self.layers[layer]
        n = one.down.matrix.columns
        squares, last = np.zeros((n, n), np.float32), 0
        common, place = inputs.place_of(one.down.matrix.name)
        with closing(RowFile(inputs.folder, n)) as rows:

            def see_shared(window: int, reader: int, read: Read) -> None:
                nonlocal last
                if reader != place:
                    return
                s = read()
                add_products(squares, s, n_threads)
                rows.write(last, s.T)
                last += s.shape[1]

            inputs.watch(common, squares.nbytes, see_shared)
            mirror(squares)
            at = _put(write, one.at, squares)
            for e in range(len(one.mixture.computed)):
                weights = [rounded(e, width) for width in self.widths]
                seen = _ExpertSums(rows, n, one.mixture.computed[e], *inputs.chosen(e), weights)
                inputs.watch(common + 1 + e, seen.n_bytes, seen.see)
                if not np.isfinite(seen.sums).all():
                    raise HeadraceError(
                        f"layer {layer} computes no finite numbers on the calibration text; use "
                        "--method search"
                    )
                at = _put(write, at, seen.sums)

    def correction(
        self, layer: int, downs: Callable[[int], tuple[int, Floats, Floats]],
        read: Callable[[int, int], bytes],
    ) -> Floats:  # fmt: skip
        """What the shared part's down gets more: float32 [width, inner].

        Args:
            downs: gives of an expert the width of gate and up, its down as it is, and rounded.
            read: bytes of what `collect` wrote.
        """
        one = self.layers[layer]
        n, at = one.down.matrix.columns, one.at

        def take(inner: int) -> Floats:
            nonlocal at
            found = np.frombuffer(read(at, 4 * n * inner), np.float32).reshape(n, inner)
            at += found.nbytes
            return found

        squares = take(n).astype(np.float64)
        squares[np.diag_indices(n)] += RIDGE * max(np.trace(squares) / n, 1e-30)
        missing = np.zeros((n, one.down.matrix.rows), np.float64)
        for e, expert in enumerate(one.mixture.computed):
            width, exact, now = downs(e)
            as_it_is, *at_widths = (take(expert.inner) for _ in range(1 + len(self.widths)))
            missing += as_it_is @ exact.T - at_widths[self.widths.index(width)] @ now.T
        return np.ascontiguousarray(np.linalg.solve(squares, missing).T, np.float32)


class _ExpertSums:
    """The sums of an expert.

    Args:
        rows: what the shared part's down, of `n` columns, reads for each token.
        tokens, shares: those that choose the expert, and its weights for them.
        weights: gate (if there is one) and up as they are at each width.
    """

    def __init__(
        self, rows: RowFile, n: int, expert: FeedForward, tokens: np.ndarray, shares: Floats,
        weights: Sequence[Sequence[Floats]],
    ) -> None:  # fmt: skip
        self._rows, self._tokens, self._shares, self._weights = rows, tokens, shares, weights
        self._activation, self._seen = expert.activation, 0
        self._s = np.empty((0, n), np.float32)
        self.sums = np.zeros((1 + len(weights), n, expert.inner), np.float32)

    @property
    def n_bytes(self) -> int:
        """Of sums and weights."""
        return self.sums.nbytes + sum(m.nbytes for some in self._weights for m in some)

    def see(self, window: int, reader: int, read: Read) -> None:
        """Add some tokens; see `LayerInputs.watch`."""
        x = read()
        if reader:
            self.sums[0] += self._s.T @ x.T
            return
        some = slice(self._seen, self._seen + x.shape[1])
        self._seen = some.stop
        self._s = np.empty((x.shape[1], self._s.shape[1]), np.float32)
        self._rows.gather(self._tokens[some], self._s)
        self._s *= self._shares[some, None]
        for k, matrices in enumerate(self._weights, 1):
            self.sums[k] += self._s.T @ _inner(self._activation, matrices, x).T


def _put(write: Callable[[int, np.ndarray], None], at: int, sums: Floats) -> int:
    write(at, sums.reshape(-1).view(np.uint8))
    end: int = at + sums.nbytes
    return end


@np.errstate(over="ignore")
def _inner(activation: str, matrices: Sequence[Floats], x: Floats) -> Floats:
    """What down reads: float32 [inner, tokens], for x [width, tokens]."""
    *gate, up = (m @ x for m in matrices)
    act = _ACTIVATIONS[activation]
    return act(gate[0]) * up if gate else act(up)
