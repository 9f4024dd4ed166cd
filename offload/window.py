"""A ring of slots that native threads fill from flash, ahead of the steps that need them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.loaders.model_file import TensorInfo
from headrace.memory import Arena, aligned_slots
from headrace.offload import requests
from headrace.offload.files import PAGE, StreamedFile, reader_of
from headrace.offload.modes import FlashRate, ReadMode
from headrace.offload.pieces import slots_bytes
from headrace.offload.readers import PATIENCE_PAUSES, Readers, Words, system_functions
from headrace.offload.semaphore import Semaphore


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
        words = Words(self._shared, requests.STOP, requests.FAILED, requests.OWN_REQUEST)
        self._readers = Readers(reader, words, self._read_again, "headrace-read")
        # Until a pass has ended well: one that an interrupt cut off in Python, at any place, leaves
        # readers that wait for what it would have given back.
        self._passing = False
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
        if self._readers.error is not None or self._passing:
            self.halt()  # and try once more from the beginning: the file may be back
        self._check()
        if mode is not None and mode != self.mode:
            self.halt()
            self.mode = mode
        if not self._readers.going:
            self._start()
        self._passing = True
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
            self._passing = False
            return
        error = self._readers.error
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
            while self._readers.error is None and not self._table[:, requests.READY].all():
                time.sleep(0.0002)
            spent, used = time.perf_counter() - began, time.process_time() - used
            error = self._readers.error
        finally:
            self.halt()
        if error is not None:
            raise error
        n_bytes = int(self._sizes.sum())
        return FlashRate(n_bytes / spent, used / n_bytes)

    def _start(self, permits: int | None = None) -> None:
        """Start the readers.

        Raises:
            HeadraceError: the system gives no thread.
        """
        self._readers.start(self._n_slots if permits is None else permits, self._prepare)

    def _prepare(self, semaphore: Semaphore) -> list[np.ndarray]:
        shared, system = self._shared, system_functions()
        self._fill_table()
        self._table[:, [requests.READY, requests.DONE]] = 0
        shared[:] = 0
        shared[requests.GIVE] = semaphore.give
        shared[requests.GIVE_TO] = semaphore.handle
        shared[requests.TAKE] = semaphore.take
        shared[requests.NAP] = system.nap
        shared[requests.NAP_FOR] = system.nap_for
        shared[requests.PATIENCE] = PATIENCE_PAUSES
        shared[requests.READ] = system.read
        shared[requests.DROP] = system.drop if self.mode.drop else 0
        shared[requests.REQUESTS] = self._requests.ctypes.data
        shared[requests.COUNT] = len(self._reads)
        all_own = [aligned_slots(8) for _ in range(self.mode.readers)]
        for own in all_own:
            own[requests.OWN_WINDOW] = shared.ctypes.data
            own[requests.OWN_REQUEST] = -1
        return all_own

    def _read_again(self, own: np.ndarray) -> None:
        """Read what a native reader could not, or find out why.

        Raises:
            ModelFileError: the file shrank, or the disk failed.
        """
        index = int(own[requests.OWN_REQUEST]) % len(self._reads)
        r = self._reads[index]
        at = self.address(index) - self._slots.base
        info = TensorInfo(r.tensor, "I8", (r.n_bytes,), r.path, r.offset, r.n_bytes)
        self._plainly.readinto(info, 0, self._slots.view("slots")[at : at + r.n_bytes])
        if self._shared[requests.READ]:
            self.flow.mended_reads += 1

    # --- ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the readers and give the memory back."""
        self.halt()
        self._slots.empty()

    def halt(self) -> None:
        """End the readers and forget what they have read; the next pass starts them anew."""
        self._readers.halt()
