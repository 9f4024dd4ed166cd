"""Statistics of calibrations, kept for the next compression of the same model with the same text.

A folder for each calibration in `$HEADRACE_CACHE/calibration/`, a file for each layer or expert:
its matrices of sums one behind the other as `.npy`. All together take at most `LIMIT_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.atomic_file import whole_file
from headrace.folders import cache_root

LIMIT_BYTES = 4 << 30


class StatisticsCache:
    """The statistics of one calibration.

    Attributes:
        folder: where all of them are.
        kept: whether these are small enough to be kept.
    """

    def __init__(self, key: Mapping[str, Any], n_bytes: int) -> None:
        """Make room for `n_bytes`; what was not used for longest goes first.

        Args:
            key: all that decides the statistics, as JSON has it.
        """
        self.folder = cache_root() / "calibration"
        text = json.dumps(key, sort_keys=True)
        self._own = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.kept = n_bytes <= LIMIT_BYTES
        if not self.kept:
            return
        with contextlib.suppress(OSError):  # without a cache it takes longer
            self._own.mkdir(parents=True, exist_ok=True)
            self._own.touch()
            self._make_room(n_bytes)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._path(name).exists()

    def get(self, name: str, sizes: Sequence[int]) -> list[np.ndarray] | None:
        """The sums of that name, float32 [n, n] for each of `sizes`; None: they are not there."""
        found = []
        try:
            with self._path(name).open("rb") as file:
                for n in sizes:
                    h = np.lib.format.read_array(file, allow_pickle=False)
                    if h.shape != (n, n) or h.dtype != np.float32 or not np.isfinite(h).all():
                        return None
                    found.append(h)
        except (OSError, ValueError, EOFError):
            return None
        return found

    def put(self, name: str, sums: Sequence[np.ndarray]) -> None:
        """Keep sums, if there is room."""
        if not self.kept:
            return
        with contextlib.suppress(OSError), whole_file(self._path(name), durable=False) as file:
            for h in sums:
                np.lib.format.write_array(file, h, allow_pickle=False)

    def _path(self, name: str) -> Path:
        return self._own / f"{name}.npy"

    def _make_room(self, n_bytes: int) -> None:
        others = [path for path in self.folder.iterdir() if path.is_dir() and path != self._own]
        others.sort(key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(one.stat().st_size for one in path.iterdir()) for path in others}
        over = n_bytes + sum(sizes.values()) - LIMIT_BYTES
        for path in others:
            if over <= 0:
                return
            over -= sizes[path]
            shutil.rmtree(path, ignore_errors=True)
