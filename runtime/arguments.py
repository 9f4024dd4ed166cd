"""Checks of what a caller passes: the type first, then the range."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from headrace.sizes import parse_size

# Each has buffers and a stack of its own, and sizes of all of them are in generated code.
MOST_THREADS = 1024


def whole(name: str, value: Any, *, low: int) -> int:
    """A whole number of at least `low`; NumPy's count, booleans do not.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than `low`.
    """
    number = _index(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if number < low:
        raise ValueError(f"{name} must be at least {low}, not {number}")
    return number


def thread_count(value: Any) -> int:
    """How many threads: more than any machine has cores would only take memory.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than 1 or more than `MOST_THREADS`.
    """
    number = whole("threads", value, low=1)
    if number > MOST_THREADS:
        raise ValueError(f"threads must be at most {MOST_THREADS}, not {number}")
    return number


def size_of(memory: Any) -> int:
    """Bytes of an amount of memory: a whole number of them, or text as `300MB`.

    Raises:
        TypeError, ValueError: it is none.
    """
    return parse_size(memory if isinstance(memory, str) else whole("memory", memory, low=1))


def _index(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def token_ids(value: Any) -> list[int]:
    """A sequence of token ids as a list.

    Raises:
        TypeError: it is no sequence of whole numbers.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray):
        given = list(value)
        ids = [number for one in given if (number := _index(one)) is not None]
        if len(ids) == len(given):
            return ids
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    raise TypeError(f"expected token ids, a sequence of whole numbers, not {shown}")


def one_text(name: str, value: Any) -> str:
    """A text.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text (str), not {value!r}")
    return value


def number(name: str, value: Any) -> float:
    """A number; NumPy's count, booleans do not.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """True or False; NumPy's count.

    Raises:
        TypeError: something else.
    """
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def texts(name: str, value: Any) -> Sequence[str]:
    """Some texts, or a single one.

    Raises:
        TypeError: something else.
    """
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(one, str) for one in found):
        raise TypeError(f"{name} must be a text or several, not {value!r}")
    return found
