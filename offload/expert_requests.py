"""What thread 0 asks a store of experts for, what it takes back, and whose slot it gives away.

See `headrace.offload.expert_store`, whose readers bring what is asked for.
"""

from __future__ import annotations

from typing import Any

from headrace.offload.expert_store import (
    A_BEGIN,
    A_END,
    ABSENT,
    AHEAD,
    ALWAYS,
    ARRIVED,
    ASKED,
    ASKING,
    CLOCK,
    COMING,
    D_BEGIN,
    D_END,
    DEMANDS,
    DONE,
    DROPPED,
    EARLY,
    EDGE,
    EDGE_PRINTED,
    EXPERT,
    IN_VAIN,
    LAST,
    LAYER,
    LAYERS,
    LFU,
    N_READS,
    N_SLOTS,
    NEXT_READ,
    NEXT_USE,
    PAUSED,
    POLICY,
    READERS,
    REQUESTS,
    RING,
    SHARE,
    SLOT,
    STAYS,
    THERE,
    USES,
    WAKING,
    count,
    expert_at,
    lock,
    slot_at,
    slot_of,
    unlock,
    wake,
    wakes,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_get,
    atomic_put,
    clock,
    put_i64,
    smaller,
)

ENOUGH = 2  # reads for each reader: it has one to begin when others are done


def _score(store: Any, expert: Any, layer: Any) -> Any:
    """What an expert is worth keeping while `layer` runs: the least goes first.

    LFU is the same number for all distances. EdgeMoE (2308.14352): uses over the distance to the
    next use of its layer; as printed there, over the time since the last one. NEXT_USE: what is
    expected to be used last goes first, as if each token took it with the chance that its share of
    the last tokens is.
    """
    policy = arg_int(store, POLICY)
    last = arg_int(expert, LAST)
    uses = arg_int(expert, USES)
    value = last
    if policy == LFU:
        value = uses * 16777216 + last % 16777216
    if policy in (EDGE, EDGE_PRINTED, NEXT_USE):
        layers = arg_int(store, LAYERS)
        distance = arg_int(expert, LAYER) - layer
        if policy == EDGE_PRINTED:
            distance = layer - arg_int(expert, LAYER)
        if distance <= 0:
            distance += layers
        value = uses * 16777216 // distance
        if policy == NEXT_USE:
            share = arg_int(expert, SHARE)
            tokens = (ALWAYS - share) * 1024 // (share + 16)
            value = -(distance * 1024 + layers * tokens)
    return value


def given_up(expert: Any) -> Any:
    """Whether an expert is not wanted any more, and no read of it on its way. For thread 0."""
    paused = arg_int(expert, PAUSED) != 0
    return paused and atomic_get(expert + DONE * 8) == arg_int(expert, NEXT_READ)


def coming(expert: Any) -> Any:
    """Whether an expert is there, or will be."""
    return atomic_get(expert) != ABSENT and arg_int(expert, PAUSED) == 0


def _free_slot(store: Any, layer: Any) -> Any:
    """A slot that is free or may be: of the expert that is worth least; -1: there is none."""
    now = arg_int(store, CLOCK)
    best = -1
    least = 0
    n = arg_int(store, N_SLOTS)
    i = 0
    while i < n:
        slot = slot_at(store, i)
        number = arg_int(slot, EXPERT)
        if number < 0:
            best = i
            i = n
        else:
            expert = expert_at(store, number)
            state = atomic_get(expert)
            stays = arg_int(slot, STAYS) >= now
            if not stays and state == COMING and given_up(expert):
                best = i
                i = n
            elif not stays and state == THERE:
                score = _score(store, expert, layer)
                if best < 0 or score < least:
                    best = i
                    least = score
            i += 1
    return best


def _push(store: Any, ring: int, begin: int, number: Any) -> None:
    """Put an expert behind a ring; under the lock."""
    end = arg_int(store, begin + 1)
    put_i64(arg_ptr(store, ring) + end % RING * 8, number)
    put_i64(store + (begin + 1) * 8, end + 1)


def _push_one(store: Any, number: Any, ahead: Any) -> None:
    """Put an expert behind the ring that is its own; under the lock."""
    if ahead != 0:
        _push(store, AHEAD, A_BEGIN, number)
    else:
        _push(store, DEMANDS, D_BEGIN, number)


