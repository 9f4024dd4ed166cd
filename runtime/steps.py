"""A decoder's forward pass as a flat list of kernel calls, at addresses that somebody else decides.

`headrace.programs` places them in this process, `headrace.standalone` in an executable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headrace.families.decoder import Decoder, Experts, FeedForward, Layer, Matrix, Vector
from headrace.kernels import bitstack, experts, kv_cache
from headrace.offload.expert_store import SURE
from headrace.placing import Placed, PlacedGroups, PlacedMatrix, dense, padded16
from headrace.plan import (
    ACTIVE,
    COUNT,
    ONE,
    OUT_COUNT,
    OUT_FIRST,
    POSITION,
    REBUILT,
    ZERO,
    Mode,
    Shape,
    chunk_bytes,
    head_chunk_bytes,
    input_kind,
    n_chunks,
    records_bytes,
    ropes_of,
    round_up,
    row_widths,
    scratch_bytes,
    stack_room,
    staged_tiles,
    unpacked_bytes,
)
from headrace.sparse.bitstack import BlockShape
from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.linear import activation_bytes
from headrace.stack import BlockAt
from headrace.targets.target import Target
from headrace.weights import Part

OUTPUT_SLOT = 2  # of a product's argument block
SURE_ENOUGH = 0.8  # a rank of predictions is believed that is right so often


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Attributes:
        n_bytes: of weights that it reads.
        weights: the slot that has their address.
        request: number of the read that it waits for (`waits`) or is the last to need (`gives`).
        logits_at: byte of each row of logits that it writes from; None: it writes none.
        writes: slots of later steps that it writes while it runs: (steps further on, slot).
        table: its own slot that gets the address of a table of those slots' addresses.
        loop: (address of a word, steps): it goes back so many steps while the word is not 0.
    """

    kernel: str
    slots: list[Any]
    barrier: bool
    label: str
    n_bytes: int = 0
    request: int | None = None
    waits: bool = False
    gives: bool = False
    logits_at: int | None = None
    weights: int = 0
    writes: tuple[tuple[int, int], ...] = ()
    table: int = 0
    loop: tuple[int, int] | None = None


class CachePlaces(Protocol):
    """A cache of experts; mixtures are numbered in the order of their layers."""

    @property
    def address(self) -> int:
        """Of the store."""

    @property
    def first(self) -> Sequence[int]:
        """Number of the first expert of each mixture."""

    def offsets_address(self, mixture: int) -> int:
        """Of where gate, up and down of an expert lie in its slot."""

    def predictions_address(self, mixture: int) -> int:
        """Of what is predicted for a mixture."""


class Places(Protocol):
    """Where everything that steps read and write lies."""

    def embedding(self) -> int:
        """Address of tiles that have the rows of the embedding that ids stand for."""

    def parts(self, matrix: Matrix) -> Sequence[Part]:
        """All tiles of a matrix in the order in which they are read."""

    def blocks(self, matrix: Matrix) -> Sequence[BlockAt]:
        """The blocks of a matrix of a stack, the first one first."""

    def head(self, matrix: Matrix) -> int:
        """Address of the head of a group-sparse matrix."""

    def directory(self, layer: int) -> int:
        """Address of the directory of a layer's experts (`headrace.kernels.experts`)."""

    def cache(self) -> CachePlaces | None:
        """Where experts are brought when they are wanted; None: directories say where they lie."""

    def staging(self, turn: int) -> int:
        """Address of a buffer for raw rows that are tiled: one for even turns, one for odd."""

    def vector(self, name: str) -> int:
        """Address of a padded float32 vector."""

    def table(self, name: str) -> int:
        """Address of a table of `headrace.plan.table_sizes`."""

    def buffer(self, name: str, large: bool) -> int:
        """Address of a buffer of `headrace.plan.buffer_sizes`; `large`: for long chunks."""

    def kv(self) -> int:
        """Address of the KV cache."""


