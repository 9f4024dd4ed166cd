"""Steps of mixtures whose experts are brought from flash: see `headrace.offload.expert_store`.

They stand where `route` (`headrace.kernels.experts`) and `pick` (`headrace.kernels.expert_visits`)
write addresses out of a directory: what comes out is the same, as a step waits for the true expert,
and sums are formed in the order of the choice.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels import expert_predictions
from headrace.kernels.expert_predictions import judge, predict
from headrace.kernels.expert_visits import FIRST, LEFT, NEXT, TOKENS, VISITS
from headrace.kernels.experts import DIRECTORY_SLOTS, point
from headrace.offload import expert_requests, expert_store
from headrace.offload.expert_requests import drop_stale, want
from headrace.offload.expert_store import (
    ABSENT,
    ADDRESS,
    ALWAYS,
    CANCEL,
    CLOCK,
    EARLY,
    FAILED,
    HITS,
    LAST,
    LATE,
    MISSES,
    NOTHING,
    RANK_WORDS,
    RANKED,
    SHARE,
    STALL,
    STAYS,
    THERE,
    USED,
    USES,
    arrived,
    count,
    expert_at,
    nap,
    slot_of,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_get,
    atomic_put,
    clock,
    get_i64,
    int_to_ptr,
    put_i64,
)
from headrace.targets.table import Kernel, no_cases, same_for_all

FADES = 50  # tokens after which a choice counts a third in the share of the last ones


def use(store: Any, expert: Any, now: Any) -> None:
    """Count a use, and what it found; where there is nothing to find it is none."""
    if atomic_get(expert) == THERE:
        count(store, HITS)
    elif atomic_get(expert) == ABSENT:
        count(store, MISSES)
    elif atomic_get(expert) != NOTHING:  # also if its reads have stopped: it is read once
        count(store, LATE)
    if atomic_get(expert) != ABSENT and arg_int(expert, EARLY) != 0:
        count(store, USED)
    put_i64(expert + USES * 8, arg_int(expert, USES) + 1)
    put_i64(expert + LAST * 8, now)


def _has_slot(expert: Any) -> Any:
    state = atomic_get(expert)
    return state != ABSENT and state != NOTHING


def age(expert: Any, taken: Any, tokens: Any) -> None:
    """Let the share of tokens that take an expert be that of the last ones, after some more."""
    share = arg_int(expert, SHARE) * FADES + taken * ALWAYS
    put_i64(expert + SHARE * 8, share // (FADES + tokens))


def _place(numbers: Any, stride: Any, n: Any, number: Any) -> Any:
    """Where a number stands, of n that are so many bytes apart; -1: nowhere."""
    found = -1
    for i in range(n):
        if get_i64(numbers + i * stride) == number:
            found = i
    return found


def cancelled(store: Any) -> Any:
    """Whether the job is cancelled; it is where a read has failed for good."""
    if atomic_get(store + FAILED * 8) != 0:
        atomic_put(arg_ptr(store, CANCEL), 1)
    return atomic_get(arg_ptr(store, CANCEL)) != 0


def demand(store: Any, number: Any, layer: Any) -> None:
    """Ask until a slot is free; what is on its way frees one sooner or later."""
    began = clock()
    spins = 0
    waiting = want(store, number, layer, 0) == 0
    if waiting:  # not for what nobody wants any more
        drop_stale(store, layer)
    while waiting:
        nap(store, spins)
        spins += 1
        waiting = not cancelled(store) and want(store, number, layer, 0) == 0
    if spins > 0:
        put_i64(store + STALL * 8, arg_int(store, STALL) + (clock() - began))


def wait_for(store: Any, expert: Any, parts: Any, thread: Any) -> None:
    """Wait until parts (a mask) of an expert are there, or the job is cancelled; thread 0 counts
    how long.
    """
    if not arrived(expert, parts):
        began = clock()
        spins = 0
        waiting = True
        while waiting:
            nap(store, spins)
            spins += 1
            waiting = not arrived(expert, parts) and not cancelled(store)
        if thread == 0:
            put_i64(store + STALL * 8, arg_int(store, STALL) + (clock() - began))


def claim(args: Any, thread: Any, n_threads: Any) -> None:
    """Have the experts of the only token brought, those first that are there; thread 0 does it.

    Slots: 0 store, 1 chosen experts (int64), 2 active, 3 number of the layer's first expert,
    4 layer, 5 table of addresses for each choice, in the order of visits: pairs for `point`, then
    those that get the row of outputs, one for each product of downs, and those that get the number
    of the expert to wait for; 6 directory, with places in a slot, 7 outputs, 8 bytes of a row,
    9 predictions of the layer, of all distances (0: none), 10 how many, 11 products, 12 products
    of downs, 13 the layer's experts, 14 ranks of predictions, 15 address of a word (0: none) for
    the number of choices that have products, which are the first places, 16 how often an expert is
    waited for.
    """
    if thread == 0:
        store = arg_ptr(args, 0)
        chosen = arg_ptr(args, 1)
        active = arg_int(args, 2)
        base = arg_int(args, 3)
        layer = arg_int(args, 4)
        table = arg_ptr(args, 5)
        now = arg_int(store, CLOCK) + 1
        put_i64(store + CLOCK * 8, now)
        for e in range(arg_int(args, 13)):
            taken = 1 if _place(chosen, 8, active, e) >= 0 else 0
            age(expert_at(store, base + e), taken, 1)
        for k in range(active):
            expert = expert_at(store, base + get_i64(chosen + k * 8))
            use(store, expert, now)
            if _has_slot(expert):
                put_i64(slot_of(store, expert) + STAYS * 8, now)
        ranks = arg_int(args, 14)
        for i in range(arg_int(args, 10)):
            at = arg_ptr(args, 9) + i * (RANKED + RANK_WORDS * ranks) * 8
            judge(at, ranks, chosen, active)
        products = arg_int(args, 11)
        downs = arg_int(args, 12)
        waits = arg_int(args, 16)
        visit = 0
        places = 0
        for turn in range(3):  # those that are there, then the others, then those without weights
            for k in range(active):
                number = base + get_i64(chosen + k * 8)
                expert = expert_at(store, number)
                state = atomic_get(expert)
                nothing = state == NOTHING
                turned = (turn == 0 and state == THERE) or (turn == 1 and not nothing) or turn == 2
                if arg_int(expert, LAST) == now and turned:
                    address = 0
                    if not nothing:
                        if state != THERE:
                            demand(store, number, layer)
                        slot = slot_of(store, expert)
                        put_i64(slot + STAYS * 8, now)
                        put_i64(expert + EARLY * 8, 0)
                        address = arg_int(slot, ADDRESS)
                        places += 1
                    put_i64(expert + LAST * 8, -now)  # it has its visit
                    entry = arg_ptr(args, 6) + (number - base) * (DIRECTORY_SLOTS * 8)
                    to = table + visit * (2 * products + downs + waits) * 8
                    point(entry, address, to, products)
                    row = arg_int(args, 7) + k * arg_int(args, 8)
                    for i in range(downs):
                        put_i64(int_to_ptr(get_i64(to + (2 * products + i) * 8)), row)
                    for i in range(downs, downs + waits):
                        put_i64(int_to_ptr(get_i64(to + (2 * products + i) * 8)), number)
                    visit += 1
        for k in range(active):
            expert = expert_at(store, base + get_i64(chosen + k * 8))
            put_i64(expert + LAST * 8, now)
        if arg_int(args, 15) != 0:
            put_i64(arg_ptr(args, 15), places)
        drop_stale(store, layer)


def await_expert(args: Any, thread: Any, n_threads: Any) -> None:
    """Wait until parts of an expert are there, or the job is cancelled; every thread does.

    Slots: 0 store, 1 number of the expert, 2 parts, a mask (`headrace.offload.expert_store`).
    """
    store = arg_ptr(args, 0)
    wait_for(store, expert_at(store, arg_int(args, 1)), arg_int(args, 2), thread)


def visit(args: Any, thread: Any, n_threads: Any) -> None:
    """Take up the next visit of a chunk: of an expert that is there, if one is; thread 0 does it.

    Slots: 0 visits, 1 store, 2 table of pairs of addresses for `point`, 3 products, 4 number of
    the layer's first expert, 5 layer, 6 directory, with places in a slot, 7 the layer's experts,
    8 address of the token count.
    """
    if thread == 0:
        visits = arg_ptr(args, 0)
        store = arg_ptr(args, 1)
        base = arg_int(args, 4)
        layer = arg_int(args, 5)
        done = get_i64(visits + NEXT * 8)
        left = get_i64(visits + LEFT * 8)
        now = arg_int(store, CLOCK)
        if done == 0:
            now += 1
            put_i64(store + CLOCK * 8, now)
            tokens = get_i64(arg_ptr(args, 8))
            for e in range(arg_int(args, 7)):  # as if the tokens had come one by one
                at = _place(visits + VISITS * 8, 24, left, e)
                taken = 0
                if at >= 0:
                    taken = get_i64(visits + (VISITS + 3 * at + 1) * 8)
                age(expert_at(store, base + e), taken, tokens)
            for i in range(left):
                expert = expert_at(store, base + get_i64(visits + (VISITS + 3 * i) * 8))
                use(store, expert, now)
                if _has_slot(expert):
                    put_i64(slot_of(store, expert) + STAYS * 8, now)
            drop_stale(store, layer)
        else:
            last = visits + (VISITS + 3 * (done - 1)) * 8
            put_i64(slot_of(store, expert_at(store, base + get_i64(last))) + STAYS * 8, now - 1)
        began = clock()
        spins = 0
        found = -1
        while found < 0:
            room = True  # until no slot is free before a visit is over
            for i in range(done, done + left):
                number = base + get_i64(visits + (VISITS + 3 * i) * 8)
                expert = expert_at(store, number)
                if atomic_get(expert) >= THERE:
                    if found < 0:
                        found = i
                elif room:
                    room = want(store, number, layer, 0) != 0
                    if room:
                        put_i64(slot_of(store, expert) + STAYS * 8, now)
            if found < 0:
                nap(store, spins)
                spins += 1
                if cancelled(store):
                    found = done
        if spins > 0:
            put_i64(store + STALL * 8, arg_int(store, STALL) + (clock() - began))
        here = visits + (VISITS + 3 * found) * 8
        there = visits + (VISITS + 3 * done) * 8
        for w in range(3):
            value = get_i64(here + w * 8)
            put_i64(here + w * 8, get_i64(there + w * 8))
            put_i64(there + w * 8, value)
        expert = expert_at(store, base + get_i64(there))
        address = 0
        if atomic_get(expert) != NOTHING:
            put_i64(expert + EARLY * 8, 0)
            address = arg_int(slot_of(store, expert), ADDRESS)
        entry = arg_ptr(args, 6) + get_i64(there) * (DIRECTORY_SLOTS * 8)
        point(entry, address, arg_ptr(args, 2), arg_int(args, 3))
        put_i64(visits + TOKENS * 8, get_i64(there + 8))
        put_i64(visits + FIRST * 8, get_i64(there + 16))
        put_i64(visits + NEXT * 8, done + 1)
        put_i64(visits + LEFT * 8, left - 1)


def kernels() -> dict[str, Kernel]:
    """The rows by operation."""
    steps = {"claim": claim, "await": await_expert, "visit": visit, "predict": predict}
    sources = (
        __name__, expert_predictions.__name__, expert_requests.__name__, expert_store.__name__,
        "headrace.kernels.expert_visits", "headrace.kernels.experts",
    )  # fmt: skip
    return {
        name: Kernel(
            f"experts_{name}",
            same_for_all(fn),
            sources,
            no_cases,  # tests/test_expert_cache.py runs it
            __name__,
        )
        for name, fn in steps.items()
    }


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return list(kernels().values())


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
