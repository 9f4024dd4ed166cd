"""Experts in memory and on flash, as data: what steps of a plan ask for, and native readers bring.

One thread, thread 0 of a team, asks, evicts (`headrace.offload.expert_requests`) and counts;
readers only read. Experts are numbered layer by layer. Each has a slot from the moment in which it
is asked for, so that its address is known before its bytes have come. All slots of a store have the
same size.

Store (64 words of 8 bytes; words that threads share have cache lines of their own):
    0 experts, 1 slots, 2 number of slots, 3 reads, 4 policy, 5 layers, 6 ring of demands, 7 ring of
    reads ahead, 8 lock, 16 readers stop, 24 a read failed for good, 32 function that reads, 33 that
    drops what was read from the system's cache (0: none), 34 that takes a permit, 35 that gives
    one, 36 their argument, 37 readers, 38 function that naps, 39 its argument, 40 pauses before a
    waiting thread naps; under the lock: 41 and 42 begin and end of the ring of demands, 43 and 44
    of reads ahead, 45 readers that have been woken and not looked at them yet; counted by
    thread 0: 48 clock of uses, 49 uses that waited for nothing, 50 uses that waited for a read
    ahead, 51 uses that asked for a read, 52 experts asked for ahead, 53 of those used, 54 dropped
    before all was read, 55 ticks that thread 0 has waited; 56 address of the word that cancels a
    job; 57 reads that were made of what was dropped; 58 how often, of `ALWAYS`, predictions must
    have come true that are believed; 59 how often thread 0 has asked readers, and 60 the ticks that
    it took
Expert (16 words): 0 state (0 on flash, 1 asked for, 2 there, 3 there is nothing to read: such an
    expert is never asked for, and neither hit nor miss), 1 reads that are done, 2 whether no
    further ones are to begin, as it is not wanted any more (written under the lock), 3 how many
    reads of each part are done, in fields of `PART_BITS`, 4 how many there are, 7 share of
    the last tokens that took it, of `ALWAYS`, 8 slot, 9 first read, 10 reads, 11 next read (under
    the lock), 12 uses, 13 clock of the last use, 14 layer, 15 whether it was asked for ahead and
    not used since
Slot (4 words): 0 address, 1 expert (-1: none), 2 clock up to which it must stay
Read (16 words): 0 file descriptor, 1 offset, 2 bytes to ask for, 3 bytes that must come, 4 where
    in the slot, 5 kernel that tiles what was read (0: none), then its slots: 6 bytes of a row,
    7 blocks in a row, 8 tiles; 9 where rows begin in what was read, 10 what it adds to the reads
    of parts that are done
"""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_add,
    atomic_get,
    atomic_put,
    call_kernel,
    call_system,
    int_to_ptr,
    larger,
    put_i64,
    spin_pause,
)
from headrace.targets.table import Kernel, no_cases, same_for_all

STORE_WORDS, EXPERT_WORDS, SLOT_WORDS, READ_WORDS, RING = 64, 16, 4, 16, 1024
EXPERTS, SLOTS, N_SLOTS, READS, POLICY, LAYERS, DEMANDS, AHEAD = range(8)
LOCK, STOP, FAILED = 8, 16, 24
READ, DROP, TAKE, GIVE, GIVE_TO, READERS, NAP, NAP_FOR, PATIENCE = range(32, 41)
D_BEGIN, D_END, A_BEGIN, A_END, WAKING = range(41, 46)
CLOCK, HITS, LATE, MISSES, ASKED, USED, DROPPED, STALL, CANCEL, IN_VAIN, SURE = range(48, 59)
REQUESTS, ASKING = 59, 60
STATE, DONE, PAUSED, ARRIVED, WHOLE, SHARE = 0, 1, 2, 3, 4, 7
SLOT, FIRST_READ, N_READS, NEXT_READ, USES, LAST, LAYER, EARLY = range(8, 16)
ABSENT, COMING, THERE, NOTHING = range(4)
ADDRESS, EXPERT, STAYS = range(3)
FILE, OFFSET, ASK, NEED, TO, TILE, ROW_BYTES, BLOCKS, TILES, BEGIN, ADDS = range(11)
PARTS, PART_BITS, ALL_PARTS = 3, 20, -1  # of an expert: gate, up, down
# A reader's own words.
OWN_WORDS, OWN_READ, OWN_EXPERT, OWN_ROWS, OWN_TILE = 16, 1, 2, 3, 4
DONT_NEED = 4  # POSIX_FADV_DONTNEED on Linux
LRU, LFU, EDGE, EDGE_PRINTED, NEXT_USE = range(5)
ALWAYS = 65536  # a share of one
SURE_ENOUGH = 0.6  # predictions are believed that come true so often where nothing is waited for
# What is predicted for a layer from one of those before it: how far the logits of what is predicted
# are above the first that is not, on average (float32); by how far they are, in classes, the share
# of predictions that came true, and how many have been judged; then for each rank: expert, class,
# whether it was not there.
MARGIN, TRUE, JUDGED, CLASSES, RANKED, RANK_WORDS = 0, 1, 9, 8, 17, 3
# The first ones count as much as so many before them, of which half came true, the later ones no
# less than one of so many: what is long ago fades.
DOUBT, FADE = 3, 16
PREDICTED, CLASS, WAS_ABSENT = range(3)


