"""How fast flash gives what a window reads: every mode tried on the very reads, and the best taken.

Neither reads past the system's cache nor reads through it are faster by nature: that depends on the
disk, its driver, and on the CPU time that copying takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.offload.files import StreamedFile
from headrace.offload.modes import MODES, FlashRate, ReadMode
from headrace.offload.window import Read, Window

# A sample takes a twentieth of a second: of what the first rate says, and within bounds.
FIRST_BYTES, MOST_BYTES = 16 << 20, 128 << 20
SAMPLE_S = 0.05
ROUNDS = 2
_SLOTS = 8


def measure(
    files: Mapping[Path, StreamedFile],
    reads: Sequence[Read],
    slot_bytes: int,
    reader: int,
) -> dict[ReadMode, FlashRate]:
    """What cold reads give in each mode that the files allow; best of two rounds.

    Args:
        files: open files of the reads.
        reads: what a pass reads, in order.
        slot_bytes: room for the largest of them.
        reader: address of the kernel that reads.

    Raises:
        ModelFileError: the disk failed.
    """
    direct = all(file.direct is not None for file in files.values())
    usable = [mode for mode in MODES if direct or not mode.direct]
    found = dict.fromkeys(usable, FlashRate(0.0, 0.0))
    at = 0
    for _ in range(ROUNDS):
        for mode in usable:
            sample: list[Read] = []
            n_bytes = 0
            fastest = max(rate.bytes_s for rate in found.values())
            wanted = min(fastest * SAMPLE_S, MOST_BYTES) or FIRST_BYTES
            while n_bytes < wanted and len(sample) < len(reads):
                sample.append(reads[at])
                n_bytes += reads[at].n_bytes
                at = (at + 1) % len(reads)
            rate = _rate(files, sample, slot_bytes, reader, mode)
            found[mode] = max(found[mode], rate, key=lambda rate: rate.bytes_s)
    return found


def _rate(
    files: Mapping[Path, StreamedFile], sample: list[Read], slot_bytes: int, reader: int,
    mode: ReadMode,
) -> FlashRate:  # fmt: skip
    for read in sample:
        files[read.path].forget_cached(read.offset, read.n_bytes)
    slots = next(n for n in range(min(_SLOTS, len(sample)), 0, -1) if len(sample) % n == 0)
    window = Window(sample, slots, slot_bytes, reader, mode, files)
    try:
        return window.rate()
    finally:
        window.close()  # windows refer to themselves: their memory would stay for a while
