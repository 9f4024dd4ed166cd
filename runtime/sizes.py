"""Memory sizes as people write them: `300MB`, `1.5GiB`, `50%` of the memory there is."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
_UNITS |= {u: 1000**i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u}ib": 1024**i for i, u in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-z]*)", re.ASCII | re.IGNORECASE)


def parse_size(text: str | int, *, total_bytes: int | None = None) -> int:
    """Bytes of a size such as `300MB` (10^6), `1.5GiB` (2^30), `4096` or `50%`.

    Args:
        text: the size; units in any case, `K`, `KB` and `kB` all being 1000 bytes.
        total_bytes: what a percentage is taken of; when not given, the machine's memory, or
            the limit of the container that this runs in.

    Raises:
        ValueError: not a size, or zero; the message shows what one looks like.
    """
    if isinstance(text, int):
        size = float(text)
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a size; write for example 300MB, 1.5GiB or 50%")
        number, unit = float(match[1]), match[2].lower()
        if unit == "%":
            if number > 100:
                raise ValueError(f"{text!r} is more than all of the memory")
            size = number / 100 * (total_bytes if total_bytes is not None else _machine_bytes())
        elif unit in _UNITS:
            size = number * _UNITS[unit]
        else:
            raise ValueError(
                f"{text!r} has an unknown unit {match[2]!r}; use MB, MiB, GB, GiB or %"
            )
    if not 1 <= size < 2**63:
        raise ValueError(f"{text!r} is not a size between 1 byte and 8 EiB")
    return int(size)


def format_size(n_bytes: float) -> str:
    """Three digits and a decimal unit: `98.4 MB`, `1.23 GB`, `512 B`."""
    if abs(n_bytes) < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n_bytes /= 1000
        if abs(n_bytes) < 999.5 or unit == "TB":
            break
    digits = 2 if abs(n_bytes) < 9.995 else 1 if abs(n_bytes) < 99.95 else 0
    return f"{n_bytes:.{digits}f} {unit}"


def compared_size(n_bytes: int, source_bytes: int) -> str:
    """How large something is beside what it was made of: plain words where it is no smaller."""
    size, source = format_size(n_bytes), format_size(source_bytes)
    if n_bytes <= source_bytes:
        return f"{size} (from {source})"
    if size == source:
        size, source = f"{n_bytes:,} bytes", f"{source_bytes:,}"
    return f"larger than the source: {size} against {source}"


def format_rate(per_s: float) -> str:
    """Three digits: `483`, `12.3`, `0.91`."""
    digits = 2 if per_s < 9.995 else 1 if per_s < 99.95 else 0
    return f"{per_s:.{digits}f}"


def _machine_bytes() -> int:
    import psutil  # only a percentage needs it

    from headrace.available import cgroup_limits

    return min([int(psutil.virtual_memory().total), *cgroup_limits()])
