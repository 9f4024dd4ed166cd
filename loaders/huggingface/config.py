"""config.json behind typed getters, whose errors name the file and the key as it is there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from headrace.errors import ModelFileError, UnsupportedError

_REQUIRED: Any = object()

MAX_SIDE = 1 << 31


class Config:
    """An object of config.json.

    Args:
        values: what is in it.
        path: the file.
        prefix: where in the file it is, such as "text_config.".
    """

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def get(
        self, key: str, kind: type[Any], default: Any = _REQUIRED, *,
        low: int | None = None, high: int | None = None,
    ) -> Any:  # fmt: skip
        """A value of a known type: str, int, float (takes ints too), bool, list or dict.

        Args:
            default: given back as it is when the key is absent or null; without it one is required.
            low, high: inclusive bounds of an int.

        Raises:
            ModelFileError: there is none, or of another type; numbers that are not finite or huge,
                or out of bounds.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.bad(key, f"is missing ({kind.__name__} expected)")
            return default
        if kind is float and type(value) is int and abs(value) < 1 << 63:
            value = float(value)
        if type(value) is not kind:  # not isinstance: true is no size
            raise self.bad(key, f"is {repr(value)[:60]}, expected {kind.__name__}")
        if kind is int and not -MAX_SIDE <= value <= MAX_SIDE:
            raise self.bad(key, f"is {value}, beyond any model's")
        if low is not None and value < low:
            raise self.bad(key, f"is {value}, expected at least {low}")
        if high is not None and value > high:
            raise self.bad(key, f"is {value}, expected at most {high}")
        if kind is float and not math.isfinite(value):
            raise self.bad(key, f"is {value}, expected a finite number")
        return value

    def inner(self, key: str) -> Config | None:
        """The object that a key has, if there is one."""
        values = self.get(key, dict, None)
        return None if values is None else Config(values, self.path, f"{self.prefix}{key}.")

    def expect(self, key: str, *allowed: Any, default: Any) -> None:
        """Refuse a value that would change what is computed in a way that is not there.

        Raises:
            UnsupportedError: it is none of `allowed`.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            these = " or ".join(map(repr, allowed))
            raise self.unsupported(key, f"is {str(value)[:60]!r}, and only {these} is supported")

    def bad(self, key: str, problem: str) -> ModelFileError:
        """An error about a key."""
        return ModelFileError(f"{self.prefix}{key} {problem}", path=self.path)

    def unsupported(self, key: str, problem: str) -> UnsupportedError:
        """An error about a key whose value is valid."""
        return UnsupportedError(f"{self.prefix}{key} {problem}", path=self.path)
