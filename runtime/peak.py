"""How much memory this process has had."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    try:
        # Not ru_maxrss on Linux: that one starts from the parent process's size.
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
