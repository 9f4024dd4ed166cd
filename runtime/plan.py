"""What a decoder's forward pass needs: its modes, kernels, buffers and their sizes.

Modes share the buffers: `decode` for one token, where every thread makes the inputs of matrix
products for itself (cheaper than a barrier), `prefill` for a chunk of tokens, and `short` for a few
of them. Reading the weights binds short chunks, not the products: there, activations of coded
weights are pairs of bytes ("q8x2"), so that their rounding does not show; in decode too, where the
CPU makes that cheap. `check` is `short` with the activations of decode (the same, on such a CPU).
What it computes for a token equals what `decode` does, bit for bit: tokens that somebody has
guessed are checked in one pass, and what is chosen is what would have been chosen one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from headrace.families.decoder import (
    Decoder,
    Experts,
    FeedForward,
    Layer,
    NeuronClusters,
    Rope,
)
from headrace.kernels import (
    attention,
    attention_decode,
    attention_prefill,
    bitstack,
    clusters,
    execute,
    expert_cache,
    expert_visits,
    experts,
    kv_cache,
    prepare,
    recall,
    zero_computation,
)
from headrace.offload import expert_store, requests
from headrace.placing import Placed, PlacedGroups, dense, kernels_for, padded16
from headrace.sparse import gqs_columns, gqs_kernels, linear
from headrace.sparse.bitstack import BlockShape
from headrace.sparse.format import TILE_ROWS, Bytes
from headrace.sparse.linear import activation_bytes
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import scratch_bytes as unpacking_bytes
from headrace.stack import Stack
from headrace.targets.table import Kernel
from headrace.targets.target import Target

# State words (int64) that steps read at run time.
COUNT, POSITION, OUT_FIRST, OUT_COUNT, ZERO, ONE, ACTIVE = range(7)
STATE_WORDS = 8

PREFILL = "prefill."  # begins the names of the buffers of long chunks
SHORT_TOKENS = 16  # chunks up to here run as `short`
REBUILT = FORMATS["q8_0"]  # what blocks of a stack are made for long chunks
LOOK_AHEAD = 4  # mixtures for which experts are asked for before they are chosen, at most
STAGING_BYTES = 512 << 10  # of a thread: so much of it lies in its cache


@dataclass(frozen=True)
class Mode:
    """What distinguishes the programs.

    Attributes:
        private: every thread makes its own inputs of products; for one token.
        large: it runs on the buffers of long chunks.
        pairs: activations of coded weights are "q8x2" instead of "q8".
        tables: where formats have them for one token, activations are tables of sums.
        columns: columns that products multiply at once, as inputs lie side by side; by the
            activations of the format.
    """

    private: bool
    large: bool
    pairs: bool
    tables: bool
    columns: Mapping[str, int]

    def kind(self, activation: str) -> str:
        """The activations that a format's kernels get; "rows" stands for blocks of a stack."""
        if activation == "rows" and self.large:
            return REBUILT.activation
        if activation == "x16" and self.large:
            return "columns"
        if activation in ("f32", "rows", "x16") or (activation == "tables" and self.tables):
            return activation
        return "q8x2" if self.pairs else "q8"

    def group(self, kind: str) -> int:
        """Tokens that lie side by side in inputs of products: two columns each in "q8x2"."""
        if kind in ("rows", "tables", "x16"):
            return 1
        if kind == "columns":
            return gqs_columns.COLUMNS
        return max(1, self.columns["q8"] // 2) if kind == "q8x2" else self.columns[kind]

    def operation(self, activation: str) -> str:
        """The kernel that multiplies them."""
        if activation == "x16":
            return "columns" if self.large else "gemm"
        if activation == "f32":
            return "gemv" if self.private else ("gemm" if self.large else "gems")
        if activation == "tables" and self.tables:
            return "gemv"
        return ("gemv" if self.private else "gemm") + ("2" if self.pairs else "")

    def alike(self, other: Mode, activations: Iterable[str]) -> bool:
        """Whether another program that is as large takes the same inputs for such formats."""
        return all(self.kind(a) == other.kind(a) for a in activations)

    @property
    def attention(self) -> tuple[str, ...]:
        """The operations of `headrace.kernels.attention` that a layer takes, in turn."""
        return ("decode",) if self.private else ("rope", "prefill" if self.large else "short")


def modes(target: Target) -> dict[str, Mode]:
    """The programs that read a prompt and answer it, by name."""
    one = {"q8": 1, "f32": 1}
    long = {activation: target.tokens(activation) for activation in one}
    few = long | {"f32": target.few_tokens}
    return {
        "decode": Mode(True, False, target.decode_pairs, True, one),
        "short": Mode(False, False, True, False, few),
        "prefill": Mode(False, True, False, False, long),
    }


def check_mode(target: Target) -> Mode:
    """The program that checks tokens; its kernels and buffers are among those of `modes`."""
    return replace(modes(target)["short"], pairs=target.decode_pairs, tables=True)


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the buffers."""

    context: int  # tokens that may be read; the KV cache has room for whole chunks
    chunk: int  # most tokens of one prefill call
    threads: int


def input_kind(kind: str) -> str:
    """What the kernels are called that make such inputs."""
    return "f32" if kind == "rows" else kind


def kernels_of(
    decoder: Decoder, placed: Iterable[Placed], target: Target, stack: Stack | None = None
) -> list[Kernel]:
    """Every kernel that a decoder's programs and its loading need."""
    placed = list(placed)
    activations = sorted({p.format.activation for p in placed})
    inputs = input_activations(placed, stack)
    all_kinds = {mode.kind(a) for mode in modes(target).values() for a in inputs}
    kinds = {input_kind(kind) for kind in all_kinds}
    rows = any(layer.attention.norm_together for layer in decoder.layers)
    producers = {"norm", "copy"} | {layer.feed_forward.producer for layer in decoder.layers}
    routed = decoder.mixtures().values()
    if any(one.router_out is not None for one in routed):
        producers.add("tanh")
    heads = {layer.attention.head for layer in decoder.layers}
    operations: dict[str, list[str]] = {
        a: ["tile", *(mode.operation(a) for mode in modes(target).values())] for a in activations
    }
    found = [
        *kernels_for(placed, decoder.embedding.name, operations),
        *(prepare.kernel(p, k) for p in sorted(producers) for k in sorted(kinds)),
        *([prepare.kernel("norm", "f32")] if rows else ()),
        *(k for head in sorted(heads) for k in attention.kernels(head).values()),
        *execute.kernels().values(),
        *(experts.all_kernels() if routed else ()),
        *(expert_visits.all_kernels() if routed else ()),
        *(clusters.all_kernels() if decoder.clustered() else ()),
        *([zero_computation.kernel()] if any(one.idle for one in routed) else ()),
        *_stack_kernels(stack),
    ]
    return list({k.name: k for k in found}.values())


def input_activations(placed: Iterable[Placed], stack: Stack | None) -> list[str]:
    """The activations that these weights are multiplied by."""
    return sorted({p.format.activation for p in placed} | ({"rows"} if stack else set()))


def _stack_kernels(stack: Stack | None) -> list[Kernel]:
    ranks = set() if stack is None else {shape.rank for shape in stack.shapes.values()}
    blocks = [k for rank in sorted(ranks) for k in bitstack.kernels(rank).values()]
    return [*blocks, linear.kernels(REBUILT)["gemm"]] if blocks else []


def staged_tiles(columns: int, target: Target, threads: int) -> int:
    """How many tiles of a matrix of a stack are rebuilt and multiplied at a time."""
    step = threads * target.gemm_tiles
    room = STAGING_BYTES * threads // REBUILT.tiled_bytes(TILE_ROWS, columns)
    return max(1, room // step) * step


@dataclass(frozen=True)
class StackRoom:
    """Bytes that products of the blocks of a stack take beside the blocks.

    Attributes:
        codes: of the coded vectors of a token; there are two halves of `tokens` of them.
        row, rebuild: of a thread's scratch.
        staging: of the tiles that are rebuilt at a time; there are two buffers.
    """

    tokens: int
    codes: int
    row: int
    rebuild: int
    staging: int

    def buffers(self, threads: int) -> dict[str, int]:
        """Bytes by buffer."""
        return {
            "codes": 2 * self.tokens * self.codes,
            "spread": threads * self.row,
            "rebuild": threads * self.rebuild,
            "staging": 2 * self.staging,
        }


def stack_room(shapes: Iterable[BlockShape], target: Target, threads: int) -> StackRoom:
    """What blocks of these shapes take."""
    shapes = list(shapes)
    return StackRoom(
        max(SHORT_TOKENS, threads),
        round_up(max(bitstack.code_bytes(one.rank, one.columns) for one in shapes), 64),
        max(bitstack.row_bytes(one.columns) for one in shapes),
        max(bitstack.rebuild_scratch_bytes(one.rank) for one in shapes),
        max(
            REBUILT.tiled_bytes(TILE_ROWS * staged_tiles(one.columns, target, threads), one.columns)
            for one in shapes
        ),
    )


def streaming_kernels(decoder: Decoder, placed: Mapping[str, Placed]) -> list[Kernel]:
    """The kernels that are needed on top of these where weights stream."""
    # Rows of the embedding that are looked up in the file are tiled before they are used.
    cached = [expert_store.kernel()] if decoder.in_parts() else []
    if decoder.mixtures():
        fitted = linear.kernels(FORMATS["f16"])["gemv"]
        cached += [*expert_cache.all_kernels(), recall.kernel(), fitted]
    return [
        *cached,
        requests.kernel(),
        linear.kernels(dense(placed[decoder.embedding.name]).format)["tile"],
    ]


def round_up(n: int, to: int) -> int:
    """The first multiple of `to` that is not below n."""
    return -(-n // to) * to


def head_chunk_bytes(layer: Layer) -> int:
    """Bytes of the keys, or of the values, of one KV head in a chunk of the cache."""
    return kv_cache.CHUNK * kv_cache.padded(layer.attention.head) * 2


def chunk_bytes(decoder: Decoder) -> int:
    """Bytes of a chunk of the cache: keys and values of all layers."""
    return sum(2 * layer.attention.kv_heads * head_chunk_bytes(layer) for layer in decoder.layers)


def kv_bytes(decoder: Decoder, context: int) -> int:
    """Bytes of the whole KV cache."""
    return round_up(context, kv_cache.CHUNK) // kv_cache.CHUNK * chunk_bytes(decoder)


def ropes_of(decoder: Decoder) -> dict[Rope, str]:
    """The rotary embeddings of a decoder and the names of their tables."""
    ropes = dict.fromkeys(layer.attention.rope for layer in decoder.layers)
    return {rope: f"rope{i}" for i, rope in enumerate(ropes)}


def n_chunks(context: int) -> int:
    """Chunks of the KV cache that attention may look at."""
    return -(-context // kv_cache.CHUNK) + 1


def scratch_bytes(decoder: Decoder) -> int:
    """Bytes of a thread's scratch in attention."""
    return round_up(
        max(
            max(
                attention_decode.decode_scratch_bytes(a.head),
                attention_prefill.prefill_scratch_bytes(a.head, a.heads // a.kv_heads),
            )
            for a in (layer.attention for layer in decoder.layers)
        ),
        64,
    )


def _gated(f: FeedForward | Experts | NeuronClusters) -> bool:
    if isinstance(f, NeuronClusters):
        return True
    return any(one.gate is not None for one in (f.computed if isinstance(f, Experts) else (f,)))


def row_widths(decoder: Decoder) -> dict[str, int]:
    """Floats in a row of each float buffer, padded to vectors."""
    q = max(layer.attention.heads * layer.attention.head for layer in decoder.layers)
    kv = max(layer.attention.kv_heads * layer.attention.head for layer in decoder.layers)
    inner = max(layer.feed_forward.inner for layer in decoder.layers)
    widest = max(max(m.rows, m.columns) for m in decoder.matrices() if m is not decoder.head)
    widths = {
        "x": decoder.width, "q": q, "k": kv, "v": kv, "attended": q, "block": decoder.width,
        "gate": inner, "up": inner, "row": max(widest, q, inner), "logits": decoder.vocabulary,
    }  # fmt: skip
    if routed := decoder.mixtures().values():
        widths |= {
            "router": max(len(one.each) for one in routed), "picked": decoder.width,
            "shared": decoder.width, "shared_gate": 1,
        }  # fmt: skip
        if any(one.router_out is not None for one in routed):
            widths["router_hidden"] = max(one.router.rows for one in routed)
        if any(one.router_map is not None for one in routed):
            widths |= dict.fromkeys(("router_map", "router_logits"), widths["router"])
        widths |= {f"ahead{i + 1}": widths["router"] for i in range(LOOK_AHEAD)}
    if decoder.clustered():
        widths["cluster"] = decoder.width
    return {name: round_up(n, 32) for name, n in widths.items()}


def cluster_sizes(decoder: Decoder, threads: int) -> dict[str, int]:
    """Bytes of the buffers that clusters of neurons have once."""
    most = max((len(one.each) for one in decoder.clustered().values()), default=0)
    sizes = {"fired": most * 8, "listed": (1 + most) * 8, "calls": threads * clusters.CALL_BYTES}
    return sizes if most else {}


def expert_sizes(decoder: Decoder, tokens: int) -> dict[str, int]:
    """Bytes of the buffers that mixtures of experts have once, for so many tokens at most."""
    routed = decoder.mixtures().values()
    if not routed:
        return {}
    choices = tokens * max(one.active for one in routed)
    sizes = {
        "chosen_weights": choices * 4, "order": choices * 8,
        "visits": expert_visits.visit_words(max(len(one.each) for one in routed)) * 8,
    }  # fmt: skip
    return sizes | {f"chosen{i}": tokens * one.active * 8 for i, one in enumerate(routed)}


def buffer_sizes(
    decoder: Decoder, placed: Iterable[Placed], target: Target, shape: Shape,
    stack: Stack | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes of every activation buffer: what planning counts is what running allocates.

    Buffers with a row for each token are there twice, for `decode` and `short`, and, with names
    that begin with "prefill.", for long chunks: those take memory when a long prompt comes.
    """
    rows = row_widths(decoder)
    heads = max(layer.attention.heads for layer in decoder.layers)
    head = max(kv_cache.padded(layer.attention.head) for layer in decoder.layers)
    widest = round_up(decoder.widest_input, 32)
    placed = list(placed)
    # Kernels write whole groups of tokens, and attention reads whole blocks of queries.
    room = {
        "": max(SHORT_TOKENS + target.most_tokens, shape.threads),
        PREFILL: round_up(shape.chunk, attention_prefill.QUERIES) + target.most_tokens,
    }
    sizes = {
        "state": STATE_WORDS * 8,
        "ids": max(room.values()) * 8,
        "row": shape.threads * rows["row"] * 4,
        "logits": target.most_tokens * rows["logits"] * 4,
        # Kernels write whole groups of tokens, none longer than `logits`.
        "few_logits": (SHORT_TOKENS + target.most_tokens - 1) * rows["logits"] * 4,
        "zeros": max(padded16(m.rows) for m in decoder.matrices()) * 4,
        "scratch": shape.threads * scratch_bytes(decoder),
        "partial": max(heads, shape.threads) * n_chunks(shape.context) * (head + 16) * 4,
        "counters": heads * 8,
    }
    sizes |= expert_sizes(decoder, max(room.values()))
    sizes |= cluster_sizes(decoder, shape.threads)
    by_token = ["x", "q", "k", "v", "attended", "block", "up"]
    by_token += ["gate"] if any(_gated(layer.feed_forward) for layer in decoder.layers) else []
    by_token += ["cluster"] if decoder.clustered() else []
    if routed := decoder.mixtures().values():
        by_token += ["router", "picked", "shared", "shared_gate"]
        by_token += [n for n in ("router_hidden", "router_map", "router_logits") if n in rows]
        # Kernels of one token may write as many as they are made for.
        sizes |= {
            f"ahead{i + 1}": target.most_tokens * rows["router"] * 4 for i in range(LOOK_AHEAD)
        }
    for prefix, tokens in room.items():
        for name in by_token:
            sizes[prefix + name] = tokens * rows[name] * 4
        for mixture in routed:
            sizes[f"{prefix}outputs"] = tokens * mixture.active * rows["block"] * 4
        sizes[f"{prefix}rotated"] = tokens * heads * head * 4
        for mode in modes(target).values():
            if mode.large == (prefix == PREFILL):
                for kind in sorted({mode.kind(a) for a in input_activations(placed, stack)}):
                    one = round_up(activation_bytes(kind, widest), 64)
                    beyond = gqs_kernels.REACH if kind == "x16" else 0
                    sizes[f"{prefix}input_{kind}"] = one * tokens + beyond
    if unpacked := unpacked_bytes(placed, target):
        sizes["unpacked"] = shape.threads * unpacked
    if records := records_bytes(placed):
        sizes["records"] = shape.threads * records
    if stack is not None:
        sizes |= stack_room(stack.shapes.values(), target, shape.threads).buffers(shape.threads)
    return sizes


def unpacked_bytes(placed: Iterable[Placed], target: Target) -> int:
    """Bytes of a thread's scratch in products of formats that are unpacked first."""
    tiles = target.gemm_tiles
    sizes = (unpacking_bytes(dense(p).format, p.matrix.columns, tiles) for p in placed)
    return max(sizes, default=0)


def records_bytes(placed: Iterable[Placed]) -> int:
    """Bytes of a thread's scratch in products of many tokens with group-sparse matrices."""
    sizes = (
        gqs_columns.scratch_bytes(p.matrix.columns, p.format.group)
        for p in placed
        if isinstance(p, PlacedGroups)
    )
    return round_up(max(sizes, default=0), 64)


def codebooks(placed: Iterable[Placed]) -> dict[str, Callable[[], Bytes]]:
    """The tables that kernels of these weights look weights up in, by the name of the format."""
    found = {fmt.name: fmt.unpacked for fmt in (dense(p).format for p in placed)}
    tables = {name: one.table for name, one in sorted(found.items()) if one is not None}
    return {name: table for name, table in tables.items() if table is not None}


def table_sizes(decoder: Decoder, shape: Shape, placed: Iterable[Placed]) -> dict[str, int]:
    """Bytes of what is worked out once, on loading, and only read: rotary embeddings, codebooks."""
    ropes = {name: shape.context * rope.width * 4 for rope, name in ropes_of(decoder).items()}
    return ropes | {name: table().nbytes for name, table in codebooks(placed).items()}
