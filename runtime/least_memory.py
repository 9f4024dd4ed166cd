"""The least memory that a model can be compressed in, known before the work begins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from headrace.errors import BudgetError
from headrace.offload.budget import Limit, round_up
from headrace.sizes import format_size

Need = tuple[str, int]  # what takes memory, bytes beside what the process has


def check_memory(
    model: Path, limit: Limit, process: int, needs: Iterable[Need], threads: int
) -> None:
    """Make sure that all of the work has room, a part after the other.

    Args:
        model: that is worked on, for the message.
        limit: of the process.
        process: bytes that it has already.
        threads: that share the work on one matrix.

    Raises:
        BudgetError: the part that takes most has not.
    """
    what, most = max(needs, key=lambda need: need[1], default=("", 0))
    needed = process + most
    if limit.n_bytes is None or needed <= limit.n_bytes:
        return
    least = format_size(round_up(needed))
    raise BudgetError(
        f"{model}: {limit.said}, and {what} takes {format_size(most)} of memory beside what the "
        f"process has. Allow at least {least} (--memory)"
        + (", or use fewer --threads" * (threads > 1)),
        needed_bytes=needed,
    )
