"""A loaded model in another budget: what of it stays in memory then, and what predicts experts."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from headrace.choices import Sizes
from headrace.errors import BudgetError, HeadraceError
from headrace.expert_memory import predictor_bytes
from headrace.learned_routes import statistics_of
from headrace.offload.budget import Choice, Limit
from headrace.offload.pieces import LEAST_SLOTS, least_bytes
from headrace.offload.prefix import least_bytes as rest_bytes
from headrace.planning import Prepared, fit_in, limit_of


def refit(prepared: Prepared, budget: int | None, owner: object = None) -> Prepared:
    """The same model, which `owner` has loaded, with the same context in another budget.

    Fitted routers that there is no room for go, as when a model is loaded, and come back later.

    Raises:
        BudgetError: it does not fit.
    """
    p, limit = prepared, limit_of(budget, owner)
    if p.wanted_predictor == "fitted" and p.tables:
        with contextlib.suppress(BudgetError):
            found = _with_fitted(_fitting(_roomed(p, with_fitted=True), limit, budget))
            if found is not None:
                return found
        p = _roomed(p, with_fitted=False)
    try:
        return _fitting(p, limit, budget)
    except BudgetError as error:
        raise BudgetError(
            f"{error}. A model that is loaded keeps its context of {p.shape.context} tokens and "
            f"its chunks of {p.shape.chunk}: loaded anew within that memory it takes shorter ones",
            needed_bytes=error.needed_bytes,
        ) from error


def least(prepared: Prepared) -> Prepared:
    """The same model with the same context in as little memory as it can have."""
    fitted = prepared.wanted_predictor == "fitted" and prepared.tables
    p = _roomed(prepared, with_fitted=False) if fitted else prepared
    choice = _same_choices(p, None)[1][-1]
    n_bytes = sum(choice.whole.values())
    if len(p.pieces) >= LEAST_SLOTS:
        n_bytes = min(n_bytes, sum(choice.streaming.values()) + least_bytes(p.pieces))
    if p.rest is not None:
        n_bytes = sum(choice.streaming.values()) + (rest_bytes(p.rest) or 0)
    elif p.stack is not None:
        n_bytes += p.stack.n_bytes(p.stack.least)
    elif p.room is not None:
        least_experts = p.room.cache_bytes(p.room.least)
        n_bytes = sum(choice.streaming.values()) + least_experts
        dense = sum(piece.kept_bytes for piece in p.pieces)
        n_bytes += dense if len(p.pieces) < LEAST_SLOTS else min(dense, least_bytes(p.pieces))
    return _fitting(p, Limit(n_bytes), p.budget)


def _fitting(p: Prepared, limit: Limit, budget: int | None) -> Prepared:
    """What stays in memory within a limit.

    Raises:
        BudgetError: it does not fit.
    """
    whole, small = _same_choices(p, limit.n_bytes)
    found = fit_in(limit, whole, small, p.pieces, p.stack, p.rest, p.room, p.file)
    return replace(
        p, parts=found.parts, residency=found.residency, blocks=found.blocks, slots=found.slots,
        logits_at_once=found.choice.logits_rows, budget=budget, limit=limit.n_bytes,
    )  # fmt: skip


def _roomed(p: Prepared, *, with_fitted: bool) -> Prepared:
    """A model with room for fitted routers, or none; without it others predict."""
    if p.room is None:
        return p
    beside = p.room.beside + p.tables * (with_fitted - (p.predictor == "fitted"))
    room = replace(p.room, beside=beside)
    if with_fitted or p.learned is None:
        return replace(p, room=room)
    return replace(p, room=room, predictor="gates", learned=p.learned.only("gates"))


def _with_fitted(p: Prepared) -> Prepared | None:
    """A model that has room for fitted routers with them; None: their file is no more what it was.

    They are read again if they had gone.
    """
    if p.predictor == "fitted":
        return p
    with contextlib.suppress(HeadraceError):
        learned, _ = statistics_of(p.file.source, p.file)
        if learned is not None and predictor_bytes(learned, "fitted") == p.tables:
            return replace(p, predictor="fitted", learned=learned.only("fitted"))
    return None


def _same_choices(p: Prepared, limit: int | None) -> tuple[list[Choice], list[Choice]]:
    """What the sizes take that were chosen before: whole, and with weights that stream."""
    n_pieces = len(p.pieces) if p.rest is None else len(p.rest.pieces)
    sizes = Sizes(
        p.decoder, p.placed, p.target, p.shape.threads, n_pieces, p.stack, p.logits_rows, p.room
    )
    return sizes.same(p.shape.context, p.shape.chunk, limit)
