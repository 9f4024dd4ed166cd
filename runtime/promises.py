"""What the models of this process may take, so that none counts on another's memory."""

from __future__ import annotations

from weakref import WeakKeyDictionary

_promised: WeakKeyDictionary[object, int] = WeakKeyDictionary()


def promise(owner: object, n_bytes: int) -> None:
    """Note what `owner` may take beside the process itself, for as long as it lives."""
    _promised[owner] = n_bytes


def promised(besides: object = None) -> int:
    """Bytes that all owners but one may take."""
    return sum(n_bytes for owner, n_bytes in list(_promised.items()) if owner is not besides)
