"""Recurrent layers, step by step: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014).

What gates get of the inputs of all steps is one product before; here each step adds what they get
of the state in front of it. Gates are in ONNX's order: input, output, forget, cell of LSTM; update,
reset, hidden of GRU, whose state is reset behind its product (`linear_before_reset`) or before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp, tanh
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_f32,
    fma,
    fma_outer,
    join,
    load_f32,
    repeat,
    splat_f32,
    store_f32,
    sub_block,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

LSTM, GRU = 4, 3  # gates


def _sigmoid(x: Any) -> Any:
    return splat_f32(1.0) / (splat_f32(1.0) + exp(splat_f32(0.0) - x))


def sequences_at_once(target: Target) -> int:
    """At most, of a batch: weights are read once for them, and all sums are in registers."""
    return 4 if target.vector_bytes >= 64 else 1


def _recurrent(gates: int, target: Target, *, resets_first: bool = False) -> KernelFunction:
    """States of all steps, and the last ones.

    Slots: 0 what gates get of inputs [steps][sequences][directions][gates][padded], 1 weights
    (`tiled_states`), 2 y [steps][directions][sequences][padded], 3 states and 4 cells
    [directions][sequences][padded], first those to begin with, at the end the last ones (4 of GRU:
    what the hidden gate gets besides its product [directions][padded]; of one that resets first:
    room for 2 [directions][sequences][padded]), 5 steps, 6 sequences,
    7 directions, 8 channels of a state, 9 whether the only direction is backwards. Threads share
    the sequences.
    """
    most = sequences_at_once(target)

    def of(rows: int) -> Any:
        def lstm(
            x: Any, x_row: Any, gate: Any, w: Any, n: Any, h: Any, y: Any, cells: Any, row: Any,
            beside: Any,
        ) -> None:  # fmt: skip
            """16 channels of the states of some sequences."""
            first = join(load_f32(x, rows, x_row), load_f32(x + gate, rows, x_row))
            last = join(load_f32(x + 2 * gate, rows, x_row), load_f32(x + 3 * gate, rows, x_row))
            acc = join(first, last)
            for i in range(n):
                weights = load_f32(w + i * (64 * LSTM), LSTM, 64)
                acc = fma_outer(weights, bcast_f32(h + i * 4, rows, row), acc)
            enters = _sigmoid(sub_block(acc, 0, rows)) * tanh(sub_block(acc, 3 * rows, rows))
            cell = fma(_sigmoid(sub_block(acc, 2 * rows, rows)), load_f32(cells, rows, row), enters)
            store_f32(cells, cell, row)
            store_f32(y, _sigmoid(sub_block(acc, rows, rows)) * tanh(cell), row)

        def gru(
            x: Any, x_row: Any, gate: Any, w: Any, n: Any, h: Any, y: Any, cells: Any, row: Any,
            beside: Any,
        ) -> None:  # fmt: skip
            acc = join(load_f32(x, rows, x_row), load_f32(x + gate, rows, x_row))
            hidden = repeat(load_f32(cells, 1, 0), rows)
            for i in range(n):
                state = bcast_f32(h + i * 4, rows, row)
                acc = fma_outer(load_f32(w + i * (64 * GRU), 2, 64), state, acc)
                hidden = fma_outer(load_f32(w + (i * (64 * GRU) + 128), 1, 0), state, hidden)
            reset = _sigmoid(sub_block(acc, rows, rows))
            found = tanh(fma(reset, hidden, load_f32(x + 2 * gate, rows, x_row)))
            before = load_f32(h + beside, rows, row)
            store_f32(y, fma(_sigmoid(sub_block(acc, 0, rows)), before - found, found), row)

        def updated(
            x: Any, x_row: Any, gate: Any, w: Any, n: Any, h: Any, update: Any, reset: Any,
            row: Any, beside: Any,
        ) -> None:  # fmt: skip
            """What 16 channels keep of a state, and the state that the hidden gate gets of them."""
            acc = join(load_f32(x, rows, x_row), load_f32(x + gate, rows, x_row))
            for i in range(n):
                weights = load_f32(w + i * (64 * GRU), 2, 64)
                acc = fma_outer(weights, bcast_f32(h + i * 4, rows, row), acc)
            store_f32(update, _sigmoid(sub_block(acc, 0, rows)), row)
            before = load_f32(h + beside, rows, row)
            store_f32(reset, _sigmoid(sub_block(acc, rows, rows)) * before, row)

        def hidden(
            x: Any, x_row: Any, gate: Any, w: Any, n: Any, h: Any, y: Any, update: Any, reset: Any,
            row: Any, beside: Any,
        ) -> None:  # fmt: skip
            acc = load_f32(x + 2 * gate, rows, x_row)
            for i in range(n):
                weight = load_f32(w + (i * (64 * GRU) + 128), 1, 0)
                acc = fma_outer(weight, bcast_f32(reset + i * 4, rows, row), acc)
            found = tanh(acc)
            before = load_f32(h + beside, rows, row)
            store_f32(y, fma(load_f32(update, rows, row), before - found, found), row)

        channels = lstm if gates == LSTM else gru

        def all_steps(args: Any, d: Any, first: Any) -> None:
            """Of `rows` sequences from `first` on, in one direction."""
            steps = arg_int(args, 5)
            sequences = arg_int(args, 6)
            directions = arg_int(args, 7)
            n = arg_int(args, 8)
            row = (n + 15) // 16 * 64
            x_row = directions * gates * row
            start = arg_ptr(args, 3) + (d * sequences + first) * row
            weights = arg_ptr(args, 1) + d * (row // 64 * n * gates * 64)
            backwards = d + arg_int(args, 9)
            h = start
            for step in range(steps):
                t = step
                if backwards > 0:
                    t = steps - 1 - step
                x = arg_ptr(args, 0) + ((t * sequences + first) * x_row + d * gates * row)
                y = arg_ptr(args, 2) + ((t * directions + d) * sequences + first) * row
                if resets_first:
                    update = arg_ptr(args, 4) + (d * sequences + first) * row
                    reset = update + directions * sequences * row
                    for at in range(0, row, 64):
                        updated(
                            x + at, x_row, row, weights + at * n * gates, n, h, update + at,
                            reset + at, row, at,
                        )  # fmt: skip
                    for at in range(0, row, 64):
                        hidden(
                            x + at, x_row, row, weights + at * n * gates, n, h, y + at,
                            update + at, reset, row, at,
                        )  # fmt: skip
                for at in range(0, 0 if resets_first else row, 64):
                    cells = arg_ptr(args, 4) + d * row + at
                    if gates == LSTM:
                        cells = arg_ptr(args, 4) + ((d * sequences + first) * row + at)
                    channels(
                        x + at, x_row, row, weights + at * n * gates, n, h, y + at, cells, row, at,
                    )  # fmt: skip
                h = y
            for r in range(rows):
                for at in range(0, row, 64):
                    store_f32(start + (r * row + at), load_f32(h + (r * row + at), 1, 0), 0)

        return all_steps

    one, two, three, four = (of(min(rows, most)) for rows in (1, 2, 3, 4))

    def recurrent(args: Any, thread: Any, n_threads: Any) -> None:
        sequences = arg_int(args, 6)
        each = (sequences + most - 1) // most
        units = arg_int(args, 7) * each
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            d = u // each
            first = (u - d * each) * most
            left = sequences - first
            if most > 1 and left > 3:
                four(args, d, first)
            elif most > 1 and left == 3:
                three(args, d, first)
            elif most > 1 and left == 2:
                two(args, d, first)
            else:
                one(args, d, first)

    return recurrent


def start(args: Any, thread: Any, n_threads: Any) -> None:
    """Copy states to begin with, or make them zero. Threads share the vectors.

    Slots: 0 x (0: none), 1 y, 2 vectors of 16.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    given = arg_int(args, 0) != 0
    n = arg_int(args, 2)
    for v in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        value = zeros_f32(1)
        if given:
            value = load_f32(x + v * 64, 1, 0)
        store_f32(y + v * 64, value, 0)


