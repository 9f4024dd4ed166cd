"""The sizes that a planner may choose for a model, and what they take in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headrace import plan as plans
from headrace.embedding import embedding_bytes
from headrace.families.decoder import Decoder
from headrace.kernels import kv_cache
from headrace.offload.budget import Choice, ExpertRoom
from headrace.placing import Placed, dense, padded16, streamable
from headrace.stack import Stack
from headrace.targets.target import Target

DEFAULT_CONTEXT = 4096
LEAST_CONTEXT = 256  # that is chosen where memory is short
ACTIVATION_BUDGET_BYTES = 48 << 20
MAX_CHUNK, LEAST_CHUNK = 512, 32
LEAST_LOGITS = 16  # rows of them at a time, where memory is short
KV_SHARE = 8  # where weights stream, the KV cache of a chosen context takes at most this part
ACTIVATION_SHARE = 16  # and activations this
# The interpreter with numpy, llvmlite and loaded kernels, and what a token of the vocabulary costs
# (measured on Linux with Python 3.11; docs/performance.md).
PROCESS_BYTES = 105 << 20
VOCABULARY_ENTRY_BYTES = 500
# Of rows of logits that are scored: as kernels write them, as they are given, and two to reckon.
LOGITS_COPIES = 4
# What each piece of the weights takes in plans, where some of them stream.
PIECE_BYTES = 3000


def streamed_matrices(decoder: Decoder, placed: list[Placed]) -> list[Placed]:
    """What may be streamed: not an embedding of its own, whose rows are looked up in the file."""
    tied = decoder.embedding.name == decoder.head.name
    return [p for p in placed if tied or p.matrix.name != decoder.embedding.name]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a planner may choose for a model."""

    decoder: Decoder
    placed: list[Placed]
    target: Target
    threads: int
    n_pieces: int  # of the weights that can be streamed
    stack: Stack | None = None
    logits_rows: int = 0  # that whoever scores a text would have at a time, were there room
    experts: ExpertRoom | None = None  # where they may have a cache

    def whole(self, context: int | None) -> Iterator[Choice]:
        """With all weights in memory: shorter contexts only where that is what is wanting, and
        fewer logits at a time before that.
        """
        wanted = context or min(self.decoder.context, DEFAULT_CONTEXT)
        for tokens in [wanted] if context else _halves(wanted, LEAST_CONTEXT):
            chunk = self._chunk(tokens, ACTIVATION_BUDGET_BYTES)
            for rows in self._rows():
                yield self.choice(tokens, chunk, rows)

    def streaming(self, context: int | None, limit: int | None) -> Iterator[Choice]:
        """With weights streamed: a context that leaves most memory to weights."""
        room = max(0, (limit or 0) - self._process())
        one = plans.kv_bytes(self.decoder, kv_cache.CHUNK)
        wanted = min(self.decoder.context, DEFAULT_CONTEXT)
        if context is None:
            chunks = min(room // KV_SHARE // one, wanted // kv_cache.CHUNK)
            wanted = max(min(LEAST_CONTEXT, wanted), chunks * kv_cache.CHUNK)
        activations = min(ACTIVATION_BUDGET_BYTES, room // ACTIVATION_SHARE)
        tokens = context or wanted
        for n_bytes in (activations, 0):  # the least there is, where more does not fit
            yield self.choice(tokens, self._chunk(tokens, n_bytes), self._rows_in(n_bytes))

    def same(
        self, context: int, chunk: int, limit: int | None
    ) -> tuple[list[Choice], list[Choice]]:
        """Choices of a loaded model, whose context and chunks stay: whole, and streaming.

        Logits are made when a text is scored, and may have another room each time.
        """
        room = max(0, (limit or 0) - self._process()) // ACTIVATION_SHARE
        whole = [self.choice(context, chunk, rows) for rows in self._rows()]
        small = dict.fromkeys((self._rows_in(room), self._rows_in(0)))
        return whole, [self.choice(context, chunk, rows) for rows in small]

    def _rows(self) -> Iterator[int]:
        """How many logits may be there at a time: the most that are asked for, and fewer."""
        yield from _halves(self.logits_rows, LEAST_LOGITS)

    def _rows_in(self, n_bytes: int) -> int:
        """The most of these that take no more than `n_bytes`, or the fewest."""
        *more, least = self._rows()
        return next((rows for rows in more if self._logits_bytes(rows) <= n_bytes), least)

    def _logits_bytes(self, rows: int) -> int:
        """What logits of so many tokens take, with what is reckoned with them."""
        kernels = self.target.most_tokens if rows else 0  # write whole groups of tokens
        return (rows * LOGITS_COPIES + kernels) * self.decoder.vocabulary * 4

    def _process(self) -> int:
        return PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * self.decoder.vocabulary

    def _chunk(self, context: int, n_bytes: int) -> int:
        """The longest chunk of prefill whose activations stay within `n_bytes`."""
        chunk = min(MAX_CHUNK, -(-context // 16) * 16)
        while chunk > LEAST_CHUNK:
            shape = plans.Shape(context, chunk, self.threads)
            sizes = plans.buffer_sizes(self.decoder, self.placed, self.target, shape, self.stack)
            if sum(sizes.values()) <= n_bytes + context * 1024:
                break
            chunk //= 2
        return chunk

    def choice(self, context: int, chunk: int, rows: int) -> Choice:
        """What these sizes take, with `rows` of logits at a time."""
        d = self.decoder
        shape = plans.Shape(context, chunk, self.threads)
        sizes = plans.buffer_sizes(d, self.placed, self.target, shape, self.stack)
        vectors = {v.key: v for v in d.vectors()}.values()
        fixed = {
            "vectors": sum(padded16(v.size) * 4 for v in vectors),
            "KV cache": plans.kv_bytes(d, context),
            "activations": sum(sizes.values())
            + sum(plans.table_sizes(d, shape, self.placed).values()),
            "logits": self._logits_bytes(rows),
            "the process": self._process(),
        }
        streamed = streamed_matrices(d, self.placed)
        if self.stack is not None:  # of which only blocks stream
            stay, looked_up = sum(p.n_bytes for p in self.placed), 0
        else:
            stay = sum(p.always_bytes if streamable(p) else p.n_bytes for p in streamed)
            stay -= 0 if self.experts is None else self.experts.n_bytes
            embedding = next(p for p in self.placed if p.matrix.name == d.embedding.name)
            looked_up = embedding_bytes(dense(embedding), chunk)
        steps = self.n_pieces * PIECE_BYTES
        return Choice(
            context, chunk,
            {"weights": sum(p.n_bytes for p in self.placed), **fixed},
            {"weights": stay, **fixed, "activations": fixed["activations"] + looked_up + steps},
            rows,
        )  # fmt: skip


def _halves(n: int, low: int) -> Iterator[int]:
    """A number and its halves, down to `low` or a little above."""
    yield n
    while n // 2 >= low:
        n //= 2
        yield n