def want(store: Any, number: Any, layer: Any, ahead: Any) -> Any:
    """Ask for an expert that is not there: 1, or 0 if no slot is free, or no place in a ring.

    One that was asked for ahead is asked for again, once, in front of all others that were.
    """
    began = clock()
    asks = False
    woken = 0
    expert = expert_at(store, number)
    given = 1
    waiting = arg_int(store, A_END) - arg_int(store, A_BEGIN)
    if ahead == 0:
        waiting = arg_int(store, D_END) - arg_int(store, D_BEGIN)
    if waiting >= RING:
        given = 0
    elif atomic_get(expert) == ABSENT:
        i = _free_slot(store, layer)
        if i < 0:
            given = 0
        else:
            slot = slot_at(store, i)
            before = arg_int(slot, EXPERT)
            if before >= 0:
                old = expert_at(store, before)
                if atomic_get(old) == COMING:
                    count(store, DROPPED)
                    reads = arg_int(store, IN_VAIN) + arg_int(old, NEXT_READ)
                    put_i64(store + IN_VAIN * 8, reads)
                atomic_put(old, ABSENT)
            put_i64(slot + EXPERT * 8, number)
            put_i64(expert + SLOT * 8, i)
            put_i64(expert + EARLY * 8, ahead)
            atomic_put(expert + DONE * 8, 0)
            atomic_put(expert + ARRIVED * 8, 0)
            atomic_put(expert, COMING)
            lock(store)
            put_i64(expert + NEXT_READ * 8, 0)
            put_i64(expert + PAUSED * 8, 0)
            _push_one(store, number, ahead)
            woken = wakes(store, _readers_for(store, arg_int(expert, N_READS), ahead))
            unlock(store)
            asks = True
            if ahead != 0:
                count(store, ASKED)
    elif arg_int(expert, PAUSED) != 0:  # it goes on where it stopped
        lock(store)
        put_i64(expert + PAUSED * 8, 0)
        put_i64(expert + EARLY * 8, ahead)
        _push_one(store, number, ahead)
        left = arg_int(expert, N_READS) - arg_int(expert, NEXT_READ)
        woken = wakes(store, _readers_for(store, left, ahead))
        unlock(store)
        asks = True
    elif ahead == 0 and atomic_get(expert) == COMING and arg_int(expert, EARLY) != 0:
        lock(store)
        left = arg_int(expert, N_READS) - arg_int(expert, NEXT_READ)
        if left > 0:
            _push(store, DEMANDS, D_BEGIN, number)
            woken = wakes(store, _readers_for(store, left, 0))
        put_i64(expert + EARLY * 8, 0)
        unlock(store)
    wake(store, woken)
    if asks:
        count(store, REQUESTS)
        put_i64(store + ASKING * 8, arg_int(store, ASKING) + (clock() - began))
    return given


def _readers_for(store: Any, reads: Any, ahead: Any) -> Any:
    """How many readers should be on their way: one, who wakes others, where nobody waits for them.

    Under the lock.
    """
    readers = arg_int(store, READERS)
    if ahead != 0:
        readers = smaller(readers, 1)
    return smaller(readers, arg_int(store, WAKING) + reads)


def drop_stale(store: Any, layer: Any) -> None:
    """Take back what was asked for ahead for `layer` and is not wanted.

    What has begun to be read keeps its slot, so that it can go on, until somebody needs it.
    """
    now = arg_int(store, CLOCK)
    lock(store)
    for i in range(arg_int(store, A_BEGIN), arg_int(store, A_END)):
        number = arg_int(arg_ptr(store, AHEAD) + i % RING * 8, 0)
        expert = expert_at(store, number)
        slot = slot_of(store, expert)
        if (
            arg_int(expert, LAYER) == layer
            and atomic_get(expert) == COMING
            and arg_int(expert, EARLY) != 0
            and arg_int(expert, NEXT_READ) < arg_int(expert, N_READS)
            and arg_int(slot, STAYS) < now
        ):
            put_i64(expert + PAUSED * 8, 1)
    unlock(store)


def enough_ahead(store: Any) -> Any:
    """Whether readers have plenty to do with what was asked for ahead and has not begun to be read.

    What is asked for later is known better, and until then its slot keeps what is there.
    """
    reads = 0
    for i in range(arg_int(store, A_BEGIN), arg_int(store, A_END)):  # without the lock: about
        expert = expert_at(store, arg_int(arg_ptr(store, AHEAD) + i % RING * 8, 0))
        early = atomic_get(expert) == COMING and arg_int(expert, EARLY) != 0
        if early and arg_int(expert, PAUSED) == 0:
            reads += arg_int(expert, N_READS) - arg_int(expert, NEXT_READ)
    return reads >= ENOUGH * arg_int(store, READERS)
