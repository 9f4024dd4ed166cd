"""Experts of a mixture that are brought from flash: what they take, and what passes will read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.families.decoder import Decoder
from headrace.offload.budget import ExpertRoom
from headrace.offload.expert_cache import (
    READ_BYTES,
    ROWS_BYTES,
    ExpertCache,
    ExpertMatrix,
    pages,
    slot_offsets,
)
from headrace.offload.files import PAGE, StreamedFile
from headrace.offload.modes import MODES
from headrace.offload.window import Read
from headrace.placing import Placed, PlacedMatrix, cacheable
from headrace.plan import LOOK_AHEAD

SAMPLED = 256  # matrices of experts that show how fast flash is


def room_of(decoder: Decoder, placed: Sequence[Placed]) -> ExpertRoom | None:
    """What a cache of a decoder's experts takes; None: there are none, or they cannot have one."""
    if not cacheable(placed):
        return None
    by_name = {p.matrix.name: p for p in placed}
    routed = decoder.mixtures().values()
    slots = [
        slot_offsets([by_name[m.name].n_bytes for m in expert.matrices()])[1]
        for one in routed
        for expert in one.each
    ]
    readers = max(mode.readers for mode in MODES)
    raw = [p for p in placed if p.expert and not p.straight]
    rows = (max(ROWS_BYTES, 16 * p.info.n_bytes // p.matrix.rows) for p in raw)
    largest = max((min(n, p.info.n_bytes) for n, p in zip(rows, raw, strict=True)), default=0)
    landing = pages(largest) + 2 * PAGE if raw else 0
    return ExpertRoom(
        slot_bytes=max(slots),
        # A token's experts, and as many that are on their way.
        least=2 * max(one.active for one in routed),
        count=sum(len(one.each) for one in routed),
        beside=readers * landing,
        n_bytes=sum(p.n_bytes for p in placed if p.expert),
    )


def expected_bytes(decoder: Decoder, room: ExpertRoom, slots: int, n_tokens: int) -> int:
    """Bytes that a pass over so many tokens reads, were all experts chosen equally often."""
    uses = sum(
        len(one.each) * (1 - (1 - one.active / len(one.each)) ** n_tokens)
        for one in decoder.mixtures().values()
    )
    return int(uses * (1 - slots / room.count) * room.n_bytes / room.count)


def _matrix(placed: Placed, addresses: Mapping[str, int]) -> ExpertMatrix:
    assert isinstance(placed, PlacedMatrix)
    if placed.straight:
        return ExpertMatrix(placed.info, placed.n_bytes)
    m, fmt = placed.matrix, placed.format
    return ExpertMatrix(
        placed.info, placed.n_bytes, addresses[f"tile_{fmt.name}"], placed.info.n_bytes // m.rows,
        m.columns // fmt.block, m.rows,
    )  # fmt: skip


def look_ahead(slots: int, active: int) -> int:
    """For how many mixtures experts may be asked for before they are chosen.

    Those of the next one may have been asked for by as many predictions as it is far, and none of
    them leaves before its turn; what is chosen must still find room.
    """
    distance = 1
    while distance < LOOK_AHEAD and slots >= active * (1 + (distance + 1) * (distance + 2) // 2):
        distance += 1
    return distance


def cache_of(
    decoder: Decoder, placed: Mapping[str, Placed], slots: int, addresses: Mapping[str, int],
    files: Mapping[Path, StreamedFile],
) -> ExpertCache:  # fmt: skip
    """A cache of so many slots for a decoder's experts.

    Raises:
        BudgetError: the system gives no memory for it.
    """
    layers = [
        [[_matrix(placed[m.name], addresses) for m in one.matrices()] for one in routed.each]
        for routed in decoder.mixtures().values()
    ]
    active = max(one.active for one in decoder.mixtures().values())
    return ExpertCache(
        layers, slots, addresses["experts_read"], files, look_ahead(slots, active), active
    )


def sample_reads(placed: Sequence[Placed]) -> tuple[list[Read], int]:
    """Some of the reads that bring experts, far from each other, and room for the largest."""
    experts = [p for p in placed if p.expert]
    reads = []
    for p in experts[:: max(1, len(experts) // SAMPLED)]:
        for start in range(0, p.info.n_bytes, READ_BYTES):
            n_bytes = min(READ_BYTES, p.info.n_bytes - start)
            reads.append(Read(p.info.path, p.info.name, p.info.offset + start, n_bytes))
    return reads, pages(max(read.n_bytes for read in reads)) + PAGE
