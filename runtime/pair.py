"""Two models in one process, within one budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.choices import PROCESS_BYTES
from headrace.errors import BudgetError
from headrace.families import describe
from headrace.loaders.progress import Progress
from headrace.loaders.tiled import open_model
from headrace.model import Model, load
from headrace.offload.budget import round_up
from headrace.planning import bounds, limit_of
from headrace.sizes import format_size
from headrace.stack import stack_of


@contextmanager
def load_pair(
    first: Path, second: Path, *, memory: int | None, progress: Progress | None,
    whole_stack: bool = False, floor: int = 0, **options: Any,
) -> Iterator[tuple[Model, Model]]:  # fmt: skip
    """Load two models, each with what it needs and its share of what is left.

    Args:
        memory: bytes that the process may take; None: what is free.
        whole_stack: as `headrace.load` takes it, of those that are stacks.
        floor: bytes that the second one gets at least, counted as if it were alone.
        progress, options: as `headrace.load` takes them.

    Raises:
        BudgetError: the two do not fit together.
        what `headrace.load` raises.
    """
    of_first, of_second = shares(
        first, second, memory, {**options, "whole_stack": whole_stack}, floor
    )
    options["progress"] = progress
    with (
        load(first, memory=of_first, whole_stack=whole_stack and _is_stack(first), **options) as a,
        load(
            second, memory=of_second, whole_stack=whole_stack and _is_stack(second), **options
        ) as b,
    ):
        yield a, b


def _is_stack(path: Path) -> bool:
    file = open_model(path)
    return stack_of(file, describe(file)) is not None


def least_bytes(first: Path, second: Path, options: dict[str, Any]) -> int:
    """The fewest bytes of a process that has both; arguments as in `load_pair`."""
    return sum(bounds(path, **options)[0] for path in (first, second)) - PROCESS_BYTES


def shares(
    first: Path, second: Path, memory: int | None, options: dict[str, Any], floor: int = 0
) -> tuple[int | None, int | None]:
    """The budgets of two models, each as if it were alone; arguments as in `load_pair`."""
    limit = limit_of(memory)
    if limit.n_bytes is None:
        return None, None
    least, most = zip(*(bounds(path, **options) for path in (first, second)), strict=True)
    least = least[0], max(least[1], floor)
    # Both count the process, which is there once.
    spare = limit.n_bytes + PROCESS_BYTES - sum(least)
    if spare < 0:
        needed = limit.n_bytes - spare
        raise BudgetError(
            f"two models do not fit: {limit.said}, and {first} and {second} take at least "
            f"{format_size(round_up(needed))} together. Allow that",
            needed_bytes=needed,
        )
    wanted = [m - n for n, m in zip(least, most, strict=True)]
    share = min(1.0, spare / max(1, sum(wanted)))
    a, b = (n + int(share * more) for n, more in zip(least, wanted, strict=True))
    return a, b
