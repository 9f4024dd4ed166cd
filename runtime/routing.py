"""Which experts a text's tokens choose, and what routers say of it ahead of time.

A text goes through the model as in a calibration (`headrace.calibration_pass`): in float32, a layer
and then an expert at a time, so that any model can be looked at in little memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headrace.arguments import thread_count, whole
from headrace.calibration import calibration_windows
from headrace.calibration_pass import CalibrationPass, Read, units_of
from headrace.choices import PROCESS_BYTES, VOCABULARY_ENTRY_BYTES
from headrace.errors import UnsupportedError
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.folders import cache_root
from headrace.learned_routes import identity, routers_of
from headrace.least_memory import check_memory
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.progress import Progress
from headrace.loaders.tiled import open_model
from headrace.offload.route_trace import DISTANCES, MOST_TOKENS, NONE, RouteTrace, ranked
from headrace.offload.router_fit import RouterFit
from headrace.planning import limit_of
from headrace.rows import read_vector
from headrace.sparse.format import Floats
from headrace.team import default_threads

TOKENS = 32768  # unless told otherwise


class _Recorder:
    """Writes down what tokens choose; a listener of `CalibrationPass`."""

    def __init__(
        self, model: ModelFile, decoder: Decoder, tokens: int, fitting: RouterFit | None
    ) -> None:
        self._fitting = fitting
        mixtures = decoder.mixtures()
        self._number = {layer: number for number, layer in enumerate(mixtures)}
        self._routers = routers_of(model, decoder)
        with TensorReader() as reader:
            self._norms = [
                read_vector(model, reader, decoder.layers[i].feed_forward_norm) for i in mixtures
            ]
        self._eps = decoder.eps
        active = {one.active for one in mixtures.values()}
        if len(active) != 1:
            raise UnsupportedError("mixtures of which tokens take different numbers of experts")
        shape = tokens, len(mixtures), active.pop()
        self.chosen = np.zeros(shape, np.uint16)
        self.ahead = np.full((DISTANCES, *shape), NONE, np.uint16)
        self.margins = np.zeros((DISTANCES, *shape), np.float16)
        # Of the last mixture, where the next one's are made of them, too.
        mapped = any(router.mapped is not None for router in self._routers)
        most = max(len(one.each) for one in mixtures.values())
        self._logits = np.zeros((tokens if mapped else 0, most), np.float32)

    @property
    def n_bytes(self) -> int:
        """What it keeps."""
        arrays = (self.chosen, self.ahead, self.margins, self._logits)
        return sum(array.nbytes for array in arrays)

    def __call__(self, layer: int, first: int, hidden: Floats, chosen: np.ndarray | None) -> None:
        here = slice(first, first + len(hidden))
        number = -1 if chosen is None else self._number[layer]
        if chosen is not None:
            self.chosen[here, number] = chosen
        scale = 1 / np.sqrt((hidden * hidden).mean(axis=1, keepdims=True) + self._eps)
        if self._fitting is not None:
            inputs = hidden * scale * self._norms[max(0, number)]
            logits = None if number < 0 else self._logits_of(number, inputs, self._logits[here])
            self._fitting.add(number, first, inputs, logits)
        before = None
        if len(self._logits) and number >= 0:
            inputs = hidden * scale * self._norms[number]
            before = self._logits_of(number, inputs, self._logits[here])
            self._logits[here] = before
        for distance in range(1, DISTANCES + 1):
            later = number + distance
            if later < len(self._routers):
                logits = self._logits_of(later, hidden * scale * self._norms[later], before)
                before = logits if len(self._logits) else None
                ranks, margins = ranked(logits, self.chosen.shape[2])
                self.ahead[distance - 1, here, later] = ranks
                self.margins[distance - 1, here, later] = margins

    def _logits_of(self, number: int, inputs: Floats, before: Floats | None) -> Floats:
        known = before if before is not None and len(before) else None
        return self._routers[number].logits(inputs, known)


def record(
    path: Path, text: str, *, tokens: int | None = None, threads: int | None = None,
    memory: int | None = None, progress: Progress | None = None, fitting: RouterFit | None = None,
) -> RouteTrace:  # fmt: skip
    """The routes of a text.

    Args:
        path: of a model.
        tokens: how much of the text; default: 32768.
        threads: default: the physical cores that this process may use.
        memory: bytes that the process may take; default: what is free.
        progress: called with (done, total, what).
        fitting: gets what routers are fitted to.

    Raises:
        UnsupportedError: the model has no mixtures of experts.
        BudgetError: a layer or an expert does not fit.
        HeadraceError: the text is too short, or hidden states cannot be kept.
        ModelFileError: the model cannot be read.
    """
    model = open_model(path)
    decoder = describe(model)
    if not decoder.mixtures():
        raise UnsupportedError("has no mixtures of experts: there are no routes to trace",
                               path=path)  # fmt: skip
    n = min(whole("tokens", TOKENS if tokens is None else tokens, low=1), MOST_TOKENS)
    n_threads = default_threads() if threads is None else thread_count(threads)
    ids = calibration_windows(model, decoder, text, n)
    limit = limit_of(memory)
    process = PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * decoder.vocabulary
    room = None if limit.n_bytes is None else limit.n_bytes - process
    recorder, units = _Recorder(model, decoder, ids.size, fitting), units_of(decoder)
    a_pass = CalibrationPass(model, decoder, ids, n_threads, room, cache_root(), recorder)
    taken, routed = recorder.n_bytes, decoder.mixtures().values()
    experts = np.array([len(one.each) for one in routed])
    if fitting is not None:
        taken += fitting.begin(len(experts), int(experts.max()), decoder.width, ids.size)
    try:
        sizes = (
            a_pass.layers.needed(one.layer, one.matrices, a_pass.held(one) - one.n_bytes)
            for one in units
        )
        check_memory(path, limit, process, [("a layer on the text", taken + max(sizes))], n_threads)
        for i, unit in enumerate(units):

            def report(share: float, i: int = i) -> None:
                if progress is not None:
                    progress(round((i + share) * 100), 100 * len(units), "tracing")

            a_pass.run(unit, taken, _ignore, report, progress)
            if (unit.index, unit.expert) == _last_needed(decoder):
                break
    finally:
        a_pass.close()
    if fitting is not None:
        fitting.end()
    if progress is not None:
        progress(1, 1, "tracing")
    return RouteTrace(
        identity(model, decoder),
        ids.shape[1],
        experts,
        np.array([len(one.computed) for one in routed]),
        recorder.chosen,
        recorder.ahead,
        recorder.margins,
    )


def _ignore(window: int, reader: int, read: Read) -> None:
    pass


def _last_needed(decoder: Decoder) -> tuple[int, None]:
    """The last unit that says what tokens choose: experts of the last mixture say nothing more."""
    return max(decoder.mixtures()), None