def prediction_words(ranks: int) -> int:
    """Words of what is predicted."""
    return RANKED + RANK_WORDS * ranks


def part_mask(part: int) -> int:
    """The bits of `ARRIVED` that are a part's."""
    return ((1 << PART_BITS) - 1) << (PART_BITS * part)


def nap(store: Any, spins: Any) -> None:
    """Wait a moment; longer once somebody has waited for long."""
    spin_pause()
    if spins >= arg_int(store, PATIENCE) and arg_int(store, NAP) != 0:
        call_system(int_to_ptr(arg_int(store, NAP)), arg_int(store, NAP_FOR), 0, 0, 0)


def lock(store: Any) -> None:
    """Take the lock: for a few dozen instructions at a time.

    Who finds it taken looks until it is free before trying again, and naps: where all cores spin,
    whoever has it, or has just tried in vain, would not be let go on.
    """
    spins = 0
    while atomic_add(store + LOCK * 8, 1) != 0:
        atomic_add(store + LOCK * 8, -1)
        while atomic_get(store + LOCK * 8) != 0:
            nap(store, spins)
            spins += 1


def unlock(store: Any) -> None:
    """Give the lock back."""
    atomic_add(store + LOCK * 8, -1)


def expert_at(store: Any, number: Any) -> Any:
    """Address of an expert's words."""
    return arg_ptr(store, EXPERTS) + number * (EXPERT_WORDS * 8)


def slot_at(store: Any, number: Any) -> Any:
    """Address of a slot's words."""
    return arg_ptr(store, SLOTS) + number * (SLOT_WORDS * 8)


def slot_of(store: Any, expert: Any) -> Any:
    """Address of the words of the slot that an expert has."""
    return slot_at(store, arg_int(expert, SLOT))


def count(store: Any, word: int) -> None:
    """One more of what a word counts."""
    put_i64(store + word * 8, arg_int(store, word) + 1)


def arrived(expert: Any, parts: Any) -> Any:
    """Whether an expert is there, or of one on its way some parts are (a mask, or `ALL_PARTS`)."""
    state = atomic_get(expert)
    missing = (atomic_get(expert + ARRIVED * 8) ^ arg_int(expert, WHOLE)) & parts
    return state >= THERE or (state == COMING and parts != ALL_PARTS and missing == 0)


def _first(store: Any, begin: int, ring: int) -> Any:
    """The first expert of a ring of which a read can begin; -1: there is none. Under the lock."""
    found = -1
    going = True
    while going:
        at = arg_int(store, begin)
        going = at < arg_int(store, begin + 1)
        if going:
            number = arg_int(arg_ptr(store, ring) + at % RING * 8, 0)
            expert = expert_at(store, number)
            left = arg_int(expert, NEXT_READ) < arg_int(expert, N_READS)
            if left and arg_int(expert, PAUSED) == 0:
                found = number
                going = False
            else:
                put_i64(store + begin * 8, at + 1)
    return found


def _first_of_all(store: Any) -> Any:
    """The same of both rings: demands overtake what is read ahead."""
    found = _first(store, D_BEGIN, DEMANDS)
    if found < 0:
        found = _first(store, A_BEGIN, AHEAD)
    return found


