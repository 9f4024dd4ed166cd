"""One number for everything: which context, window and weights fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.errors import BudgetError
from headrace.offload.pieces import LEAST_SLOTS, Piece, Residency, keep, least_bytes
from headrace.offload.prefix import Ranked, keep_first
from headrace.offload.prefix import least_bytes as rest_bytes
from headrace.sizes import format_size

SHORTEST_CONTEXT = 256  # the KV cache has no smaller part


@dataclass(frozen=True)
class Limit:
    """Bytes that a process may have (None: unknown), and why, for messages."""

    n_bytes: int | None = None
    said: str = ""


@dataclass(frozen=True)
class Choice:
    """Sizes that the planner may choose, and what they take beside the weights that can stream.

    Attributes:
        context, chunk: tokens.
        logits_rows: tokens whose logits are there at a time, where a text is scored.
        whole: bytes by what they are for, if all weights stay in memory.
        streaming: the same if some do not.
    """

    context: int
    chunk: int
    whole: Mapping[str, int]
    streaming: Mapping[str, int]
    logits_rows: int = 0


@dataclass(frozen=True)
class ExpertRoom:
    """What a cache of experts takes.

    Attributes:
        slot_bytes: of the memory of an expert.
        least: slots that a pass needs; `count`: there are no more experts.
        beside: bytes that readers take.
        n_bytes: of all experts as weights.
    """

    slot_bytes: int
    least: int
    count: int
    beside: int
    n_bytes: int

    def cache_bytes(self, slots: int) -> int:
        """Bytes of a cache of so many slots."""
        return slots * self.slot_bytes + self.beside


@dataclass(frozen=True)
class Fit:
    """What was chosen; without a residency all weights stay in memory, and `blocks` of a stack.

    With `slots`, experts do not: so many of them have room.
    """

    choice: Choice
    residency: Residency | None = None
    blocks: int = 0
    block_bytes: int = 0
    slots: int = 0
    expert_bytes: int = 0
    dense_bytes: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        if self.slots:
            parts = dict(self.choice.streaming)
            kept = self.dense_bytes if self.residency is None else self.residency.kept_bytes
            parts["weights"] = parts.get("weights", 0) + kept
            parts["experts"] = self.expert_bytes
            return parts | ({"window": self.residency.window_bytes} if self.residency else {})
        if self.residency is None:
            parts = dict(self.choice.whole)
            parts["weights"] = parts.get("weights", 0) + self.block_bytes
            return parts
        r = self.residency
        parts = dict(self.choice.streaming)
        parts["weights"] = parts.get("weights", 0) + r.kept_bytes
        return parts | {"window": r.window_bytes}


def fit(
    limit: Limit, whole: Iterable[Choice], streaming: Iterable[Choice],
    pieces: Sequence[Piece], model: str,
) -> Fit:  # fmt: skip
    """Choose: everything in memory if that fits, else the residency that keeps most.

    Args:
        limit: of the process.
        whole: choices for that, the best first.
        streaming: choices for the other case, the best first.
        pieces: the weights that can be streamed.
        model: for the message.

    Raises:
        BudgetError: not even the least fits.
    """
    tried = []
    for choice in whole:
        needed = sum(choice.whole.values())
        if limit.n_bytes is None or needed <= limit.n_bytes:
            return Fit(choice)
        tried.append((needed, choice.context, choice.whole))
    assert limit.n_bytes is not None  # else the first choice was taken
    for choice in streaming:
        fixed = sum(choice.streaming.values())
        if fixed < limit.n_bytes:
            residency = keep(pieces, limit.n_bytes - fixed)
            if residency is not None:
                return Fit(choice, residency)
        if len(pieces) < LEAST_SLOTS:
            continue
        least = least_bytes(pieces)
        tried.append((fixed + least, choice.context, {**choice.streaming, "window": least}))
    least_of_all = min(tried, key=lambda one: one[0])
    hint = ""
    if sum(piece.kept_bytes for piece in pieces) < least_of_all[2].get("weights", 0) // 2:
        hint = (
            ", or write the file anew with `headrace compress`: weights of types that are "
            "rewritten while loading cannot be streamed"
        )
    raise _too_small(limit, *least_of_all, hint, model)


def fit_experts(
    limit: Limit, whole: Iterable[Choice], small: Iterable[Choice], pieces: Sequence[Piece],
    room: ExpertRoom, model: str,
) -> Fit:  # fmt: skip
    """Choose for a mixture of experts: what all tokens take stays before experts do.

    Arguments and errors are those of `fit`, with the room that experts take; choices for weights
    that stream count no expert.
    """
    for choice in whole:
        if limit.n_bytes is None or sum(choice.whole.values()) <= limit.n_bytes:
            return Fit(choice)
    assert limit.n_bytes is not None  # else the first choice was taken
    dense = sum(piece.kept_bytes for piece in pieces)
    tried = []
    for choice in small:
        free = limit.n_bytes - sum(choice.streaming.values())
        slots = min((free - dense - room.beside) // room.slot_bytes, room.count)
        if slots >= room.least:
            return Fit(choice, slots=slots, expert_bytes=room.cache_bytes(slots), dense_bytes=dense)
        least = room.cache_bytes(room.least)
        residency = keep(pieces, free - least) if free > least else None
        if residency is not None:
            return Fit(choice, residency, slots=room.least, expert_bytes=least)
        window = min(dense, least_bytes(pieces)) if len(pieces) >= LEAST_SLOTS else dense
        parts = {**choice.streaming, "experts": least, "window": window}
        tried.append((sum(parts.values()), choice.context, parts))
    raise _too_small(limit, *min(tried, key=lambda one: one[0]), "", model)


class Blocks(Protocol):
    """A stack of blocks of weights, the first `least` of which are needed."""

    @property
    def least(self) -> int: ...

    def __len__(self) -> int: ...

    def n_bytes(self, count: int) -> int:
        """Bytes of the first `count`."""

    def fitting(self, n_bytes: int) -> int:
        """How many fit in so many bytes."""


def fit_blocks(
    limit: Limit, whole: Iterable[Choice], small: Iterable[Choice], blocks: Blocks, model: str
) -> Fit:
    """Choose for a model that is a stack: all of it if that fits, else as many blocks as do.

    Args:
        limit: of the process.
        whole: choices for all blocks, the best first.
        small: choices for fewer, the best first.
        blocks: the stack.
        model: for the message.

    Raises:
        BudgetError: not even the least fits.
    """
    for choice in whole:
        fixed, most = sum(choice.whole.values()), blocks.n_bytes(len(blocks))
        if limit.n_bytes is None or fixed + most <= limit.n_bytes:
            return Fit(choice, blocks=len(blocks), block_bytes=most)
    assert limit.n_bytes is not None  # else the first choice was taken
    tried = []
    for choice in small:
        fixed = sum(choice.whole.values())
        count = blocks.fitting(limit.n_bytes - fixed)
        if count >= blocks.least:
            return Fit(choice, blocks=count, block_bytes=blocks.n_bytes(count))
        parts = {**choice.whole, "blocks": blocks.n_bytes(blocks.least)}
        tried.append((sum(parts.values()), choice.context, parts))
    raise _too_small(limit, *min(tried, key=lambda one: one[0]), "", model)


def fit_rest(
    limit: Limit, whole: Iterable[Choice], small: Iterable[Choice], blocks: Blocks, ranked: Ranked,
    model: str,
) -> Fit:  # fmt: skip
    """Choose for a stack all blocks of which are computed with: those without room are streamed.

    Arguments and errors are those of `fit_blocks`, with what may stream.
    """
    most = blocks.n_bytes(len(blocks))
    for choice in whole:
        if limit.n_bytes is None or sum(choice.whole.values()) + most <= limit.n_bytes:
            return Fit(choice, blocks=len(blocks), block_bytes=most)
    assert limit.n_bytes is not None  # else the first choice was taken
    tried = []
    for choice in small:
        fixed = sum(choice.streaming.values())
        residency = keep_first(ranked, limit.n_bytes - fixed)
        if residency is not None:
            return Fit(choice, residency, len(residency.kept))
        least = rest_bytes(ranked)
        parts = {**choice.streaming, "blocks": most if least is None else least}
        tried.append((sum(parts.values()), choice.context, parts))
    raise _too_small(limit, *min(tried, key=lambda one: one[0]), "", model)


def round_up(n_bytes: int) -> int:
    """Rounded so that what is printed with three digits is enough."""
    unit: int = 10 ** max(0, len(str(n_bytes)) - 3)
    return -(-n_bytes // unit) * unit


def _too_small(
    limit: Limit,
    needed: int,
    context: int,
    parts: Mapping[str, int],
    hint: str,
    model: str,
) -> BudgetError:
    largest = max(parts, key=lambda name: parts[name] if name != "the process" else 0)
    listed = ", ".join(f"{name} {format_size(n)}" for name, n in parts.items() if n)
    if largest == "KV cache" and context > SHORTEST_CONTEXT:
        hint = ", or ask for a shorter context"
    return BudgetError(
        f"{model} does not fit: {limit.said}, and the least that works is "
        f"{format_size(round_up(needed))} for a context of {context} tokens ({listed}). "
        f"Allow that{hint}",
        needed_bytes=needed,
    )
