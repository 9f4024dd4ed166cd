"""Experts that are asked for before they are chosen, and how often such guesses came true.

What is predicted for a layer: see `headrace.offload.expert_store`.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.experts import LOWEST
from headrace.offload.expert_requests import (
    coming,
    enough_ahead,
    want,
)
from headrace.offload.expert_store import (
    ALWAYS,
    CLASS,
    CLASSES,
    CLOCK,
    DOUBT,
    FADE,
    JUDGED,
    LAYERS,
    MARGIN,
    NOTHING,
    RANK_WORDS,
    RANKED,
    STAYS,
    SURE,
    TRUE,
    WAS_ABSENT,
    expert_at,
    slot_of,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_get,
    get_f32,
    get_i64,
    larger,
    put_f32,
    put_i64,
    smaller,
)

HUGE = 1.0e30  # above all logits that count


def predict(args: Any, thread: Any, n_threads: Any) -> None:
    """Ask ahead for the experts that a layer will choose, by what its router says already.

    Thread 0 does it. What is asked for are those whose logits are so far above the first that is
    not predicted that such predictions came true often enough, the next layer's first, until
    readers have enough to do.
    Slots: 0 store, 1 logits (float32 [experts]; overwritten), 2 experts, 3 predictions
    (`headrace.offload.expert_store`), 4 ranks, 5 number of the layer's first expert, 6 layer,
    7 mixtures that come before it, 8 more logits to be added to those (0: none).
    """
    if thread == 0:
        store = arg_ptr(args, 0)
        row = arg_ptr(args, 1)
        predictions = arg_ptr(args, 3)
        ranks = arg_int(args, 4)
        base = arg_int(args, 5)
        layer = arg_int(args, 6)
        stays = arg_int(store, CLOCK) + arg_int(args, 7)
        running = layer - 1 - arg_int(args, 7)
        if running < 0:  # a mixture of the token before
            running += arg_int(store, LAYERS)
        if arg_int(args, 8) != 0:
            for e in range(arg_int(args, 2)):
                put_f32(row + e * 4, get_f32(row + e * 4) + get_f32(arg_ptr(args, 8) + e * 4))
        usual = get_f32(predictions + MARGIN * 8)
        above = usual - usual
        for rank in range(ranks):
            best, high = _best(row, arg_int(args, 2))
            put_i64(predictions + (RANKED + rank * RANK_WORDS) * 8, best)
            put_f32(predictions + (RANKED + rank * RANK_WORDS + CLASS) * 8, high)
            put_f32(row + best * 4, LOWEST)
        _, next_best = _best(row, arg_int(args, 2))
        for rank in range(ranks):
            entry = predictions + (RANKED + rank * RANK_WORDS) * 8
            margin = get_f32(entry + CLASS * 8) - next_best
            if not (margin > -HUGE and margin < HUGE):  # there are no more experts, or no numbers
                margin = usual - usual
            above += margin
            at = 0
            while at < CLASSES - 1 and margin > usual * 0.5 * (at + 1):
                at += 1
            number = base + get_i64(entry)
            expert = expert_at(store, number)
            absent = not coming(expert)
            put_i64(entry + CLASS * 8, at)
            put_i64(entry + WAS_ABSENT * 8, 1 if absent else 0)
            sure = get_i64(predictions + (TRUE + at) * 8) >= arg_int(store, SURE)
            if absent and sure and not enough_ahead(store):
                absent = want(store, number, running, 1) == 0
            if not absent and atomic_get(expert) != NOTHING:
                slot = slot_of(store, expert)
                put_i64(slot + STAYS * 8, larger(arg_int(slot, STAYS), stays))
        put_f32(predictions + MARGIN * 8, usual + (above / ranks - usual) / 64)


def _best(row: Any, experts: Any) -> Any:
    """The first of the largest logits."""
    best = 0
    high = LOWEST
    for e in range(experts):
        logit = get_f32(row + e * 4)
        if logit > high:
            high = logit
            best = e
    return best, high


def judge(predictions: Any, ranks: Any, chosen: Any, active: Any) -> None:
    """Remember which predictions came true of what was not there; what is long ago fades."""
    for rank in range(ranks):
        entry = predictions + (RANKED + rank * RANK_WORDS) * 8
        if get_i64(entry + WAS_ABSENT * 8) != 0:
            put_i64(entry + WAS_ABSENT * 8, 0)
            came = 0
            for k in range(active):
                if get_i64(chosen + k * 8) == get_i64(entry):
                    came = ALWAYS
            at = predictions + (TRUE + get_i64(entry + CLASS * 8)) * 8
            judged = at + (JUDGED - TRUE) * 8
            put_i64(judged, get_i64(judged) + 1)
            weight = smaller(get_i64(judged) + DOUBT, FADE)
            put_i64(at, get_i64(at) + (came - get_i64(at)) // weight)
