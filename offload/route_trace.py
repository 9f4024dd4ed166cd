"""Which experts a text's tokens chose, and what was predicted: a file to compare policies on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.errors import ModelFileError
from headrace.offload.array_file import read_arrays, write_arrays

NONE = 65535  # in place of an expert: nothing was predicted
MOST_TOKENS = 1 << 20
DISTANCES = 2
_KINDS = {
    "model": ("<U64", 0), "window": ("<i8", 0), "experts": ("<i8", 1), "computed": ("<i8", 1),
    "chosen": ("<u2", 3), "ahead": ("<u2", 4), "margins": ("<f2", 4),
}  # fmt: skip
_WHAT = "record of routes by `headrace trace`"


@dataclass(frozen=True)
class RouteTrace:
    """The routes of a text.

    Attributes:
        model: says which model it is (`headrace.routing.identity`).
        window: tokens; so many at a time were read from an empty context.
        experts: of each mixture; of these the first `computed` have weights, the others none.
        chosen: uint16 [tokens, mixtures, active], the best first.
        ahead: uint16 [distances, tokens, mixtures, active]: what a mixture's router says of the
            hidden states that were there 1, 2 ... mixtures before, the best first; in front of the
            first mixture those are embeddings, and before that there is nothing (`NONE`).
        margins: by how much each is above the first that is not predicted: float16, the same shape.
    """

    model: str
    window: int
    experts: np.ndarray
    computed: np.ndarray
    chosen: np.ndarray
    ahead: np.ndarray
    margins: np.ndarray

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            HeadraceError: it cannot be written.
        """
        arrays = {
            "model": np.array(self.model, "<U64"), "window": np.array(self.window, "<i8"),
            "experts": self.experts, "computed": self.computed, "chosen": self.chosen,
            "ahead": self.ahead, "margins": self.margins,
        }  # fmt: skip
        write_arrays(path, {n: np.asarray(a, _KINDS[n][0]) for n, a in arrays.items()})


def ranked(scores: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The best n of rows of scores, and by how much they are above the next: both [..., n]."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., : n + 1]
    best = np.take_along_axis(scores, order, axis=-1)
    ranks: np.ndarray = order[..., :n]
    # Without a next one all are sure.
    margins = best[..., :n] - best[..., n:] if best.shape[-1] > n else np.ones(ranks.shape, "f4")
    return ranks, np.minimum(margins, 60000.0)


def read_trace(path: Path) -> RouteTrace:
    """Read a file of `RouteTrace.write`.

    Raises:
        ModelFileError: it is none, or damaged.
        HeadraceError: it cannot be read.
    """
    found = read_arrays(path, _KINDS, _WHAT)
    chosen, ahead, experts = found["chosen"], found["ahead"], found["experts"]
    window, margins, computed = int(found["window"]), found["margins"], found["computed"]
    tokens, mixtures, active = chosen.shape
    wrong = None
    if not (0 < tokens <= MOST_TOKENS and mixtures and active and 0 < window <= MOST_TOKENS):
        wrong = f"it has {tokens} tokens of {mixtures} mixtures in windows of {window}"
    elif experts.shape != (mixtures,) or ahead.shape != (DISTANCES, *chosen.shape):
        wrong = "the sizes of its arrays differ"
    elif not ((experts >= active) & (experts < NONE)).all():
        wrong = f"it has mixtures of {experts.tolist()} experts"
    elif computed.shape != experts.shape or not ((computed > 0) & (computed <= experts)).all():
        wrong = f"of its experts {computed.tolist()} have weights"
    elif not (chosen < experts[:, None]).all():
        wrong = "a token has chosen an expert that there is not"
    elif not ((ahead < experts[:, None]) | (ahead == NONE)).all():
        wrong = "an expert is predicted that there is not"
    elif ((ahead == NONE).any(axis=3) != (ahead == NONE).all(axis=3)).any():
        wrong = "a prediction is cut short"
    elif margins.shape != ahead.shape or not (margins >= 0).all():
        wrong = "its margins are none"
    elif (np.diff(np.sort(chosen, axis=2).astype(np.int64), axis=2) == 0).any():
        wrong = "a token has chosen an expert twice"
    if wrong is not None:
        raise ModelFileError(f"is no {_WHAT} ({wrong}): record it again", path=path)
    return RouteTrace(str(found["model"]), window, experts, computed, chosen, ahead, margins)
