"""One number for everything: which sizes of context and window, and which weights, fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.errors import BudgetError
from headrace.offload.pieces import Piece, Residency, keep, least_bytes
from headrace.sizes import format_size


@dataclass(frozen=True)
class Choice:
    """Sizes that the planner may choose, and what they take beside the weights that can stream.

    Attributes:
        context, chunk: tokens.
        whole: bytes by what they are for, if all weights stay in memory.
        streaming: the same if some do not.
    """

    context: int
    chunk: int
    whole: Mapping[str, int]
    streaming: Mapping[str, int]


@dataclass(frozen=True)
class Fit:
    """What was chosen; without a residency all weights stay in memory."""

    choice: Choice
    residency: Residency | None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        if self.residency is None:
            return dict(self.choice.whole)
        r = self.residency
        parts = dict(self.choice.streaming)
        parts["weights"] = parts.get("weights", 0) + r.kept_bytes
        return parts | {"window": r.window_bytes}


def fit(
    limit: int | None, whole: Iterable[Choice], streaming: Iterable[Choice],
    pieces: Sequence[Piece], model: str,
) -> Fit:  # fmt: skip
    """Choose: everything in memory if that fits, else the residency that keeps most.

    Args:
        limit: bytes; None: unknown, so everything.
        whole: choices for that, the best first.
        streaming: choices for the other case, the best first.
        pieces: the weights that can be streamed.
        model: for the message.

    Raises:
        BudgetError: not even the least fits.
    """
    for choice in whole:
        if limit is None or sum(choice.whole.values()) <= limit:
            return Fit(choice, None)
    assert limit is not None  # else the first choice was taken
    tried = []
    for choice in streaming:
        fixed = sum(choice.streaming.values())
        if pieces and fixed < limit:
            residency = keep(pieces, limit - fixed)
            if residency is not None and residency.streamed:
                return Fit(choice, residency)
        tried.append(choice)
    raise _too_small(limit, min(tried, key=lambda c: sum(c.streaming.values())), pieces, model)


def _too_small(
    limit: int, choice: Choice, pieces: Sequence[Piece], model: str
) -> BudgetError:
    parts = dict(choice.streaming)
    parts["window"] = least_bytes(pieces)
    needed = sum(parts.values())
    largest = max(parts, key=lambda name: parts[name])
    listed = ", ".join(f"{name} {format_size(n)}" for name, n in parts.items() if n)
    hints = {
        "KV cache": "ask for a shorter context",
        "weights": "convert the file with `headrace compress`: types that are rewritten while "
        "loading cannot be streamed",
    }
    hint = hints.get(largest, "give it more memory")
    return BudgetError(
        f"{model} does not fit in {format_size(limit)}: the smallest budget that works is "
        f"{format_size(needed)} with a context of {choice.context} ({listed}). Most of it is "
        f"{largest}; allow {format_size(needed)}, or {hint}",
        needed_bytes=needed,
    )
