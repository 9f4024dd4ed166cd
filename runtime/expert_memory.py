"""Experts of a mixture that are brought from flash: what they take, and what passes will read.

Clusters of neurons are brought like experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace.cluster_memory import Fired
from headrace.families.decoder import Decoder, Experts
from headrace.fitted_routers import FittedRouters, fitted_bytes
from headrace.offload.budget import ExpertRoom
from headrace.offload.expert_cache import ExpertCache
from headrace.offload.expert_reads import (
    READ_BYTES,
    ExpertMatrix,
    landing_bytes,
    pages,
    rows_at_once,
    slot_offsets,
)
from headrace.offload.files import PAGE, StreamedFile
from headrace.offload.modes import MODES
from headrace.offload.recall import Predictor, Recall, table_bytes
from headrace.offload.route_statistics import RouteStatistics
from headrace.offload.window import Read
from headrace.placing import Placed, PlacedMatrix, cacheable
from headrace.plan import LOOK_AHEAD

USEFUL = 0.88  # of what is asked for ahead is used (replays of `headrace.offload.routing_replay`)
SAMPLED = 256  # matrices of experts that show how fast flash is


def room_of(decoder: Decoder, placed: Sequence[Placed], tables: int = 0) -> ExpertRoom | None:
    """What a cache of a decoder's experts takes, and a predictor's tables of so many bytes.

    None: there are none, or they cannot have one.
    """
    if not cacheable(placed):
        return None
    by_name = {p.matrix.name: p for p in placed}
    routed = decoder.in_parts()
    slots = [
        slot_offsets([by_name[m.name].n_bytes for m in expert.matrices()])[1]
        for one in routed
        for expert in one.computed
    ]
    count = sum(len(one.computed) for one in routed)
    # A token's experts, and as many that are on their way; or all clusters of a layer.
    least = max(2 * one.active if isinstance(one, Experts) else len(one.each) for one in routed)
    readers = max(mode.readers for mode in MODES)
    raw = [p for p in placed if p.expert and not p.straight]
    tiles = [(16 * p.info.n_bytes // p.matrix.rows, -(-p.matrix.rows // 16)) for p in raw]
    most = rows_at_once(max(slots))
    landing = max((landing_bytes(n * min(k, max(1, most // n))) for n, k in tiles), default=0)
    return ExpertRoom(
        slot_bytes=max(slots),
        least=min(least, count),
        count=count,
        beside=readers * landing + tables,
        n_bytes=sum(p.n_bytes for p in placed if p.expert),
    )


def expected_rate(
    room: ExpertRoom, slots: int, learned: RouteStatistics | None, fired: Fired | None = None
) -> tuple[float, float]:
    """Uses that wait for nothing, and experts that are read for each use, one token at a time.

    That is so where what is asked for ahead comes in time; `hits_in_time` says what is left else.
    Without statistics as if all experts were chosen equally often, and nobody knew which; of
    clusters of neurons, those that fire most are in memory.
    """
    if fired is not None:
        rate = fired.rate(slots)
        return rate, 1 - rate
    share = slots / room.count
    return (share, 1 - share) if learned is None else learned.rate(share)


def hits_in_time(rate: tuple[float, float], in_time: Callable[[float], float]) -> float:
    """Uses that wait for nothing, of what `expected_rate` gives.

    Args:
        in_time: gives the share of the experts that are asked for ahead that come in time, where a
            share of what is read is not asked for ahead (`headrace.prediction.Passes.in_time`).
    """
    hits, reads = rate
    missed = 1 - hits
    wanted = min(hits, USEFUL * max(0.0, reads - missed))
    return hits - wanted * (1 - in_time(missed / reads)) if reads else hits


def expected_bytes(
    decoder: Decoder, room: ExpertRoom, slots: int, n_tokens: int,
    learned: RouteStatistics | None = None, fired: Fired | None = None,
) -> int:  # fmt: skip
    """Bytes that a pass over so many tokens reads; see `expected_rate`."""
    one = room.n_bytes / room.count
    if fired is not None:
        return int(fired.read_clusters(slots, n_tokens) * one)
    visits = uses = 0.0
    for number, mixture in enumerate(decoder.mixtures().values()):
        n = len(mixture.each)
        shares = np.full(n, mixture.active / n)
        if learned is not None:
            shares = learned.frequency[number, :n].astype(float)
        computed, idle = np.split(shares, [len(mixture.computed)])
        uses += mixture.active - float(idle.sum())
        visits += float((1 - (1 - computed) ** n_tokens).sum())
    if n_tokens == 1:
        return int(uses * expected_rate(room, slots, learned)[1] * one)
    return int(visits * (1 - slots / room.count) * one)


def predictor_bytes(learned: RouteStatistics | None, predictor: Predictor) -> int:
    """Bytes that a predictor takes beside the model, with what was read of it."""
    if learned is None:
        return 0
    if predictor == "fitted" and learned.fitted.size:
        return fitted_bytes(learned.fitted) + learned.fitted.nbytes
    read = {"pairs": learned.pairs, "affinity": learned.affinity}.get(predictor)
    return 0 if read is None else table_bytes(learned, predictor) + read.nbytes


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
    files: Mapping[Path, StreamedFile], predictor: Predictor = "fitted",
    learned: RouteStatistics | None = None, fired: Fired | None = None,
) -> ExpertCache:  # fmt: skip
    """A cache of so many slots for a decoder's experts, with what predicts them.

    Of clusters of neurons the cache knows from the start which fire most.

    Raises:
        BudgetError: the system gives no memory for it.
    """
    layers = [
        [[_matrix(placed[m.name], addresses) for m in one.matrices()] for one in routed.each]
        for routed in decoder.in_parts()
    ]
    if fired is not None:
        return ExpertCache(
            layers, slots, addresses["experts_read"], files, 0, 1, predictor="none",
            shares=fired.clusters,
        )  # fmt: skip
    active = max(one.active for one in decoder.mixtures().values())
    return ExpertCache(
        layers,
        slots,
        addresses["experts_read"],
        files,
        look_ahead(slots, active),
        active,
        routers=FittedRouters(learned.fitted) if learned and learned.fitted.size else None,
        predictor=predictor,
        recall=Recall(learned, predictor) if learned and table_bytes(learned, predictor) else None,
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