# --- references and cases -------------------------------------------------------------------------


def tiled_states(r: np.ndarray, gates: int) -> np.ndarray:
    """Weights of states [directions, gates * n, n] as the kernel reads them.

    [direction][16 channels][channel of the state][gate][16].
    """
    import numpy as np

    directions, _, n = r.shape
    padded = np.zeros((directions, gates, -(-n // 16) * 16, n), np.float32)
    padded[:, :, :n] = r.reshape(directions, gates, n, n)
    tiles = padded.reshape(directions, gates, -1, 16, n)
    return np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3))


def reference(
    x: np.ndarray, r: np.ndarray, h: np.ndarray, c: np.ndarray, gates: int, backwards: bool,
    resets_first: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """In float64: states of all steps, the last ones, and cells (of GRU: `c` as it is).

    Args:
        x: what gates get of inputs [steps, sequences, directions, gates, n].
        r: weights of states [directions, gates * n, n].
        h, c: [directions, sequences, n] to begin with; c of GRU: [directions, n].
    """
    import numpy as np

    def sigmoid(v: np.ndarray) -> np.ndarray:
        found: np.ndarray = 1 / (1 + np.exp(-v))
        return found

    steps, sequences, directions, _, n = x.shape
    y = np.zeros((steps, directions, sequences, n))
    h, c = h.astype(np.float64), c.astype(np.float64)
    for d in range(directions):
        for t in range(steps)[:: -1 if d or backwards else 1]:
            of_state = (h[d] @ r[d].T.astype(np.float64)).reshape(sequences, gates, n)
            if gates == LSTM:
                i, o, f, g = (x[t, :, d] + of_state).transpose(1, 0, 2)
                c[d] = sigmoid(f) * c[d] + sigmoid(i) * np.tanh(g)
                h[d] = sigmoid(o) * np.tanh(c[d])
            else:
                z, reset = (sigmoid(x[t, :, d, k] + of_state[:, k]) for k in (0, 1))
                part = reset * (of_state[:, 2] + c[d])
                if resets_first:
                    part = (reset * h[d]) @ r[d, 2 * n :].T.astype(np.float64)
                hidden = np.tanh(x[t, :, d, 2] + part)
                h[d] = (1 - z) * hidden + z * h[d]
            y[t, d] = h[d]
    return y, h, c


# Steps, sequences, directions, channels of a state, backwards.
_SHAPES = ((5, 1, 1, 20, 0), (3, 6, 2, 32, 0), (4, 4, 1, 16, 1), (1, 9, 1, 7, 0), (3, 7, 2, 19, 0))


def _cases(
    gates: int, target: Target, rng: np.random.Generator, *, resets_first: bool = False
) -> Iterator[Case]:
    import numpy as np

    for steps, sequences, directions, n, backwards in _SHAPES:
        x = rng.standard_normal((steps, sequences, directions, gates, n)).astype(np.float32)
        x[0, 0, 0, :, 0], x[-1, -1, -1, :, -1] = 60, -60  # as far as gates open
        r = rng.standard_normal((directions, gates * n, n)).astype(np.float32)
        h = rng.standard_normal((directions, sequences, n)).astype(np.float32)
        c_shape = (directions, sequences, n) if gates == LSTM else (directions, n)
        c = rng.standard_normal(c_shape).astype(np.float32)
        exact = reference(x, r, h, c, gates, bool(backwards), resets_first)

        def padded(of: np.ndarray, n: int = n) -> np.ndarray:
            return np.pad(of, [(0, 0)] * (of.ndim - 1) + [(0, -n % 16)]).astype(np.float32)

        y = np.full(padded(exact[0]).shape, np.nan, np.float32)
        states, cells = padded(h), padded(c)
        if resets_first:
            cells = np.full((2, *states.shape), np.nan, np.float32)
        slots = [
            padded(x), tiled_states(r, gates), y, states, cells, steps, sequences, directions, n,
            backwards,
        ]  # fmt: skip
        # A sum is off by a unit of each term; the next step's has as many such states.
        largest = float(np.abs(r).sum(-1).max())
        off = 2.0**-22 * sum(largest**k for k in range(steps)) * (n + 16)
        expected = [(one, padded(of)) for one, of in zip((y, states, cells), exact, strict=True)]
        label = f"{steps} steps of {sequences} x {n}, {directions} directions"
        yield Case(slots, expected[: 3 if gates == LSTM else 2], min(off, 2e-3), label)


def _start_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for given in (False, True):
        x = rng.standard_normal((3, 16)).astype(np.float32)
        y = np.full_like(x, np.nan)
        expected = x.copy() if given else np.zeros_like(x)
        yield Case([x if given else 0, y, 3], [(y, expected)], 0, f"given: {given}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math")
    return [
        Kernel("lstm_f32", partial(_recurrent, LSTM), sources, partial(_cases, LSTM), __name__),
        Kernel("gru_f32", partial(_recurrent, GRU), sources, partial(_cases, GRU), __name__),
        Kernel(
            "gru_reset_first_f32",
            partial(_recurrent, GRU, resets_first=True),
            sources,
            partial(_cases, GRU, resets_first=True),
            __name__,
        ),
        Kernel("recurrent_start", same_for_all(start), sources, _start_cases, __name__),
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
