"""A ring of slots that native threads fill from flash, ahead of the steps that need them."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import HeadraceError
from headrace.interruptible import persist, undisturbed
from headrace.loaders.model_file import TensorInfo
from headrace.memory import Arena, aligned_slots
from headrace.offload import requests
from headrace.offload.files import PAGE, StreamedFile, reader_of
from headrace.offload.modes import FlashRate, ReadMode
from headrace.offload.pieces import slots_bytes
from headrace.offload.semaphore import Semaphore
from headrace.targets.table import ENTRY

NAP_PATIENCE = 2_000
_NAP_US, _NAP_MS = 50, 1


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a file that a pass reads; `tensor` is for messages."""

    path: Path
    tensor: str
    offset: int
    n_bytes: int


@dataclass
class Flow:
    """What a window has done.

    Attributes:
        mended_reads: that failed and then went well.
        stall_s: seconds that finished passes have waited for flash.
    """

    mended_reads: int = 0
    stall_s: float = 0.0


class Window:
    """Streams `reads`, in this order, once for every pass.

    Pieces lie in `n_slots` slots in turn; their number divides that of the reads. One pass at a
    time: `begin`, run the steps, `end`. Between passes readers go on to the beginning of the next.
    `files` are those of the reads, which the caller closes after `halt`.

    Raises:
        BudgetError: the system gives no memory for the slots.
    """

    def __init__(
        self, reads: Sequence[Read], n_slots: int, slot_bytes: int, reader: int, mode: ReadMode,
        files: Mapping[Path, StreamedFile],
    ) -> None:  # fmt: skip
        if len(reads) % n_slots:
            raise ValueError(f"{len(reads)} reads do not go round in {n_slots} slots")
        self._reads = list(reads)
        self._n_slots = n_slots
        self._reader = ENTRY(reader)
        self.mode = mode
        self.flow = Flow()
        self._files = files
        self._plainly = reader_of(files)
        # Whole huge pages: direct reads into pages of 4096 bytes are several times slower, as the
        # disk's driver takes only so many pieces of memory at a time (measured: 1.1 and 3.1 GB/s).
        self._slots = Arena({"slots": slots_bytes(n_slots, slot_bytes)})
        self._requests = aligned_slots(len(reads) * requests.REQUEST_SLOTS)
        self._table = self._requests.reshape(len(reads), requests.REQUEST_SLOTS)
        self._shared = aligned_slots(requests.WINDOW_SLOTS)
        self._own: list[np.ndarray] = []  # of each reader
        self._semaphore: Semaphore | None = None
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._going = False
        own = [files[read.path] for read in reads]
        self._plain = np.array([file.plain.fileno() for file in own])
        self._direct = np.array([-1 if file.direct is None else file.direct for file in own])
        self._offsets = np.array([read.offset for read in reads])
        self._sizes = np.array([read.n_bytes for read in reads])
        self._places = self._slots.base + np.arange(len(reads)) % n_slots * slot_bytes

    def _fill_table(self) -> None:
        """Say how to read in the present mode; where pieces come to lie is the same in all."""
        table, direct = self._table, self.mode.direct
        begin = self._offsets % PAGE
        table[:, requests.ADDRESS] = self._places
        if direct:  # whole pages
            need = self._sizes + begin
            table[:, requests.FILE] = self._direct
            table[:, requests.OFFSET] = self._offsets - begin
            table[:, requests.ASK] = -(-need // PAGE) * PAGE
            table[:, requests.NEED] = need
        else:
            table[:, requests.FILE] = self._plain
            table[:, requests.OFFSET] = self._offsets
            table[:, requests.ASK] = table[:, requests.NEED] = self._sizes
            table[:, requests.ADDRESS] += begin

    def address(self, index: int) -> int:
        """Where the bytes of a read lie when they have come."""
        return int(self._places[index]) + self._reads[index].offset % PAGE

    @property
    def span(self) -> int:
        """Ticks of the last pass."""
        return int(self._shared[requests.SPAN])

    def request(self, index: int) -> int:
        """Address of a read's request, which steps wait for and give back."""
        return self._requests.ctypes.data + index * requests.REQUEST_SLOTS * 8

    # --- passes -----------------------------------------------------------------------------------

    def begin(self, mode: ReadMode | None = None) -> int:
        """Begin a pass; gives the address of the window for the native loop.

        Args:
            mode: how to read from now on, if not as before. What was read ahead is read again.

        Raises:
            ModelFileError: a file has changed, or could not be read.
        """
        if self._error is not None:
            self.halt()  # and try once more from the beginning: the file may be back
        self._check()
        if mode is not None and mode != self.mode:
            self.halt()
            self.mode = mode
        if not self._going:
            self._start()
        self._shared[requests.PASS] += 1
        self._shared[requests.STALL] = self._shared[requests.SPAN] = 0
        self._began = time.perf_counter()
        return self._shared.ctypes.data

    def end(self, finished: bool) -> None:
        """End a pass; one that was not finished takes what is in the slots with it.

        Raises:
            ModelFileError: the pass stopped because a read failed.
        """
        if finished:
            self._check()
            # In ticks, whose rate is unknown.
            span = int(self._shared[requests.SPAN])
            if span > 0:
                spent = time.perf_counter() - self._began
                self.flow.stall_s += spent * int(self._shared[requests.STALL]) / span
            return
        error = self._error
        self.halt()
        if error is not None:
            raise error

    def _check(self) -> None:
        try:
            for file in self._files.values():
                file.check()
        except BaseException:
            self.halt()  # what has been read ahead may be of either file
            raise

    def rate(self) -> FlashRate:
        """What reading everything once takes, with nobody who looks at it.

        Raises:
            ModelFileError: a file could not be read.
        """
        self.halt()
        self._slots.view("slots")[::PAGE] = 0  # its pages are there
        began, used = time.perf_counter(), time.process_time()
        try:
            self._start(permits=len(self._reads))
            while self._error is None and not self._table[:, requests.READY].all():
                time.sleep(0.0002)
            spent, used = time.perf_counter() - began, time.process_time() - used
            error = self._error
        finally:
            self.halt()
        if error is not None:
            raise error
        n_bytes = int(self._sizes.sum())
        return FlashRate(n_bytes / spent, used / n_bytes)

    def _start(self, permits: int | None = None) -> None:
        """Start the readers, all of them or none.

        Raises:
            HeadraceError: the system gives no thread.
        """
        try:
            undisturbed(lambda: self._start_readers(permits))
        except RuntimeError as error:  # no more threads, or no room for their stacks
            raise HeadraceError(
                "the system gives no thread to read with: end other programs, or raise the "
                "limits of this process (`ulimit -u`, `ulimit -v`)"
            ) from error

    def _start_readers(self, permits: int | None) -> None:
        shared, system = self._shared, system_functions()
        self._fill_table()
        self._own = [aligned_slots(8) for _ in range(self.mode.readers)]
        self._table[:, [requests.READY, requests.DONE]] = 0
        shared[:] = 0
        self._semaphore = Semaphore(self._n_slots if permits is None else permits)
        shared[requests.GIVE] = self._semaphore.give
        shared[requests.GIVE_TO] = self._semaphore.handle
        shared[requests.TAKE] = self._semaphore.take
        shared[requests.NAP] = system.nap
        shared[requests.NAP_FOR] = system.nap_for
        shared[requests.PATIENCE] = NAP_PATIENCE
        shared[requests.READ] = system.read
        shared[requests.DROP] = system.drop if self.mode.drop else 0
        shared[requests.REQUESTS] = self._requests.ctypes.data
        shared[requests.COUNT] = len(self._reads)
        self._error = None
        self._going = True
        self._threads = []
        for i, own in enumerate(self._own):
            own[requests.OWN_WINDOW] = shared.ctypes.data
            own[requests.OWN_REQUEST] = -1
            thread = threading.Thread(
                target=self._serve, args=(own,), name=f"headrace-read-{i}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    self._going = False
                    raise
                break  # fewer will do
            self._threads.append(thread)

    def _serve(self, own: np.ndarray) -> None:
        try:
            while True:
                self._reader(own.ctypes.data, 0, 1)
                late = int(own[requests.OWN_REQUEST])
                if late < 0:
                    return
                self._read_again(late % len(self._reads))
        except BaseException as error:
            if self._error is None:
                self._error = error
            self._shared[requests.FAILED] = 1

    def _read_again(self, index: int) -> None:
        """Read what a native reader could not, or find out why.

        Raises:
            ModelFileError: the file shrank, or the disk failed.
        """
        r = self._reads[index]
        at = self.address(index) - self._slots.base
        info = TensorInfo(r.tensor, "I8", (r.n_bytes,), r.path, r.offset, r.n_bytes)
        self._plainly.readinto(info, 0, self._slots.view("slots")[at : at + r.n_bytes])
        if self._shared[requests.READ]:
            self.flow.mended_reads += 1

    # --- ending -----------------------------------------------------------------------------------

    def halt(self) -> None:
        """End the readers and forget what they have read; the next pass starts them anew."""
        if not self._going or self._semaphore is None:
            return
        self._shared[requests.STOP] = 1
        if sys.is_finalizing():
            self._semaphore.post(len(self._threads))
            return  # the threads cannot come back to Python to be joined
        posted: list[bool] = []

        def stop() -> None:
            if not posted and self._semaphore is not None:
                posted.append(True)
                self._semaphore.post(len(self._threads))
            for thread in self._threads:
                thread.join()

        persist(stop, lambda: bool(posted) and not any(t.is_alive() for t in self._threads))
        self._threads = []
        self._semaphore.close()
        self._semaphore = None
        self._going = False


@dataclass(frozen=True)
class SystemFunctions:
    read: int
    nap: int
    nap_for: int
    drop: int


def system_functions() -> SystemFunctions:
    """Addresses of functions of the operating system; 0: it has none."""

    def find(library: Any, *names: str) -> int:
        for name in names:
            function = getattr(library, name, None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
        return 0

    if sys.platform == "win32":
        # Without a read at an offset that native threads could call, those of Python read.
        return SystemFunctions(0, find(ctypes.WinDLL("kernel32"), "Sleep"), _NAP_MS, 0)
    library = ctypes.CDLL(None)
    wide = ctypes.sizeof(ctypes.c_void_p) == 8
    return SystemFunctions(
        read=find(library, "pread") if wide else find(library, "pread64"),
        nap=find(library, "usleep"),
        nap_for=_NAP_US,
        drop=find(library, "posix_fadvise") if wide and hasattr(os, "posix_fadvise") else 0,
    )
