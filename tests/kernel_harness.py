"""Run a kernel in this process, on real threads."""

from __future__ import annotations

import threading
from typing import Any

from headrace.kernels.invoke import argument_block
from headrace.targets.table import ENTRY


def call(address: int, slots: list[Any], n_threads: int) -> None:
    """Call a kernel once per thread, all at the same time."""
    block, entry = argument_block(slots), ENTRY(address)
    if n_threads == 1:
        entry(block.ctypes.data, 0, 1)
        return
    threads = [
        threading.Thread(target=entry, args=(block.ctypes.data, i, n_threads))
        for i in range(n_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
