"""A mixture in memory whose experts are replaced, to see what a text loses by that."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace.errors import BudgetError
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile
from headrace.model import Model
from headrace.perplexity import log_softmax, losses_of
from headrace.placing import PlacedMatrix
from headrace.planning import bounds
from headrace.sizes import format_size
from headrace.sparse.format import Floats
from headrace.tokenizer import Tokenizer
from headrace.windows import Windows, cut_text

CONTEXT = 512  # tokens of a window
WINDOWS = 8  # of the text that losses are measured on
FEW_WINDOWS = 2  # the same, of a layer
_CHARACTERS = 16  # more than a token has on average


def check_room(path: Path, context: int, logits_rows: int, memory: int | None) -> None:
    """Make sure before long work that a model can be tried: all of it has to be in memory.

    Raises:
        BudgetError: there is too little.
    """
    _, most = bounds(path, context=context, logits_rows=logits_rows)
    if memory is not None and memory < most:
        raise BudgetError(
            "to measure what experts lose, all of the source has to be in memory, which takes "
            f"{format_size(most)}; allow that (--memory), or leave out --expert-bits",
            needed_bytes=most,
        )


def last_windows(model: ModelFile, decoder: Decoder, text: str) -> Windows:
    """The last windows of a text: others than those that rounding follows, if it is long enough."""
    tokenizer = Tokenizer.from_metadata(model.metadata, model.paths[0])
    context = min(CONTEXT, decoder.context)
    found = cut_text(tokenizer, text[-WINDOWS * context * _CHARACTERS :], context, None)
    return replace(found, ids=found.ids[-WINDOWS:])


class Trial:
    """A model in memory whose experts are replaced, and what a text loses by that."""

    def __init__(self, model: Model, windows: Windows) -> None:
        """Measure the model as it is; it is in memory as a whole."""
        if model.streams:
            raise AssertionError("what streams cannot be replaced")
        self._model = model
        self._windows = list(windows)
        self._scored = windows.scored
        self._exact = [self._log_p(i) for i in range(min(FEW_WINDOWS, len(self._windows)))]
        self._base = self._loss()

    def put(self, name: str, weights: Floats) -> None:
        """Replace a matrix."""
        held = self._model._held.weights
        placed = held.placed[name]
        assert isinstance(placed, PlacedMatrix)
        fmt = placed.format
        data = np.ascontiguousarray(fmt.tile(fmt.encode(np.ascontiguousarray(weights))))
        flat, at = data.reshape(-1), 0
        for part in held.parts(name):
            n = placed.run_bytes(part.tile, part.tiles)
            ctypes.memmove(part.address, flat[at : at + n].ctypes.data, n)
            at += n

    def divergence(self) -> float:
        """The mean Kullback-Leibler divergence from the model as it was, on a few windows."""
        total, n = 0.0, 0
        for i, exact in enumerate(self._exact):
            p = np.exp(exact)
            total += float((p * (exact - self._log_p(i))).sum(dtype=np.float64))
            n += len(exact)
        return total / n

    def rise(self) -> float:
        """By which share perplexity has risen."""
        return float(np.exp(self._loss() - self._base) - 1)

    def _loss(self) -> float:
        every = [losses_of(self._log_p(i), w[1]) for i, w in enumerate(self._windows)]
        return float(np.concatenate(every).mean())

    def _log_p(self, window: int) -> Floats:
        ids, _ = self._windows[window]
        return log_softmax(self._model.logits(ids, last=self._scored)[:-1])
