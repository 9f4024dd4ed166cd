"""How much memory this process may still take."""

from __future__ import annotations

import os

from headrace.cgroups import cgroup_folders

# Version 2 of cgroups, then version 1: the limit, the use, and in memory.stat cache that was not in
# use lately, cache that was, and what of it is mapped.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file", "active_file", "file_mapped"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        "total_active_file",
        "total_mapped_file",
    ),
)

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes", "memory.soft_limit_in_bytes")
_NO_LIMIT = 1 << 60  # version 1 says "none" by a number near 2^63


def available_bytes() -> int | None:
    """Free and reclaimable memory, within the limits of this process's cgroups; None if unknown."""
    found = [n for n in (_machine(), _cgroup()) if n is not None]
    return min(found) if found else None


def cgroup_limits() -> tuple[int, ...]:
    """Memory limits of this process's cgroups, soft ones among them, as they are now."""
    found = []
    for folder in cgroup_folders("memory"):
        for name in _LIMITS:
            try:
                text = (folder / name).read_text().strip()
                if text != "max" and int(text) < _NO_LIMIT:
                    found.append(int(text))
            except (OSError, ValueError):
                continue
    return tuple(found)


def resident_bytes(*, private: bool = False) -> int:
    """Memory that this process has now; 0 if unknown.

    With `private`, without what it shares with others: pages of libraries are in the system's
    cache, and another group may have been charged for them.
    """
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared = file.read().split()[:3]
        return (int(resident) - int(shared) * private) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        pass
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except (ImportError, OSError):
        return 0


def _machine() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except (ImportError, OSError):
        return None


def _cgroup() -> int | None:
    """The tightest limit on the way from this process's cgroup to the root (versions 1 and 2)."""
    left = []
    for folder in cgroup_folders("memory"):
        for limit_name, use_name, *names in _CGROUPS:
            try:
                limit = (folder / limit_name).read_text().strip()
                if limit == "max":
                    continue
                used = int((folder / use_name).read_text())
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):
                continue
            idle, active, mapped = (int(stat.get(name, 0)) for name in names)
            # What has been read twice is "active", and is given back all the same; not so what
            # processes have mapped and run.
            left.append(int(limit) - used + idle + max(0, active - mapped))
    return max(0, min(left)) if left else None
