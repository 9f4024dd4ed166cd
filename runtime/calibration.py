"""What the inputs of a model's matrices are like on a text: by its own forward pass, in float32.

All windows go through one layer before the next is read, so that one layer is in memory at a time;
between layers, hidden states lie in a file that has no name. A layer runs as a decoder of its own
with the programs of `headrace.programs`, which stop where an input of matrices is ready.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from headrace import plan as plans
from headrace.errors import HeadraceError, UnsupportedError
from headrace.families.decoder import Decoder, Experts, Layer, Matrix
from headrace.least_memory import Need
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.progress import Progress
from headrace.offload.files import stamp_of
from headrace.placing import PlacedMatrix, dense, place, tiled_format
from headrace.programs import Programs
from headrace.rounding import Inputs, too_little
from headrace.rows import raw_row
from headrace.share import share
from headrace.sizes import format_size
from headrace.sparse.format import TILE_ROWS
from headrace.sparse.registry import FORMATS
from headrace.statistics_cache import StatisticsCache
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.pack import shipped
from headrace.targets.target import Target
from headrace.team import Team
from headrace.tokenizer import Tokenizer
from headrace.weights import Weights

Notice = Callable[[str], None]
Read = Callable[[], np.ndarray]
See = Callable[[int, int, Read], None]  # of `LayerInputs.watch`

WINDOW = 512  # tokens
LEAST_WINDOW = plans.SHORT_TOKENS + 1  # shorter ones run through another program
TOKENS = 128 * WINDOW  # unless told otherwise
_SQUARE = 512  # of sums, that a thread adds to at once
_LOADING_BYTES = 16 << 20  # that a thread takes when it loads and decodes weights
_TEXT_PIECE = 1 << 16  # characters
_END_ROWS = TILE_ROWS  # of embedding and head in the decoder of one layer, which uses neither


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
            f"{n} tokens of text are too short to calibrate with; {LEAST_WINDOW} are the least, "
            "and some ten thousand are usual"
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
        self._model, self._decoder = model, decoder
        self._ids = calibration_windows(model, decoder, text, tokens)
        self._threads, self._room = n_threads, room
        self._progress = progress
        n_bytes = 0 if watched else _bytes_of(decoder)
        self._cache = StatisticsCache(_key(model, decoder, self._ids), n_bytes)
        if notice is not None and not self._cache.kept:
            notice(
                f"statistics of {format_size(_bytes_of(decoder))} are too large to be kept for "
                "another time"
            )
        self._of_layer: tuple[int, dict[str, Inputs]] = -1, {}
        self._index = {
            matrix.name: i
            for i, layer in enumerate(decoder.layers)
            for matrices in readers_of(layer)
            for matrix in matrices
        }
        self._placed = {p.matrix.name: dense(p) for p in place(model, decoder, "f32")}
        self._next = 0  # the layer that the hidden states are the input of
        self._hidden: IO[bytes] | None = None
        self._target: Target | None = None
        self._team: Team | None = None

    def __enter__(self) -> LayerInputs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._hidden is not None:
            self._hidden.close()
        if self._team is not None:
            self._team.close()

    def of(self, matrix: str) -> Inputs | None:
        """What a matrix reads; None if it is in no layer. Raises what `layer` raises."""
        index = self._index.get(matrix)
        if index is None:
            return None
        if self._of_layer[0] != index:
            self._of_layer = -1, {}
            self._of_layer = index, self.layer(index)
        return self._of_layer[1][matrix]

    def held(self, matrix: str) -> int:
        """Bytes of the statistics that are in memory with those of a matrix; 0: it has none."""
        index = self._index.get(matrix)
        return 0 if index is None else _bytes_of_layer(self._decoder.layers[index])

    def needs(self) -> list[Need]:
        """What collecting the statistics takes that are not in the cache."""
        layers = self._decoder.layers
        if all(self._cache.has(i) for i in range(len(layers))):
            return []
        target = _exact_target()
        most = max(self._needed(one, target, _bytes_of_layer(one)) for one in layers)
        return [("calibrating a layer", most)]

    def layer(self, index: int) -> dict[str, Inputs]:
        """What the matrices of a layer read, by their names; those that read the same share it.

        Raises:
            BudgetError: one layer does not fit.
            KernelError: a kernel cannot be had.
            ModelFileError: the model cannot be read.
            HeadraceError: hidden states are no finite numbers, or cannot be kept.
        """
        readers = readers_of(self._decoder.layers[index])
        sizes = [matrices[0].columns for matrices in readers]
        found = self._cache.get(index, sizes)
        if found is None:
            while self._next < index:
                self._pass(self._next, collect=False)
            found = self._pass(index, collect=True)
            self._cache.put(index, found)
        held = sum(h.nbytes for h in found)
        inputs = [Inputs(h, held) for h in found]
        return {
            matrix.name: one
            for matrices, one in zip(readers, inputs, strict=True)
            for matrix in matrices
        }

    def watch(self, index: int, taken: int, see: See) -> None:
        """Let `see` look at what the matrices of a layer read, window by window.

        Args:
            taken: bytes that are in use for that.
            see: called with the window, the place in `readers_of` of those that read, and a
                function that gives what they do: float32 [inputs, tokens].

        Raises:
            what `layer` raises, but for hidden states that are no finite numbers.
        """
        while self._next < index:
            self._walk(self._next, 0, _ignore)
        self._walk(index, taken, see)

    def needs_watched(self, taken: Callable[[Layer], int]) -> list[Need]:
        """What `watch` takes, with as many bytes in use for a layer as `taken` says."""
        target = _exact_target()
        most = max(self._needed(one, target, taken(one)) for one in self._decoder.layers)
        return [("calibrating a layer", most)]

    @property
    def tokens(self) -> int:
        """How many tokens of the text are used."""
        return self._ids.size

    # --- one layer --------------------------------------------------------------------------------

    def _pass(self, index: int, *, collect: bool) -> list[np.ndarray]:
        layer = self._decoder.layers[index]
        sums = [
            np.zeros((matrices[0].columns,) * 2 if collect else (0, 0), np.float32)
            for matrices in readers_of(layer)
        ]

        def add(window: int, reader: int, read: Read) -> None:
            add_products(sums[reader], read(), self._threads)

        self._walk(index, sum(h.nbytes for h in sums), add if collect else _ignore)
        for h in sums:
            for at in range(0, len(h), _SQUARE):
                h[at:, at : at + _SQUARE] = h[at : at + _SQUARE, at:].T
        if not all(np.isfinite(h).all() for h in sums):
            raise HeadraceError(
                f"{self._model.paths[0]}: layer {index} computes no finite numbers on the "
                "calibration text; use --method rtn"
            )
        return sums

    def _walk(self, index: int, taken: int, see: See) -> None:
        """Run all windows through the layer that is next, with `taken` bytes in use beside that."""
        if index != self._next:
            raise AssertionError("layers come in the order of the model")
        layer = self._decoder.layers[index]
        target, team = self._prepare()
        programs = self._programs(layer, target, taken)
        runs = list(_runs(programs, layer))
        widths = [matrices[0].columns for matrices in readers_of(layer)]
        window, width = self._ids.shape[1], self._decoder.width
        x = programs.floats("x")[:window]
        for i in range(len(self._ids)):
            x[:] = 0
            x[:, :width] = self._load(i)
            programs.say(window, 0, window)
            for k, steps in enumerate(runs):
                team.run(steps, interruptible=True)
                if k < len(widths):
                    see(i, k, partial(_inputs, programs, target, widths[k], window))
            self._keep(i, x[:, :width])
            if self._progress is not None:
                n, layers = len(self._ids), len(self._decoder.layers)
                self._progress(index * n + i + 1, n * layers, "calibrating")
        self._next = index + 1

    def _prepare(self) -> tuple[Target, Team]:
        if self._target is None or self._team is None:
            self._target = _exact_target()
            needed = plans.kernels_of(self._decoder, self._placed.values(), self._target)
            store = shipped(needed, self._target) or KernelStore(self._target, self._threads)
            self._addresses = store.load(needed, self._progress)
            self._store = store  # the kernels go with it
            self._team = Team(self._addresses, self._threads)
            self._hidden = self._embedded()
        return self._target, self._team

    def _programs(self, layer: Layer, target: Target, taken: int) -> Programs:
        """The programs of a decoder that has this layer only, loaded."""
        part, placed, shape = self._part(layer)
        needed = self._needed(layer, target, taken)
        if self._room is not None and needed > self._room:
            raise too_little("calibrating a layer", needed, self._room)
        weights = Weights(self._model, part, placed)
        with TensorReader() as reader:
            weights.load(reader, self._addresses, self._threads)
        return Programs(part, weights, target, self._addresses, shape)

    def _part(self, layer: Layer) -> tuple[Decoder, list[PlacedMatrix], plans.Shape]:
        """The decoder that has this layer only, its matrices, and how it runs."""
        d = self._decoder
        head, embedding = _cut(d.head), _cut(d.embedding)
        part = replace(d, layers=(layer,), head=head, embedding=embedding, vocabulary=head.rows)
        placed = []
        for matrix in part.matrices():
            whole = self._placed[matrix.name]
            placed.append(whole if whole.matrix == matrix else _cut_placed(whole, matrix))
        window = self._ids.shape[1]
        return part, placed, plans.Shape(window, window, self._threads)

    def _needed(self, layer: Layer, target: Target, taken: int) -> int:
        """Bytes that running a layer takes, with `taken` bytes of statistics."""
        part, placed, shape = self._part(layer)
        sizes = plans.buffer_sizes(part, placed, target, shape)
        needed = taken + plans.kv_bytes(part, shape.context) + sum(sizes.values())
        return needed + sum(p.n_bytes for p in placed) + self._threads * _LOADING_BYTES

    # --- hidden states ----------------------------------------------------------------------------

    def _embedded(self) -> IO[bytes]:
        d = self._decoder
        placed = replace(self._placed[d.embedding.name], format=FORMATS["f32"])
        used, where = np.unique(self._ids, return_inverse=True)
        rows = np.empty((len(used), d.width), np.float32)
        with TensorReader() as reader:
            for at, row in enumerate(used.tolist()):
                rows[at] = raw_row(reader, placed, row).view(np.float32)
        rows *= np.float32(d.embedding_scale)
        file = _unnamed(self._cache.folder)
        for window in where.reshape(self._ids.shape):
            file.write(rows[window].data)
        return file

    def _load(self, window: int) -> np.ndarray:
        shape = self._ids.shape[1], self._decoder.width
        data = bytearray(4 * shape[0] * shape[1])
        file = self._file()
        file.seek(window * len(data))
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise HeadraceError("the file of hidden states was truncated")
        return np.frombuffer(data, np.float32).reshape(shape)

    def _keep(self, window: int, x: np.ndarray) -> None:
        file = self._file()
        file.seek(window * 4 * x.size)
        file.write(np.ascontiguousarray(x).data)

    def _file(self) -> IO[bytes]:
        if self._hidden is None:
            raise AssertionError("no hidden states yet")
        return self._hidden


def _key(model: ModelFile, decoder: Decoder, ids: np.ndarray) -> dict[str, Any]:
    return {
        "layout": 1,
        "decoder": hashlib.sha256(repr(decoder).encode()).hexdigest(),
        "files": [(str(path.resolve()), *stamp_of(path)) for path in model.paths],
        "tokens": hashlib.sha256(ids.tobytes()).hexdigest(),
        "shape": ids.shape,
    }


def _bytes_of(decoder: Decoder) -> int:
    return sum(map(_bytes_of_layer, decoder.layers))


def _bytes_of_layer(layer: Layer) -> int:
    return sum(4 * matrices[0].columns ** 2 for matrices in readers_of(layer))


def _exact_target() -> Target:
    """This machine, with float32 throughout."""
    return replace(pick_target(None), bf16_dot=False)


def readers_of(layer: Layer) -> list[list[Matrix]]:
    """The matrices of a layer by what they read, in the order of a pass."""
    a, f = layer.attention, layer.feed_forward
    if isinstance(f, Experts):
        raise UnsupportedError(
            "calibrating a mixture of experts is not supported yet: --method rtn"
        )
    return [[a.query, a.key, a.value], [a.output], [f.gate, f.up], [f.down]]


def _ignore(window: int, reader: int, read: Read) -> None:
    pass


def _runs(programs: Programs, layer: Layer) -> Iterator[np.ndarray]:
    """The steps of a layer, cut behind those that make an input of matrices.

    The last run ends with the norm in front of the head, which adds what the layer made to x.
    """
    producers = {f"{name}_f32" for name in ("norm", "copy", layer.feed_forward.activation)}
    program, begin = programs.prefill, 1  # behind the embedding
    for i, kernel in enumerate(program.kernels):
        if kernel in producers:
            yield np.ascontiguousarray(program.table[begin : i + 1])
            begin = i + 1


def _inputs(programs: Programs, target: Target, columns: int, tokens: int) -> np.ndarray:
    """The input that lies ready for matrices: float32 [columns, tokens]."""
    group = target.tokens("f32")
    n = -(-tokens // group)
    flat = programs.floats("input_f32").reshape(-1)[: n * columns * group]
    by_column = flat.reshape(n, columns, group).transpose(1, 0, 2).reshape(columns, n * group)
    return np.ascontiguousarray(by_column[:, :tokens])


def add_products(h: np.ndarray, x: np.ndarray, n_threads: int) -> None:
    """h += x x^T for float32 x [n, tokens], in squares of the upper triangle."""
    starts = range(0, len(h), _SQUARE)

    def add(square: tuple[int, int]) -> None:
        i, j = (slice(at, at + _SQUARE) for at in square)
        h[i, j] += x[i] @ x[j].T

    share([(i, j) for i in starts for j in starts if j >= i], add, n_threads, lambda: None)


def _cut(matrix: Matrix) -> Matrix:
    return replace(matrix, rows=min(matrix.rows, _END_ROWS))


def _cut_placed(placed: PlacedMatrix, matrix: Matrix) -> PlacedMatrix:
    """The first rows of a matrix of the file."""
    info, tiled = placed.info, tiled_format(placed.info)
    n_bytes = (
        info.n_bytes // placed.matrix.rows * matrix.rows
        if tiled is None
        else tiled.tiled_bytes(matrix.rows, matrix.columns)
    )
    cut = replace(info, shape=(matrix.rows, matrix.columns), n_bytes=n_bytes)
    return replace(placed, matrix=matrix, info=cut)


def _unnamed(folder: Path) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise HeadraceError(
            f"cannot keep hidden states in {folder}: {error.strerror}; set HEADRACE_CACHE to a "
            "directory that can be written"
        ) from error
