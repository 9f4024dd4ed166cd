"""What routes of a text say of later ones: how often experts are chosen, and after which others.

Tables of EdgeMoE (2308.14352), P(expert | experts of the two mixtures before), and of ExFlow
(2401.08383), P(expert | experts of the one before). Before the first mixture comes the last one of
the token before. A token that takes several experts of a mixture is counted for each pair; scores
of experts are sums over the pairs of what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headrace.errors import ModelFileError
from headrace.offload.array_file import read_arrays, write_arrays
from headrace.offload.route_trace import MOST_TOKENS, NONE, RouteTrace

PAIR_BYTES = 32 << 20  # a larger table of pairs is not kept
_PRIOR = 4.0  # choices that a simpler table's opinion counts for
_KINDS = {
    "model": ("<U64", 0), "experts": ("<i8", 1), "active": ("<i8", 0), "tokens": ("<i8", 0),
    "frequency": ("<f4", 2), "affinity": ("<f2", 3), "pairs": ("<f2", 4), "rates": ("<f4", 2),
    "fitted": ("<f2", 4),
}  # fmt: skip
_WHAT = "statistics of routes by `headrace trace --learn`"


@dataclass(frozen=True)
class RouteStatistics:
    """What was learned; E is the most experts that a mixture has.

    Attributes:
        model: says which model it is (`headrace.routing.identity`).
        experts: of each mixture.
        active: experts of a token.
        tokens: that were looked at.
        frequency: share of tokens that choose an expert: float32 [mixtures, E].
        affinity: that choose the last one, where the mixture before chose the other: float16
            [mixtures, E, E].
        pairs: the same where the two mixtures before chose the others: float16
            [mixtures, E, E, E]; no mixtures, where that is more than `PAIR_BYTES`.
        rates: of `headrace.offload.routing_replay.rates`: float32 [points, 4]: share of experts
            that have room, of uses that wait for nothing, experts that are read for each use, and
            share of the first tokens' uses that wait for nothing.
        fitted: of `headrace.offload.router_fit`: float16 [mixtures, distances, E, width + 1].
    """

    model: str
    experts: np.ndarray
    active: int
    tokens: int
    frequency: np.ndarray
    affinity: np.ndarray
    pairs: np.ndarray
    rates: np.ndarray
    fitted: np.ndarray

    def rate(self, share: float) -> tuple[float, float]:
        """(uses that wait for nothing, experts read for each use), where a share has room."""
        x, hits, reads, _ = self.rates.astype(float).T
        return float(np.interp(share, x, hits)), float(np.interp(share, x, reads))

    def early_rate(self, share: float) -> tuple[float, float]:
        """The same of a text's first tokens, while few predictions have come true."""
        hits, reads = self.rate(share)
        x, *_, early = self.rates.astype(float).T
        first = min(hits, float(np.interp(share, x, early)))
        return first, max(reads, 1 - first)

    def only(self, predictor: str) -> RouteStatistics:
        """Without what other predictors need."""
        named = [name for name in ("affinity", "pairs", "fitted") if name != predictor]
        return replace(self, **{name: getattr(self, name)[:0].copy() for name in named})

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            HeadraceError: it cannot be written.
        """
        write_arrays(path, {n: np.asarray(getattr(self, n), k) for n, (k, _) in _KINDS.items()})

    def by_affinity(self, mixture: int, before: np.ndarray) -> np.ndarray:
        """Scores of a mixture's experts by what the one before chose: float32 [E]."""
        found: np.ndarray = self.affinity[mixture, before].astype(np.float32).sum(axis=0)
        return found

    def by_pairs(self, mixture: int, earlier: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Scores of a mixture's experts by what the two before chose: float32 [E]."""
        if not len(self.pairs):
            return self.by_affinity(mixture, before)
        rows = self.pairs[mixture, earlier[:, None], before[None]]
        found: np.ndarray = rows.astype(np.float32).sum(axis=(0, 1))
        return found


def learn(
    trace: RouteTrace, rates: np.ndarray, fitted: np.ndarray | None = None
) -> RouteStatistics:
    """The statistics of a text; `rates` and `fitted` are those of `RouteStatistics`."""
    chosen = trace.chosen.astype(np.int64)
    tokens, mixtures, active = chosen.shape
    e = int(trace.experts.max())
    frequency = np.zeros((mixtures, e), np.float32)
    affinity = np.zeros((mixtures, e, e), np.float16)
    keep = 2 * mixtures * e**3 <= PAIR_BYTES
    pairs = np.zeros((mixtures if keep else 0, e, e, e), np.float16)
    for m in range(mixtures):
        now = chosen[:, m]
        counts = np.bincount(now.ravel(), minlength=e)
        frequency[m] = counts / tokens
        rows, one = _before(trace, m, 1)
        seen, follows = np.zeros(e), np.zeros((e, e))
        for i in range(active):
            seen += np.bincount(one[rows, i], minlength=e)
            for k in range(active):
                np.add.at(follows, (one[rows, i], now[rows, k]), 1)
        by_one = (follows + _PRIOR * frequency[m]) / (seen[:, None] + _PRIOR)
        affinity[m] = by_one
        if not keep:
            continue
        rows, two = _before(trace, m, 2)
        seen2, follows2 = np.zeros((e, e)), np.zeros((e, e, e))
        for i in range(active):
            for j in range(active):
                np.add.at(seen2, (two[rows, i], one[rows, j]), 1)
                for k in range(active):
                    np.add.at(follows2, (two[rows, i], one[rows, j], now[rows, k]), 1)
        pairs[m] = (follows2 + _PRIOR * by_one[None]) / (seen2[..., None] + _PRIOR)
    return RouteStatistics(
        trace.model, trace.experts, active, tokens, frequency, affinity, pairs, rates,
        np.zeros((0, 0, 0, 0), np.float16) if fitted is None else fitted,
    )  # fmt: skip


def _before(trace: RouteTrace, mixture: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that have a mixture so far before, and what they chose there."""
    chosen = trace.chosen.astype(np.int64)
    tokens, mixtures, _ = chosen.shape
    back, at = divmod(mixture - distance, mixtures)  # tokens, as a negative number
    rows = np.flatnonzero(np.arange(tokens) % trace.window >= -back)
    return rows, np.roll(chosen[:, at], -back, axis=0)


def read_statistics(path: Path) -> RouteStatistics:
    """Read a file of `RouteStatistics.write`.

    Raises:
        ModelFileError: it is none, or damaged.
        HeadraceError: it cannot be read.
    """
    found = read_arrays(path, _KINDS, _WHAT)
    experts, frequency, affinity, pairs, fitted = (
        found[n] for n in ("experts", "frequency", "affinity", "pairs", "fitted")
    )
    active, tokens, rates = int(found["active"]), int(found["tokens"]), found["rates"]
    mixtures, e = frequency.shape
    wrong = None
    if not (mixtures and 0 < tokens <= MOST_TOKENS and experts.shape == (mixtures,)):
        wrong = f"it has {tokens} tokens of {mixtures} mixtures"
    elif not (0 < active <= int(experts.min()) and int(experts.max()) == e < NONE):
        wrong = f"it has mixtures of {experts.tolist()} experts"
    elif affinity.shape != (mixtures, e, e) or pairs.shape not in (
        (mixtures, e, e, e), (0, e, e, e),
    ):  # fmt: skip
        wrong = "the sizes of its arrays differ"
    elif rates.shape[0] < 1 or rates.shape[1] != 4 or not ((rates >= 0) & (rates < 1e6)).all():
        wrong = "its rates are none"
    elif (rates[:, [0, 1, 3]] > 1).any():
        wrong = "its rates are no shares"
    elif (np.diff(rates[:, 0]) <= 0).any():
        wrong = "its rates are in no order"
    elif fitted.size and (fitted.shape[0] != mixtures or fitted.shape[2] != e):
        wrong = "its routers are of another model"
    elif not np.isfinite(fitted).all():
        wrong = "its routers have what is no number"
    elif not all(((x >= 0) & (x <= 1)).all() for x in (frequency, affinity, pairs)):
        wrong = "it has shares that are none"
    if wrong is not None:
        raise ModelFileError(f"is no {_WHAT} ({wrong}): record it again", path=path)
    return RouteStatistics(
        str(found["model"]), experts, active, tokens, frequency, affinity, pairs, rates, fitted
    )
