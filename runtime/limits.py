"""Limits of this process's cgroups, which somebody may change while a model is at work."""

from __future__ import annotations

import time

from headrace.available import cgroup_limits

INTERVAL_S = 0.02  # a look takes some 0.1 ms
NO_LIMIT = 1 << 62


class LimitWatch:
    """Notices changes since it was made."""

    def __init__(self) -> None:
        self._limits = cgroup_limits()
        self._looked = time.monotonic()

    def changed(self) -> int | None:
        """The tightest limit if it is another than before, else None; at most 50 looks a second."""
        now = time.monotonic()
        if now - self._looked < INTERVAL_S:
            return None
        self._looked = now
        limits = cgroup_limits()
        if limits == self._limits:
            return None
        self._limits = limits
        return min(limits, default=NO_LIMIT)
