"""What the inputs of a model's matrices are like on a text: by its own forward pass, in float32.

All windows go through one layer before the next is read (`headrace.calibration_pass`), so that one
layer is in memory at a time, and of a mixture one expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from headrace import plan as plans
from headrace.calibration_pass import CalibrationPass, Read, See, add_products, mirror, units_of
from headrace.errors import HeadraceError
from headrace.families.decoder import Decoder, Layer
from headrace.finite import check_weights
from headrace.least_memory import Need
from headrace.loaders.gguf import ModelFile
from headrace.loaders.progress import Progress
from headrace.offload.files import stamp_of
from headrace.rounding import Inputs
from headrace.sizes import format_size
from headrace.sparse.format import Floats
from headrace.statistics_cache import StatisticsCache
from headrace.tokenizer import Tokenizer

Notice = Callable[[str], None]

WINDOW = 512  # tokens
LEAST_WINDOW = plans.SHORT_TOKENS + 1  # shorter ones run through another program
TOKENS = 128 * WINDOW  # unless told otherwise
_TEXT_PIECE = 1 << 16  # characters


def calibration_windows(model: ModelFile, decoder: Decoder, text: str, tokens: int) -> np.ndarray:
    """A text's first windows of 512 tokens, or one shorter one: int64 [windows, tokens].

    Raises:
        HeadraceError: the text is too short to say anything, or the file has no usable tokenizer.
    """
    tokenizer = Tokenizer.from_metadata(model.metadata, model.paths[0])
    ids = _first_tokens(tokenizer, text, tokens)
    n = len(ids)
    window = min(WINDOW, decoder.context, n)
    if window < LEAST_WINDOW:
        raise HeadraceError(
            f"the text has {n} tokens, too short to learn from: {LEAST_WINDOW} are the least, and "
            "some ten thousand are usual; use a longer one"
        )
    windows = np.array(ids[: n // window * window], np.int64).reshape(-1, window)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        windows[:, 0] = tokenizer.bos_id
    return windows


def _first_tokens(tokenizer: Tokenizer, text: str, n: int) -> list[int]:
    """At most n tokens, read some lines at a time: the library takes 700 bytes for each."""
    ids, at = list[int](), 0
    while at < len(text) and len(ids) < n:
        end = text.rfind("\n", at, at + _TEXT_PIECE) + 1 or at + _TEXT_PIECE
        ids += tokenizer.encode(text[at:end], add_special=at == 0, parse_special=False)
        at = end
    return ids[:n]


class LayerInputs:
    """Statistics of the inputs of a model's layers on a text, in the order of the model.

    They are taken from the cache, or else collected when asked for. Use as a context.

    Attributes:
        few: experts that fewer tokens have chosen than a matrix of theirs has inputs, of those
            asked for: (layer, expert). Such a matrix has no statistics: rounding that follows
            them makes models worse, as nothing was seen of some directions.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, text: str, tokens: int, n_threads: int,
        room: int | None, progress: Progress | None = None, notice: Notice | None = None,
        watched: bool = False,
    ) -> None:  # fmt: skip
        """Cut the text; nothing is computed yet.

        Args:
            tokens: how much of the text to use.
            room: bytes that this may take at a time; None: no limit.
            progress: called with (windows done, in all, what).
            notice: called with what the user should know.
            watched: nothing but `watch` will be asked for: no statistics will be kept.

        Raises:
            HeadraceError: the text is too short, or the file has no usable tokenizer.
        """
        self._model, self._decoder, self._progress = model, decoder, progress
        self._ids = calibration_windows(model, decoder, text, tokens)
        self._threads = n_threads
        self._units = units_of(decoder)
        n_bytes = 0 if watched else sum(unit.n_bytes for unit in self._units)
        self._cache = StatisticsCache(_key(model, decoder, self._ids), n_bytes)
        if notice is not None and not self._cache.kept:
            notice(
                f"statistics of {format_size(n_bytes)} are too large to be kept for another time"
            )
        there = sum(self._cache.has(unit.name) for unit in self._units)
        if notice is not None and there and not watched:
            what = "layers" if all(unit.expert is None for unit in self._units) else "parts"
            notice(
                f"calibration: statistics of {there:,} of {len(self._units):,} {what} on this text "
                "are there from before"
            )
        self.few = set[tuple[int, int]]()
        self._of_unit: tuple[int, dict[str, tuple[Inputs, bool]]] = -1, {}
        self._index = {name: i for i, unit in enumerate(self._units) for name in unit.matrices}
        self._decoder, self._room = decoder, room
        self._pass = self._new_pass()

    def _new_pass(self) -> CalibrationPass:
        self._next = 0  # the unit that the pass has come to
        return CalibrationPass(
            self._model, self._decoder, self._ids, self._threads, self._room, self._cache.folder
        )

    def __enter__(self) -> LayerInputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._pass.close()

    def of(self, matrix: str) -> Inputs | None:
        """What a matrix reads; None if it is in no layer, or of an expert that had few tokens.

        Raises:
            BudgetError: one layer does not fit.
            KernelError: a kernel cannot be had.
            ModelFileError: the model cannot be read.
            HeadraceError: hidden states are no finite numbers (if weights are none, that is a
                ModelFileError), or cannot be kept.
        """
        found, few = self._found(matrix)
        return None if few else found

    def sums(self, matrix: str) -> Floats | None:
        """The sum of x x^T of what a matrix reads, of however few tokens; None: it is in no layer.

        Raises:
            what `of` raises.
        """
        found, _ = self._found(matrix)
        return None if found is None else found.h

    def _found(self, matrix: str) -> tuple[Inputs | None, bool]:
        """What a matrix reads, and whether of too few tokens."""
        index = self._index.get(matrix)
        if index is None:
            return None, False
        if self._of_unit[0] != index:
            self._of_unit = -1, {}
            self._of_unit = index, self._inputs_of(index)
        return self._of_unit[1][matrix]

    def held(self, matrix: str) -> int:
        """Bytes of the statistics that are in memory with those of a matrix; 0: it has none."""
        index = self._index.get(matrix)
        return 0 if index is None else self._pass.held(self._units[index])

    def needs(self) -> list[Need]:
        """What collecting the statistics takes that are not in the cache."""
        if all(self._cache.has(unit.name) for unit in self._units):
            return []
        needed, held = self._pass.layers.needed, self._pass.held
        most = max(needed(one.layer, one.matrices, held(one)) for one in self._units)
        return [("calibrating a layer", most)]

    def _inputs_of(self, index: int) -> dict[str, tuple[Inputs, bool]]:
        unit = self._units[index]
        found = self._cache.get(unit.name, unit.sizes)
        if found is None:
            if self._next > index:  # it was not kept
                self._pass.close()
                self._pass = self._new_pass()
            while self._next < index:
                if self._cache.kept:  # who asks for experts first may ask for the others then
                    self._cache.put(self._units[self._next].name, self._collect())
                else:
                    self._run(0, _ignore)
            found = self._collect()
            self._cache.put(unit.name, found)
        held, inputs = self._pass.held(unit), dict[str, tuple[Inputs, bool]]()
        for matrices, h in zip(unit.readers, found, strict=False):
            few = unit.expert is not None and float(found[-1][0, 0]) < len(h)
            if unit.expert is not None and few:
                self.few.add((unit.index, unit.expert))
            inputs |= {matrix.name: (Inputs(h, held), few) for matrix in matrices}
        return inputs

    def watch(self, index: int, taken: int, see: See) -> None:
        """Let `see` look at what the matrices of a unit read, window by window.

        Args:
            index: of `units_of`: of a layer, where there are no mixtures.
            taken: bytes that are in use for that.
            see: called with the window, the place among the unit's `readers` of those that read,
                and a function that gives what they do: float32 [inputs, tokens].

        Raises:
            what `of` raises, but for hidden states that are no finite numbers.
        """
        while self._next < index:
            self._run(0, _ignore)
        self._run(taken, see)

    def no_numbers(self, layer: int) -> HeadraceError:
        """The error of a layer that computes what is no finite number.

        Raises:
            ModelFileError: that comes of a weight of the model, which is named.
        """
        check_weights(self._model, self._decoder.matrices())
        return HeadraceError(
            f"{self._model.paths[0]}: layer {layer} computes no finite numbers on the calibration "
            "text: use another text, or do without --calibrate"
        )

    def place_of(self, matrix: str) -> tuple[int, int]:
        """The unit that a matrix is of, and its place among those that read."""
        index = self._index[matrix]
        readers = self._units[index].readers
        return index, next(i for i, some in enumerate(readers) if matrix in {m.name for m in some})

    def chosen(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that choose an expert of the layer watched last, in the order in which it sees
        them, and its weights for them: int64 [n], float32 [n].
        """
        return self._pass.chosen(expert)

    @property
    def folder(self) -> Path:
        """Where hidden states are kept."""
        return self._cache.folder

    def needs_watched(self, taken: Callable[[Layer], int]) -> list[Need]:
        """What `watch` takes, with as many bytes in use for a layer as `taken` says."""
        needed = self._pass.layers.needed
        most = max(needed(one.layer, one.matrices, taken(one.layer)) for one in self._units)
        return [("calibrating a layer", most)]

    @property
    def tokens(self) -> int:
        """How many tokens of the text are used."""
        return self._ids.size

    def _collect(self) -> list[np.ndarray]:
        """The sums of the next unit; an expert's tokens behind them."""
        unit = self._units[self._next]
        sums = [np.zeros((n, n), np.float32) for n in unit.sizes]

        def add(window: int, reader: int, read: Read) -> None:
            x = read()
            add_products(sums[reader], x, self._threads)
            if unit.expert is not None and reader == 0:
                sums[-1] += x.shape[1]

        self._run(self._pass.held(unit), add)
        for h in sums:
            mirror(h)
        if not all(np.isfinite(h).all() for h in sums):
            raise self.no_numbers(unit.index)
        return sums

    def _run(self, taken: int, see: See) -> None:
        """Bring the text through the next unit."""
        unit, n = self._units[self._next], len(self._ids)

        def report(share: float) -> None:
            if self._progress is not None:
                done, total = self._next * n + round(share * n), len(self._units) * n
                self._progress(done, total, "calibrating")

        self._pass.run(unit, taken, see, report, self._progress)
        self._next += 1


def _key(model: ModelFile, decoder: Decoder, ids: np.ndarray) -> dict[str, Any]:
    return {
        "layout": 1,
        "decoder": hashlib.sha256(repr(decoder).encode()).hexdigest(),
        "files": [(str(path.resolve()), *stamp_of(path)) for path in model.paths],
        "tokens": hashlib.sha256(ids.tobytes()).hexdigest(),
        "shape": ids.shape,
    }


def _ignore(window: int, reader: int, read: Read) -> None:
    pass