def wakes(store: Any, wanted: Any) -> Any:
    """How many readers are to be woken, after unlocking, so that so many are on their way.

    Under the lock. Waking a thread may take ten times as long as asking (15 us in a virtual
    machine), and who is woken sees all that has been asked for until it looks.
    """
    coming = arg_int(store, WAKING)
    put_i64(store + WAKING * 8, larger(coming, wanted))
    return larger(0, wanted - coming)


def wake(store: Any, readers: Any) -> None:
    """Wake so many readers."""
    for _ in range(readers):
        call_system(int_to_ptr(arg_int(store, GIVE)), arg_int(store, GIVE_TO), 1, 0, 0)


def read(own: Any, thread: Any, n_threads: Any) -> None:
    """A reader: bring experts until told to stop, or until the system does not give what is wanted.

    Slots: 0 store, 1 number of the read that failed (-1: none), which the caller may have made
    since: then it goes on behind it, 2 its expert, 3 a buffer for rows that are to be tiled,
    4..8 the argument block of the kernel that tiles them.
    """
    store = arg_ptr(own, 0)
    take = arg_int(store, TAKE)
    read_address = arg_int(store, READ)
    drop = arg_int(store, DROP)
    made = arg_int(own, OWN_READ) >= 0
    going = True
    while going:
        if not made:
            # It fails where a signal comes: then there is just nothing to do.
            call_system(int_to_ptr(take), arg_int(store, GIVE_TO), -1, 0, 0)
        busy = atomic_get(store + STOP * 8) == 0
        going = busy
        woken = not made
        while busy:
            if not made:
                more = 0
                begun = 0
                lock(store)
                if woken:
                    put_i64(store + WAKING * 8, larger(0, arg_int(store, WAKING) - 1))
                    woken = False
                number = _first_of_all(store)
                busy = number >= 0
                if busy:
                    expert = expert_at(store, number)
                    n = arg_int(expert, NEXT_READ)
                    put_i64(expert + NEXT_READ * 8, n + 1)
                    begun = arg_int(expert, FIRST_READ) + n
                    if _first_of_all(store) >= 0:
                        more = wakes(store, 1)
                unlock(store)
                wake(store, more)
                busy = busy and atomic_get(store + STOP * 8) == 0
                if busy:
                    put_i64(own + OWN_EXPERT * 8, number)
                    put_i64(own + OWN_READ * 8, begun)
            if busy:
                expert = expert_at(store, arg_int(own, OWN_EXPERT))
                entry = arg_ptr(store, READS) + arg_int(own, OWN_READ) * (READ_WORDS * 8)
                to = arg_int(slot_of(store, expert), ADDRESS) + arg_int(entry, TO)
                tile = arg_int(entry, TILE)
                address = to
                if tile != 0:
                    address = arg_int(own, OWN_ROWS)
                need = arg_int(entry, NEED)
                at = 0
                while at < need and busy and not made:
                    got = 0
                    if read_address != 0:
                        got = call_system(
                            int_to_ptr(read_address), arg_int(entry, FILE), address + at,
                            arg_int(entry, ASK) - at, arg_int(entry, OFFSET) + at,
                        )  # fmt: skip
                    if got <= 0:
                        busy = False
                        going = False
                    else:
                        at += got
                made = False
                if busy:
                    if drop != 0:
                        call_system(
                            int_to_ptr(drop), arg_int(entry, FILE), arg_int(entry, OFFSET),
                            arg_int(entry, ASK), DONT_NEED,
                        )  # fmt: skip
                    if tile != 0:
                        put_i64(own + OWN_TILE * 8, address + arg_int(entry, BEGIN))
                        put_i64(own + (OWN_TILE + 1) * 8, arg_int(entry, ROW_BYTES))
                        put_i64(own + (OWN_TILE + 2) * 8, to)
                        put_i64(own + (OWN_TILE + 3) * 8, arg_int(entry, BLOCKS))
                        put_i64(own + (OWN_TILE + 4) * 8, arg_int(entry, TILES))
                        call_kernel(int_to_ptr(tile), own + OWN_TILE * 8, 0, 1)
                    put_i64(own + OWN_READ * 8, -1)
                    atomic_add(expert + ARRIVED * 8, arg_int(entry, ADDS))
                    if atomic_add(expert + DONE * 8, 1) == arg_int(expert, N_READS) - 1:
                        atomic_put(expert, THERE)


def kernel() -> Kernel:
    """The row of the reader."""
    return Kernel("experts_read", same_for_all(read), (__name__,), no_cases, __name__)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [kernel()]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
