"""Compile a decoder's forward pass into flat lists of kernel calls over one arena of activations.

Three lists share the buffers: `decode` for one token, where every thread makes the inputs of matrix
products for itself (cheaper than a barrier), `prefill` for a chunk of tokens, and `short` for a few
of them. Reading the weights binds decode and short chunks, not the products: there, activations of
coded weights are pairs of bytes ("q8x2"), so that their rounding does not show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headrace.families.decoder import Decoder, Layer, Matrix, Rope, Vector, rope_table
from headrace.kernels import (
    attention,
    attention_decode,
    attention_prefill,
    execute,
    kv_cache,
    prepare,
)
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.sparse.linear import activation_bytes
from headrace.targets.table import Kernel
from headrace.targets.target import Target
from headrace.weights import PlacedMatrix, Weights, kernels_for, padded16

# State words (int64) that steps read at run time.
COUNT, POSITION, OUT_FIRST, OUT_COUNT, ZERO, ONE = range(6)
STATE_WORDS = 8

PREFETCH_BYTES = 1 << 14  # smaller matrices are not worth asking for ahead
PREFILL = "prefill."  # begins the names of the buffers of long chunks
SHORT_TOKENS = 16  # chunks up to here run as `short`


@dataclass(frozen=True)
class Step:
    """One kernel call: `bytes` of weights that it reads, for reports."""

    kernel: str
    slots: list[Any]
    barrier: bool
    label: str
    n_bytes: int = 0


@dataclass
class Program:
    """Steps ready to run: `table` [n, 6] for the native loop; the rest is kept alive, or shown."""

    steps: list[Step]
    table: np.ndarray
    blocks: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Mode:
    """What distinguishes the programs.

    Attributes:
        private: every thread makes its own inputs of products; for one token.
        pairs: activations of coded weights are "q8x2" instead of "q8".
        columns: columns that products multiply at once, as inputs lie side by side.
    """

    private: bool
    pairs: bool
    columns: int

    @property
    def large(self) -> bool:
        """Whether it runs on the buffers of long chunks."""
        return not self.private and not self.pairs

    def kind(self, activation: str) -> str:
        """The activations that a format's kernels get."""
        return "q8x2" if activation == "q8" and self.pairs else activation

    def group(self, kind: str) -> int:
        """Tokens that lie side by side in inputs of products: two columns each in "q8x2"."""
        return max(1, self.columns // 2) if kind == "q8x2" else self.columns

    def operation(self, activation: str) -> str:
        """The kernel that multiplies them."""
        name = "gemv" if self.private else "gemm"
        return f"{name}2" if self.kind(activation) == "q8x2" else name


def modes(target: Target) -> dict[str, Mode]:
    """The programs of a target by name."""
    return {
        "decode": Mode(True, target.decode_pairs, 1),
        "short": Mode(False, True, target.gemm_tokens),
        "prefill": Mode(False, False, target.gemm_tokens),
    }


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the buffers."""

    context: int  # tokens that may be read; the KV cache has room for whole chunks
    chunk: int  # most tokens of one prefill call
    threads: int


def kernels_of(decoder: Decoder, placed: Iterable[PlacedMatrix], target: Target) -> list[Kernel]:
    """Every kernel that a decoder's programs and its loading need."""
    placed = list(placed)
    activations = sorted({p.format.activation for p in placed})
    kinds = {mode.kind(a) for mode in modes(target).values() for a in activations}
    producers = {"norm", "copy"} | {layer.feed_forward.activation for layer in decoder.layers}
    heads = {layer.attention.head for layer in decoder.layers}
    operations: dict[str, list[str]] = {
        a: ["tile", *(mode.operation(a) for mode in modes(target).values())] for a in activations
    }
    found = [
        *kernels_for(placed, decoder.embedding.name, operations),
        *(prepare.kernel(p, k) for p in sorted(producers) for k in sorted(kinds)),
        *(k for head in sorted(heads) for k in attention.kernels(head).values()),
        *execute.kernels().values(),
    ]
    return list({k.name: k for k in found}.values())


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _head_chunk_bytes(layer: Layer) -> int:
    """Bytes of the keys, or of the values, of one KV head in a chunk of the cache."""
    return kv_cache.CHUNK * kv_cache.padded(layer.attention.head) * 2


def _chunk_bytes(decoder: Decoder) -> int:
    """Bytes of a chunk of the cache: keys and values of all layers."""
    return sum(2 * layer.attention.kv_heads * _head_chunk_bytes(layer) for layer in decoder.layers)


def kv_bytes(decoder: Decoder, context: int) -> int:
    """Bytes of the whole KV cache."""
    return _round_up(context, kv_cache.CHUNK) // kv_cache.CHUNK * _chunk_bytes(decoder)


class Programs:
    """The buffers and programs of one model."""

    def __init__(
        self, decoder: Decoder, weights: Weights, target: Target, addresses: dict[str, int],
        shape: Shape,
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.shape = shape
        self._weights = weights
        # Asked for at every step: worked out once.
        self._row_widths = _row_widths(decoder)
        self._rope_names = _ropes(decoder)
        self._widest = max(m.columns for m in decoder.matrices())
        self._scratch_bytes = _scratch_bytes(decoder)
        sizes = buffer_sizes(decoder, weights.placed.values(), target, shape)
        # Long chunks run over megabytes of activations, faster on huge pages; the rest is small.
        self.buffers = Arena(
            {n: k for n, k in sizes.items() if not n.startswith(PREFILL)}, huge=False
        )
        self._large = Arena({n: k for n, k in sizes.items() if n.startswith(PREFILL)})
        self.cache = Arena({"kv": kv_bytes(decoder, shape.context)})
        self._chunk_bytes = _chunk_bytes(decoder)
        self._layer_offsets = [0]
        for layer in decoder.layers:
            size = 2 * layer.attention.kv_heads * _head_chunk_bytes(layer)
            self._layer_offsets.append(self._layer_offsets[-1] + size)
        self.state = self.buffers.view("state", "i8")
        self.state[ONE] = 1
        self.ids = self.buffers.view("ids", "i8")
        self.logits = self.buffers.view("logits", "f4").reshape(target.gemm_tokens, -1)
        for rope, name in self._rope_names.items():
            factors = None
            if rope.factors is not None:
                factors = weights.vectors.view(rope.factors, "f4")[: rope.width // 2]
            table = self.buffers.view(name, "f4").reshape(shape.context, rope.width)
            table[:] = rope_table(rope, factors, shape.context)
        made = {
            name: self._program(self._steps(mode), addresses)
            for name, mode in modes(target).items()
        }
        self.decode, self.short, self.prefill = (
            made["decode"], made["short"], made["prefill"],
        )  # fmt: skip

    # --- building ---------------------------------------------------------------------------------

    def _program(self, steps: list[Step], addresses: dict[str, int]) -> Program:
        width = max(len(step.slots) for step in steps)
        blocks = np.zeros((len(steps), width), np.int64)
        table = np.zeros((len(steps), execute.STEP_SLOTS), np.int64)
        ahead = (0, 0)
        for i in range(len(steps) - 1, -1, -1):
            if steps[i].barrier:
                table[i, 3:5] = ahead
            if steps[i].n_bytes > PREFETCH_BYTES:
                ahead = (steps[i].slots[0], steps[i].n_bytes)
        for i, step in enumerate(steps):
            block = argument_block(step.slots)
            blocks[i, : len(block)] = block
            table[i, 0] = addresses[step.kernel]
            table[i, 1] = blocks[i].ctypes.data
            table[i, 2] = execute.STEP_BARRIER if step.barrier else 0
        return Program(steps, table, blocks)

    def _address(self, mode: Mode, name: str) -> int:
        """Where a buffer of this mode's begins."""
        if mode.large and PREFILL + name in self._large:
            return self._large.address(PREFILL + name)
        return self.buffers.address(name)

    def _word(self, word: int) -> int:
        return self.buffers.address("state") + 8 * word

    def _vector(self, vector: Vector | None) -> int:
        return 0 if vector is None else self._weights.vectors.address(vector.name)

    def _steps(self, mode: Mode) -> list[Step]:
        d = self.decoder
        steps = [self._embed(mode)]
        add: tuple[str, Vector | None] | None = None  # what the next norm adds to x first
        for i, layer in enumerate(d.layers):
            a, f = layer.attention, layer.feed_forward
            steps += self._norm(mode, layer.attention_norm, add, [a.query, a.key, a.value])
            steps += self._products(mode, {"q": a.query, "k": a.key, "v": a.value})
            steps += self._attention(mode, i, layer)
            steps += self._input(mode, "copy", "attended", "", a.output)
            steps += self._products(mode, {"block": a.output})
            add = ("block", layer.attention_post_norm)
            steps += self._norm(mode, layer.feed_forward_norm, add, [f.gate, f.up])
            steps += self._products(mode, {"gate": f.gate, "up": f.up})
            steps += self._input(mode, f.activation, "gate", "up", f.down)
            steps += self._products(mode, {"block": f.down})
            add = ("block", layer.feed_forward_post_norm)
        steps += self._norm(mode, d.norm, add, [d.head], last=True)
        steps += self._products(mode, {"logits": d.head}, last=True)
        return steps

    def _row_bytes(self, name: str) -> int:
        return self._row_widths[name] * 4

    def _embed(self, mode: Mode) -> Step:
        d = self.decoder
        placed = self._weights.placed[d.embedding.name]
        x_bytes = self._row_bytes("x")
        slots = [
            self._weights.matrices.address(d.embedding.name), self._address(mode, "x"),
            self._address(mode, "ids"), d.width // placed.format.block,
            self._word(ONE if mode.private else COUNT), x_bytes, x_bytes if mode.private else 0,
            float(d.embedding_scale), d.width,
        ]  # fmt: skip
        return Step(f"rows_{placed.format.name}", slots, False, "embedding")

    def _prepare(
        self, mode: Mode, producer: str, kind: str, a: str, b: str, n: int,
        weight: int = 0, post: int = 0, add: int = 0, last: bool = False,
    ) -> Step:  # fmt: skip
        group = mode.group(kind)
        place = activation_bytes(kind, n)
        a_bytes, b_bytes = self._row_bytes(a), self._row_bytes(b or a)
        x_private = a_bytes if mode.private and a == "x" else 0
        count = ONE if mode.private else (OUT_COUNT if last else COUNT)
        start = OUT_FIRST if last and not mode.private else ZERO
        slots = [
            self._address(mode, a), self._address(mode, b or a), weight, post,
            self._address(mode, f"input_{kind}"), n, self._word(count), self._word(start),
            a_bytes, b_bytes, place * group, group, x_private,
            self._private_bytes(kind) if mode.private else 0, self._address(mode, "row"),
            self._row_bytes("row"), float(self.decoder.eps), add,
        ]  # fmt: skip
        return Step(f"{producer}_{kind}", slots, not mode.private, f"{producer} to {kind}")

    def _private_bytes(self, kind: str) -> int:
        return _round_up(activation_bytes(kind, _round_up(self._widest, 32)), 64)

    def _kinds(self, mode: Mode, matrices: list[Matrix]) -> list[str]:
        return sorted({mode.kind(self._weights.placed[m.name].format.activation) for m in matrices})

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
                self._prepare(mode, "norm", kind, "x", b, self.decoder.width, *at, how, last)
            )
            add = None  # a second kind of activation reads the x that the first one updated
        return steps

    def _input(self, mode: Mode, producer: str, a: str, b: str, reader: Matrix) -> list[Step]:
        (kind,) = self._kinds(mode, [reader])
        return [self._prepare(mode, producer, kind, a, b, reader.columns)]

    def _products(self, mode: Mode, outputs: dict[str, Matrix], last: bool = False) -> list[Step]:
        steps = []
        for name, matrix in outputs.items():
            placed = self._weights.placed[matrix.name]
            fmt = placed.format
            kind = mode.kind(fmt.activation)
            group = mode.group(kind)
            bias = self._weights.vectors.address(matrix.bias) if matrix.bias else None
            count = ONE if mode.private else (OUT_COUNT if last else COUNT)
            slots = [
                self._weights.matrices.address(matrix.name), self._address(mode, f"input_{kind}"),
                self._address(mode, name), matrix.columns // fmt.block,
                padded16(matrix.rows) // 16, self._word(count),
                self._private_bytes(kind) if mode.private else 0, self._row_bytes(name),
                bias or self._address(mode, "zeros"),
                activation_bytes(kind, matrix.columns) * group,
            ]  # fmt: skip
            kernel = f"{mode.operation(fmt.activation)}_{fmt.name}"
            steps.append(Step(kernel, slots, False, matrix.name, placed.n_bytes))
        steps[-1] = replace(steps[-1], barrier=True)
        return steps

    def _attention(self, mode: Mode, index: int, layer: Layer) -> list[Step]:
        a = layer.attention
        stride = _head_chunk_bytes(layer)
        keys = self.cache.address("kv") + self._layer_offsets[index]

        def at(name: str) -> int:
            return self._address(mode, name)

        slots = [
            at("q"), at("k"), at("v"), keys, keys + a.kv_heads * stride,
            stride, stride, a.heads, a.kv_heads, a.head,
            a.rope.width, at(self._rope_names[a.rope]), a.rope.width * 4, int(a.paired),
            self._vector(a.query_norm), self._vector(a.key_norm), float(self.decoder.eps),
            float(a.scale), float(a.soft_cap), a.window, at("attended"), at("scratch"),
            self._scratch_bytes, at("partial"), at("counters"),
            self._word(POSITION), _chunks(self.shape.context), self._word(COUNT),
            self._row_bytes("q"), self._row_bytes("k"), self._row_bytes("v"), at("rotated"),
            self._row_bytes("attended"), self._chunk_bytes, self._chunk_bytes,
        ]  # fmt: skip
        d = kv_cache.padded(a.head)
        if mode.private:
            return [Step(f"attention_decode_d{d}", slots, True, f"attention {index}")]
        return [
            Step(f"attention_rope_d{d}", slots, True, f"rope {index}"),
            Step(f"attention_prefill_d{d}", slots, True, f"attention {index}"),
        ]

    def restore(self) -> None:
        """Clear what a run that was cut short left half done: attention counts chunks."""
        self.buffers.view("counters")[:] = 0

    def write_logits_to(self, out: np.ndarray) -> None:
        """Let prefill write logits to float32 `out` [rows, padded vocabulary], which must live."""
        for program in (self.short, self.prefill):
            program.blocks[-1, 2] = out.ctypes.data


def _ropes(decoder: Decoder) -> dict[Rope, str]:
    ropes = dict.fromkeys(layer.attention.rope for layer in decoder.layers)
    return {rope: f"rope{i}" for i, rope in enumerate(ropes)}


def _chunks(context: int) -> int:
    return -(-context // kv_cache.CHUNK) + 1


def _scratch_bytes(decoder: Decoder) -> int:
    return _round_up(
        max(
            max(
                attention_decode.decode_scratch_bytes(a.head),
                attention_prefill.prefill_scratch_bytes(a.head, a.heads // a.kv_heads),
            )
            for a in (layer.attention for layer in decoder.layers)
        ),
        64,
    )


def _row_widths(decoder: Decoder) -> dict[str, int]:
    """Floats in a row of each float buffer, padded to vectors."""
    q = max(layer.attention.heads * layer.attention.head for layer in decoder.layers)
    kv = max(layer.attention.kv_heads * layer.attention.head for layer in decoder.layers)
    inner = max(layer.feed_forward.gate.rows for layer in decoder.layers)
    widest = max(max(m.rows, m.columns) for m in decoder.matrices() if m is not decoder.head)
    widths = {
        "x": decoder.width, "q": q, "k": kv, "v": kv, "attended": q, "block": decoder.width,
        "gate": inner, "up": inner, "row": max(widest, q, inner), "logits": decoder.vocabulary,
    }  # fmt: skip
    return {name: _round_up(n, 32) for name, n in widths.items()}


def buffer_sizes(
    decoder: Decoder, placed: Iterable[PlacedMatrix], target: Target, shape: Shape
) -> dict[str, int]:
    """Bytes of every activation buffer: what planning counts is what running allocates.

    Buffers with a row for each token are there twice, for `decode` and `short`, and, with names
    that begin with "prefill.", for long chunks: those take memory when a long prompt comes.
    """
    rows = _row_widths(decoder)
    heads = max(layer.attention.heads for layer in decoder.layers)
    head = max(kv_cache.padded(layer.attention.head) for layer in decoder.layers)
    widest = _round_up(max(m.columns for m in decoder.matrices()), 32)
    placed = list(placed)
    # Kernels write whole groups of tokens, and attention reads whole blocks of queries.
    room = {
        "": max(SHORT_TOKENS + target.gemm_tokens, shape.threads),
        PREFILL: _round_up(shape.chunk, attention_prefill.QUERIES) + target.gemm_tokens,
    }
    sizes = {
        "state": STATE_WORDS * 8,
        "ids": max(room.values()) * 8,
        "row": shape.threads * rows["row"] * 4,
        "logits": target.gemm_tokens * rows["logits"] * 4,
        "zeros": max(padded16(m.rows) for m in decoder.matrices()) * 4,
        "scratch": shape.threads * _scratch_bytes(decoder),
        "partial": heads * _chunks(shape.context) * (head + 16) * 4,
        "counters": heads * 8,
    }
    for rope, name in _ropes(decoder).items():
        sizes[name] = shape.context * rope.width * 4
    for prefix, tokens in room.items():
        for name in ("x", "q", "k", "v", "attended", "block", "gate", "up"):
            sizes[prefix + name] = tokens * rows[name] * 4
        sizes[f"{prefix}rotated"] = tokens * heads * head * 4
        for mode in modes(target).values():
            if mode.large == (prefix == PREFILL):
                for kind in sorted({mode.kind(p.format.activation) for p in placed}):
                    one = _round_up(activation_bytes(kind, widest), 64)
                    sizes[f"{prefix}input_{kind}"] = one * tokens
    return sizes