class Forward:
    """The forward pass of a decoder for a target.

    Weights have the formats of `placed`, or are stacks of blocks of such shapes, by matrix name.
    """

    def __init__(
        self, decoder: Decoder, placed: Mapping[str, Placed], shape: Shape, places: Places,
        target: Target, stacked: Mapping[str, BlockShape] | None = None,
    ) -> None:  # fmt: skip
        self._decoder = decoder
        self._placed = placed
        self._target = target
        self._stacked = stacked or {}
        self._shape = shape
        self._places = places
        # Asked for at every step: worked out once.
        self._row_widths = row_widths(decoder)
        self._rope_names = ropes_of(decoder)
        self._widest = max(m.columns for m in decoder.matrices())
        self._scratch_bytes = scratch_bytes(decoder)
        self._chunk_bytes = chunk_bytes(decoder)
        self._unpacked_bytes = unpacked_bytes(placed.values(), target)
        self._records_bytes = records_bytes(placed.values())
        self._resident = False
        self._turn = 0  # of the two buffers for staging, or for codes
        shapes = self._stacked.values()
        self._room = stack_room(shapes, target, shape.threads) if shapes else None
        self._mixtures = {layer: number for number, layer in enumerate(decoder.mixtures())}
        self._layer_offsets = [0]
        for layer in decoder.layers:
            size = 2 * layer.attention.kv_heads * head_chunk_bytes(layer)
            self._layer_offsets.append(self._layer_offsets[-1] + size)

    def _address(self, mode: Mode, name: str) -> int:
        return self._places.buffer(name, mode.large)

    def _word(self, word: int) -> int:
        return self._places.buffer("state", False) + 8 * word

    def _vector(self, vector: Vector | None) -> int:
        return 0 if vector is None else self._places.vector(vector.name)

    def steps(self, mode: Mode, resident: bool = False) -> list[Step]:
        """The calls of one of the modes of `headrace.plan.modes`.

        With `resident`, those blocks of a stack are left out that are streamed.
        """
        d = self._decoder
        self._resident = resident
        steps = [self._embed(mode)]
        add: tuple[str, Vector | None] | None = None  # what the next norm adds to x first
        for i, layer in enumerate(d.layers):
            a, f = layer.attention, layer.feed_forward
            steps += self._norm(mode, layer.attention_norm, add, [a.query, a.key, a.value])
            steps += self._products(mode, {"q": a.query, "k": a.key, "v": a.value})
            if a.norm_together:
                steps += self._norm_rows(mode, {"q": a.query_norm, "k": a.key_norm})
            steps += self._attention(mode, i, layer)
            steps += self._input(mode, "copy", "attended", "", a.output)
            steps += self._products(mode, {"block": a.output})
            add = ("block", layer.attention_post_norm)
            if isinstance(f, Experts):
                make = self._mixture_of_one if mode.private else self._mixture
                steps += make(mode, i, layer.feed_forward_norm, add, f)
            else:
                steps += self._norm(mode, layer.feed_forward_norm, add, [f.gate, f.up])
                steps += self._gated(mode, f, "block")
            add = ("block", layer.feed_forward_post_norm)
        steps += self._norm(mode, d.norm, add, [d.head], last=True)
        steps += self._products(mode, {"logits": d.head}, last=True)
        return steps

    def _gated(self, mode: Mode, f: FeedForward, output: str) -> list[Step]:
        """A feed-forward whose input lies ready."""
        return [
            *self._products(mode, {"gate": f.gate, "up": f.up}),
            *self._input(mode, f.activation, "gate", "up", f.down),
            *self._products(mode, {output: f.down}),
        ]

    # --- mixtures of experts ----------------------------------------------------------------------

    def _mixture_of_one(
        self, mode: Mode, index: int, norm: Vector, add: tuple[str, Vector | None] | None,
        f: Experts,
    ) -> list[Step]:  # fmt: skip
        """The experts of the only token, side by side: `route` says where their weights lie."""
        one, active, cache = f.each[0], f.active, self._places.cache()
        steps = self._norm(mode, norm, add, [*f.readers(), one.gate, one.up])
        steps += self._routed(mode, index, f)
        if cache is not None:
            steps.append(self._claim(index, f, cache))
        route = len(steps) - 1
        if cache is not None:
            steps += self._ahead(mode, index, cache)
        # What predictions and a shared expert read lies where the norm's activations were.
        if f.shared is not None:
            if cache is not None:
                steps += self._norm(mode, norm, None, [f.shared.gate, f.shared.up])
            steps += self._gated(mode, f.shared, "shared")
        if f.shared is not None or cache is not None:
            steps += self._norm(mode, norm, None, [one.gate, one.up])
        places: list[list[int]] = [[], [], []]
        waits = []
        for k in range(active):
            if cache is not None:
                waits.append(len(steps))
                slots = [cache.address, 0]
                steps.append(Step("experts_await", slots, False, f"wait for an expert {index}"))
            for m, (matrix, name) in enumerate(((one.gate, "gate"), (one.up, "up"))):
                places[m].append(len(steps))
                y = self._address(mode, name) + k * self._row_bytes(name)
                steps += self._expert(mode, matrix, self._word(ONE), y, self._row_bytes(name))
        steps[-1] = replace(steps[-1], barrier=True)
        (kind,) = self._kinds(mode, [one.down])
        steps.append(
            self._prepare(
                mode, f.activation, kind, "gate", "up", one.down.columns,
                tokens=self._word(ACTIVE),
            )
        )  # fmt: skip
        width = self._row_bytes("block")
        for k in range(active):
            places[2].append(len(steps))
            y = self._address(mode, "outputs") + k * width
            x = k * activation_bytes(kind, one.down.columns)
            steps += self._expert(mode, one.down, self._word(ONE), y, width, x)
        steps[-1] = replace(steps[-1], barrier=True)
        if cache is None:
            writes = tuple((places[m][k] - route, 0) for k in range(active) for m in range(3))
            steps[route] = replace(steps[route], writes=writes, table=9)
            return [*steps, self._combine(mode, index, f)]
        of_visits = (
            (*((places[m][k], 0) for m in range(3)), (places[2][k], OUTPUT_SLOT), (waits[k], 1))
            for k in range(active)
        )
        writes = tuple((at - route, slot) for visit in of_visits for at, slot in visit)
        steps[route] = replace(steps[route], writes=writes, table=5)
        return [*steps, self._combine(mode, index, f)]

    def _mixture(
        self, mode: Mode, index: int, norm: Vector, add: tuple[str, Vector | None] | None,
        f: Experts,
    ) -> list[Step]:  # fmt: skip
        """Expert after expert, each for all tokens of the chunk that have chosen it."""
        one, visits = f.each[0], self._places.buffer("visits", False)
        tokens = visits + 8 * experts.TOKENS
        steps = self._norm(mode, norm, add, list(f.readers()))
        steps += self._routed(mode, index, f)
        if f.shared is not None:
            steps += self._gated(mode, f.shared, "shared")
        chosen, order = self._places.buffer("chosen", False), self._places.buffer("order", False)
        slots = [
            chosen, len(f.each), f.active, self._word(COUNT), order, visits,
        ]  # fmt: skip
        steps.append(Step("experts_group", slots, True, f"group tokens {index}"))
        begin, cache = len(steps), self._places.cache()
        slots = [visits, 0, 0]
        if cache is None:
            slots[1] = self._places.directory(index)
        else:
            number = self._mixtures[index]
            slots[1] = cache.address
            slots += [cache.first[number], number, cache.offsets_address(number)]
        kernel = "experts_pick" if cache is None else "experts_visit"
        steps.append(Step(kernel, slots, True, f"pick expert {index}"))
        x, picked = self._address(mode, "x"), self._address(mode, "picked")
        slots = [visits, order, x, self._row_bytes("x"), picked, f.active]
        steps.append(Step("experts_gather", slots, True, f"gather tokens {index}"))
        weight = self._vector(norm)
        steps += [
            self._prepare(
                mode, "norm", kind, "picked", "", self._decoder.width, weight, tokens=tokens
            )
            for kind in self._kinds(mode, [one.gate, one.up])
        ]
        places = []
        for matrix, name in ((one.gate, "gate"), (one.up, "up")):
            places.append(len(steps))
            y = self._address(mode, name)
            steps += self._expert(mode, matrix, tokens, y, self._row_bytes(name))
        steps[-1] = replace(steps[-1], barrier=True)
        (kind,) = self._kinds(mode, [one.down])
        inner = one.down.columns
        steps.append(self._prepare(mode, f.activation, kind, "gate", "up", inner, tokens=tokens))
        places.append(len(steps))
        block, width = self._address(mode, "block"), self._row_bytes("block")
        steps += self._expert(mode, one.down, tokens, block, width)
        steps[-1] = replace(steps[-1], barrier=True)
        slots = [visits, order, block, width, self._address(mode, "outputs")]
        loop = visits + 8 * experts.LEFT, len(steps) - begin + 1
        steps.append(
            Step("experts_scatter", slots, True, f"outputs of an expert {index}", loop=loop)
        )
        writes = tuple((at - begin, 0) for at in places)
        steps[begin] = replace(steps[begin], writes=writes, table=2)
        return [*steps, self._combine(mode, index, f)]

    def _claim(self, index: int, f: Experts, cache: CachePlaces) -> Step:
        number = self._mixtures[index]
        slots = [
            cache.address, self._places.buffer("chosen", False), f.active, cache.first[number],
            number, 0, cache.offsets_address(number), self._places.buffer("outputs", False),
            self._row_bytes("block"), cache.predictions_address(number), f.active,
        ]  # fmt: skip
        return Step("experts_claim", slots, True, f"claim experts {index}")

    def _ahead(self, mode: Mode, index: int, cache: CachePlaces) -> list[Step]:
        """Ask ahead for what the next mixture's router chooses for what this one reads."""
        later = [i for i in self._mixtures if i > index]
        if not later:
            return []
        layer, number = self._decoder.layers[later[0]], self._mixtures[later[0]]
        f = layer.feed_forward
        assert isinstance(f, Experts)
        if any(part.request is not None for part in self._places.parts(f.router)):
            return []  # what streams comes once in a pass
        slots = [
            cache.address, self._address(mode, "router"), len(f.each),
            cache.predictions_address(number), f.active, cache.first[number], number,
            int(SURE_ENOUGH * SURE),
        ]  # fmt: skip
        return [
            *self._norm(mode, layer.feed_forward_norm, None, [f.router]),
            *self._products(mode, {"router": f.router}),
            Step("experts_predict", slots, False, f"predict experts {later[0]}"),
        ]

    def _routed(self, mode: Mode, index: int, f: Experts) -> list[Step]:
        """Which experts tokens take, and what of a shared expert's gate there is."""
        logits = {"router": f.router}
        if f.shared_gate is not None:
            logits["shared_gate"] = f.shared_gate
        slots = [
            self._address(mode, "router"), self._row_bytes("router"), len(f.each), f.active,
            int(f.normalised), self._places.buffer("chosen", False),
            self._places.buffer("chosen_weights", False),
            self._word(ONE if mode.private else COUNT),
            self._places.directory(index) if mode.private and not self._places.cache() else 0, 0,
        ]  # fmt: skip
        return [
            *self._products(mode, logits),
            Step("experts_route", slots, True, f"choose experts {index}"),
        ]

    def _expert(
        self, mode: Mode, matrix: Matrix, count: int, y: int, y_bytes: int, x: int = 0
    ) -> list[Step]:
        """A product by a matrix of an expert that another step says the address of.

        Its input, `x` bytes behind the first one, is the same for all threads but that of the norm.
        """
        placed = self._placed[matrix.name]
        assert isinstance(placed, PlacedMatrix)
        fmt, kind = placed.format, mode.kind(placed.format.activation)
        own = mode.private and matrix.rows != self._decoder.width
        slots = [
            0, self._address(mode, f"input_{kind}") + x, y, matrix.columns // fmt.block,
            padded16(matrix.rows) // TILE_ROWS, count, self._private_bytes(kind) if own else 0,
            y_bytes, self._address(mode, "zeros"),
            activation_bytes(kind, matrix.columns) * mode.group(kind), *self._unpacking(fmt),
        ]  # fmt: skip
        kernel = f"{mode.operation(fmt.activation)}_{fmt.name}"
        return [Step(kernel, slots, False, matrix.name, placed.n_bytes)]

    def _combine(self, mode: Mode, index: int, f: Experts) -> Step:
        shared, gated = f.shared is not None, f.shared_gate is not None
        slots = [
            self._address(mode, "outputs"), self._row_bytes("block"),
            self._places.buffer("chosen_weights", False), f.active,
            self._word(ONE if mode.private else COUNT), self._address(mode, "block"),
            self._row_bytes("block"), self._decoder.width,
            self._address(mode, "shared") if shared else 0, self._row_bytes("shared"),
            self._address(mode, "shared_gate") if gated else 0, self._row_bytes("shared_gate"),
        ]  # fmt: skip
        return Step("experts_combine", slots, True, f"add experts {index}")

    # --- what all layers have ---------------------------------------------------------------------

    def _norm_rows(self, mode: Mode, rows: Mapping[str, Vector | None]) -> list[Step]:
        """Normalise rows in place."""
        steps = []
        for name, norm in rows.items():
            if norm is None:
                continue
            at, n_bytes = self._address(mode, name), self._row_bytes(name)
            count = self._word(ONE if mode.private else COUNT)
            slots = [
                at, at, self._vector(norm), 0, at, norm.size, count, self._word(ZERO), n_bytes,
                n_bytes, n_bytes, 1, 0, 0, self._address(mode, "row"), self._row_bytes("row"),
                float(self._decoder.eps), 0,
            ]  # fmt: skip
            steps.append(Step("norm_f32", slots, False, f"norm of {name}"))
        steps[-1:] = [replace(step, barrier=True) for step in steps[-1:]]
        return steps

    def _row_bytes(self, name: str) -> int:
        return self._row_widths[name] * 4

    def _embed(self, mode: Mode) -> Step:
        d = self._decoder
        placed = dense(self._placed[d.embedding.name])
        x_bytes = self._row_bytes("x")
        slots = [
            self._places.embedding(), self._address(mode, "x"),
            self._address(mode, "ids"), d.width // placed.format.block,
            self._word(ONE if mode.private else COUNT), x_bytes, x_bytes if mode.private else 0,
            float(d.embedding_scale), d.width, *self._unpacking(placed.format),
        ]  # fmt: skip
        return Step(f"rows_{placed.format.name}", slots, False, "embedding")

    def _prepare(
        self, mode: Mode, producer: str, kind: str, a: str, b: str, n: int,
        weight: int = 0, post: int = 0, add: int = 0, last: bool = False, tokens: int | None = None,
    ) -> Step:  # fmt: skip
        """Make an input of products of the rows `a` (and `b`), of as many as the word `tokens` has.

        Without it, of all tokens of the pass, or, where `mode` says so, by each thread for itself.
        """
        group = mode.group(kind)
        private = mode.private and tokens is None
        place = activation_bytes(kind, n)
        a_bytes, b_bytes = self._row_bytes(a), self._row_bytes(b or a)
        x_private = a_bytes if private and a == "x" else 0
        count = self._word(ONE if private else (OUT_COUNT if last else COUNT))
        start = OUT_FIRST if last and not private else ZERO
        slots = [
            self._address(mode, a), self._address(mode, b or a), weight, post,
            self._address(mode, f"input_{kind}"), n, count if tokens is None else tokens,
            self._word(start), a_bytes, b_bytes, place * group, group, x_private,
            self._private_bytes(kind) if private else 0, self._address(mode, "row"),
            self._row_bytes("row"), float(self._decoder.eps), add,
        ]  # fmt: skip
        name = f"{producer}_{input_kind(kind)}"
        return Step(name, slots, not private, f"{producer} to {kind}")

    def _private_bytes(self, kind: str) -> int:
        return round_up(activation_bytes(kind, round_up(self._widest, 32)), 64)

    def _kinds(self, mode: Mode, matrices: list[Matrix]) -> list[str]:
        return sorted({mode.kind(self._activation(m)) for m in matrices})

    def _activation(self, matrix: Matrix) -> str:
        stacked = matrix.name in self._stacked
        return "rows" if stacked else self._placed[matrix.name].format.activation

    def _norm(
        self, mode: Mode, norm: Vector, add: tuple[str, Vector | None] | None,
        readers: list[Matrix], last: bool = False,
    ) -> list[Step]:  # fmt: skip
        """x += what the last block made; the normalised x as input, once per kind of activation."""
        steps = []
        for kind in self._kinds(mode, readers):
            b, post = add if add is not None else ("", None)
            how = 0 if add is None else (1 if post is None else 2)
            at = self._vector(norm), self._vector(post)
            steps.append(
                self._prepare(mode, "norm", kind, "x", b, self._decoder.width, *at, how, last)
            )
            add = None  # a second kind of activation reads the x that the first one updated
        return steps

    def _input(self, mode: Mode, producer: str, a: str, b: str, reader: Matrix) -> list[Step]:
        (kind,) = self._kinds(mode, [reader])
        return [self._prepare(mode, producer, kind, a, b, reader.columns)]

    def _products(self, mode: Mode, outputs: dict[str, Matrix], last: bool = False) -> list[Step]:
        steps = []
        for name, matrix in outputs.items():
            if matrix.name in self._stacked:
                make = self._rebuilt if mode.large else self._blocks
                steps += make(mode, name, matrix)
                continue
            placed = self._placed[matrix.name]
            if isinstance(placed, PlacedGroups):
                steps += self._sparse(mode, name, placed)
                continue
            for part in self._places.parts(matrix):
                steps += self._product(mode, name, matrix, part, last)
        steps[-1] = replace(steps[-1], barrier=True)
        return steps

    def _product(self, mode: Mode, name: str, matrix: Matrix, part: Part, last: bool) -> list[Step]:
        fmt = dense(self._placed[matrix.name]).format
        kind = mode.kind(fmt.activation)
        group = mode.group(kind)
        bias = self._bias(mode, matrix)
        count = ONE if mode.private else (OUT_COUNT if last else COUNT)
        weights, steps = part.address, []
        n_blocks = matrix.columns // fmt.block
        n_bytes = fmt.tiled_bytes(part.tiles * TILE_ROWS, matrix.columns)
        at = 4 * TILE_ROWS * part.tile
        if part.row_bytes:
            # Threads tile what they multiply. A buffer is used again when all have passed the
            # barrier behind its neighbour, so when none reads it any more.
            weights, self._turn = self._places.staging(self._turn), self._turn + 1
            slots = [part.address, part.row_bytes, weights, n_blocks, part.tiles]
            steps.append(
                Step(
                    f"tile_{fmt.name}", slots, True, f"tile {matrix.name}", n_bytes,
                    part.request, waits=True, gives=True,
                )
            )  # fmt: skip
        slots = [
            weights, self._address(mode, f"input_{kind}"), self._address(mode, name) + at,
            n_blocks, part.tiles, self._word(count),
            self._private_bytes(kind) if mode.private else 0, self._row_bytes(name), bias + at,
            activation_bytes(kind, matrix.columns) * group, *self._unpacking(fmt),
        ]  # fmt: skip
        streamed = part.request is not None and not part.row_bytes
        steps.append(
            Step(
                f"{mode.operation(fmt.activation)}_{fmt.name}", slots, False, matrix.name,
                0 if part.row_bytes else n_bytes,
                part.request if streamed else None, streamed, streamed, at if last else None,
            )
        )  # fmt: skip
        return steps

    def _sparse(self, mode: Mode, name: str, placed: PlacedGroups) -> list[Step]:
        """Products by a group-sparse matrix; its parts begin with the units of their rows."""
        matrix, kind = placed.matrix, mode.kind(placed.format.activation)
        kernel = f"{mode.operation(placed.format.activation)}_{placed.format.name}"
        head, steps = self._places.head(matrix), list[Step]()
        scales = head + 4 * matrix.rows + 4
        for part in self._places.parts(matrix):
            first, last = placed.rows_of(part.tile, part.tiles)
            slots = [
                head + 4 * first, scales + 4 * first, part.address,
                self._address(mode, f"input_{kind}"), self._address(mode, name) + 4 * first,
                last - first, self._word(ONE if mode.private else COUNT),
                self._private_bytes(kind) if mode.private else 0, self._row_bytes(name),
                self._bias(mode, matrix) + 4 * first,
                activation_bytes(kind, matrix.columns) * mode.group(kind),
            ]  # fmt: skip
            if kind == "columns":
                slots[7] = matrix.columns
                slots += [self._places.buffer("records", False), self._records_bytes]
            streamed = part.request is not None
            steps.append(
                Step(
                    kernel, slots, False, matrix.name,
                    placed.run_bytes(part.tile, part.tiles), part.request, streamed, streamed,
                    weights=2,
                )
            )  # fmt: skip
        return steps

    def _unpacking(self, fmt: Format) -> list[int]:
        """The slots that products and rows of an unpacked format have more than others."""
        if fmt.unpacked is None:
            return []
        return [
            self._places.buffer("unpacked", False), self._unpacked_bytes,
            self._places.table(fmt.name) if fmt.unpacked.table else 0,
        ]  # fmt: skip

    def _blocks(self, mode: Mode, name: str, matrix: Matrix) -> list[Step]:
        """Products by the blocks of a matrix, one after the other."""
        room = self._room
        assert room is not None
        shape, steps = self._stacked[matrix.name], list[Step]()
        group = bitstack.group_of(shape.rank, self._target)
        count = self._word(ONE if mode.private else COUNT)
        private = room.codes if mode.private else 0
        y, y_bytes = self._address(mode, name), self._row_bytes(name)
        start, start_bytes = self._bias(mode, matrix), 0
        for at in self._blocks_of(matrix):
            block, request = at.address, at.request
            streamed = request is not None
            # As with staging, a buffer is used again when nobody reads it any more.
            half = self._turn % 2 * room.tokens * room.codes
            codes, self._turn = self._address(mode, "codes") + half, self._turn + 1
            slots = [
                self._address(mode, "input_rows"),
                self._private_bytes("rows") if mode.private else 0,
                activation_bytes("rows", shape.columns), block + shape.v_offset, shape.rank, group,
                codes, private, room.codes, count, shape.sign_blocks, shape.columns,
                self._address(mode, "spread"), room.row,
            ]  # fmt: skip
            label = f"vectors of {matrix.name}"
            steps.append(
                Step("spread", slots, not mode.private, label, request=request, waits=streamed)
            )
            slots = [
                block, codes, private, room.codes, y, y_bytes, start, start_bytes, count,
                shape.sign_blocks, shape.tiles,
            ]  # fmt: skip
            kernel = f"signs_k{shape.rank}"
            steps.append(
                Step(
                    kernel, slots, False, matrix.name, shape.n_bytes, request=request,
                    gives=streamed,
                )
            )  # fmt: skip
            start, start_bytes = y, y_bytes
        return steps

    def _blocks_of(self, matrix: Matrix) -> list[BlockAt]:
        found = self._places.blocks(matrix)
        return [one for one in found if one.request is None or not self._resident]

    def _bias(self, mode: Mode, matrix: Matrix) -> int:
        return self._places.vector(matrix.bias) if matrix.bias else self._address(mode, "zeros")

    def _rebuilt(self, mode: Mode, name: str, matrix: Matrix) -> list[Step]:
        """Products by what the blocks of a matrix stand for, some tiles at a time."""
        room = self._room
        assert room is not None
        shape, steps = self._stacked[matrix.name], list[Step]()
        blocks = self._blocks_of(matrix)
        n_blocks = shape.columns // REBUILT.block
        at_once = staged_tiles(shape.columns, self._target, self._shape.threads)
        kind = mode.kind("rows")
        kernel = f"rebuild_k{shape.rank}"
        # A step waits for one request: for each block that streams there is a step of no tiles that
        # waits for it, and one that gives it back behind all others.
        none = [0, shape.sign_blocks, shape.columns, 0, 0, shape.tiles, 0, 0, 0]
        requests = [block.request for block in blocks if block.request is not None]
        steps += [
            Step(kernel, none, False, f"wait for {matrix.name}", request=one, waits=True)
            for one in requests
        ]
        for tile in range(0, shape.tiles, at_once):
            tiles = min(at_once, shape.tiles - tile)
            staging = self._address(mode, "staging") + self._turn % 2 * room.staging
            self._turn += 1
            slots = [
                staging, shape.sign_blocks, shape.columns, tile, tiles, shape.tiles,
                self._address(mode, "rebuild"), room.rebuild, len(blocks),
                *(block.address for block in blocks),
            ]  # fmt: skip
            steps.append(Step(kernel, slots, True, f"rebuild {matrix.name}"))
            at = 4 * TILE_ROWS * tile
            slots = [
                staging, self._address(mode, f"input_{kind}"), self._address(mode, name) + at,
                n_blocks, tiles, self._word(COUNT), 0, self._row_bytes(name),
                self._bias(mode, matrix) + at,
                activation_bytes(kind, shape.columns) * mode.group(kind),
            ]  # fmt: skip
            steps.append(Step(f"gemm_{REBUILT.name}", slots, False, matrix.name))
        steps += [
            Step(kernel, none, False, f"give back {matrix.name}", request=one, gives=True)
            for one in requests
        ]
        return steps

    def _attention(self, mode: Mode, index: int, layer: Layer) -> list[Step]:
        a = layer.attention
        stride = head_chunk_bytes(layer)
        keys = self._places.kv() + self._layer_offsets[index]

        def at(name: str) -> int:
            return self._address(mode, name)

        slots = [
            at("q"), at("k"), at("v"), keys, keys + a.kv_heads * stride,
            stride, stride, a.heads, a.kv_heads, a.head,
            a.rope.width, self._places.table(self._rope_names[a.rope]), a.rope.width * 4,
            int(a.paired),
            *(0 if a.norm_together else self._vector(norm) for norm in (a.query_norm, a.key_norm)),
            float(self._decoder.eps),
            float(a.scale), float(a.soft_cap), a.window, at("attended"), at("scratch"),
            self._scratch_bytes, at("partial"), at("counters"),
            self._word(POSITION), n_chunks(self._shape.context), self._word(COUNT),
            self._row_bytes("q"), self._row_bytes("k"), self._row_bytes("v"), at("rotated"),
            self._row_bytes("attended"), self._chunk_bytes, self._chunk_bytes,
        ]  # fmt: skip
        d = kv_cache.padded(a.head)
        return [
            Step(f"attention_{operation}_d{d}", slots, True, f"attention {operation} {index}")
            for operation in mode.attention
        ]
