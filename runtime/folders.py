"""Where Headrace keeps what it may need again: fetched models and compiled kernels.

The standard library is all this needs: every part of Headrace may use it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """`$HEADRACE_CACHE` (stripped; `~` is home), or else the user's cache directory."""
    root = os.environ.get("HEADRACE_CACHE", "").strip()
    if root:
        return Path(os.path.expanduser(root))
    if sys.platform == "linux":
        # As platformdirs (a test compares), whose import alone takes 6 ms of a warm start.
        base = os.environ.get("XDG_CACHE_HOME", "").strip()
        base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
        return Path(base, "headrace")
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("headrace", appauthor=False))


def why_unusable(folder: Path) -> str:
    """What keeps a folder of the cache from being written to, for an error message; "" if nothing.

    Looks at the folder, or at the last on the way to it that exists.
    """
    here = folder
    while not os.path.lexists(here) and here != here.parent:
        here = here.parent
    if not here.is_dir():
        return f"{here} is not a directory: remove it, or set HEADRACE_CACHE to a directory"
    if not os.access(here, os.W_OK | os.X_OK):
        return f"{here} is not writable: make it so, or set HEADRACE_CACHE to another directory"
    return ""
