"""Decide from a header alone which sizes a model gets on this machine, and what stays in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from headrace import plan as plans
from headrace.arguments import thread_count, whole
from headrace.available import available_bytes, cgroup_limits, resident_bytes
from headrace.choices import DEFAULT_CONTEXT, PROCESS_BYTES, Sizes, streamed_matrices
from headrace.cluster_memory import Fired, fired_of
from headrace.errors import BudgetError, ContextOverflowError, KernelError, UnsupportedError
from headrace.expert_memory import expected_bytes, expected_rate, predictor_bytes, room_of
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.learned_routes import statistics_of
from headrace.loaders.gguf import ModelFile
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.tiled import open_model
from headrace.offload.budget import (
    Choice,
    ExpertRoom,
    Fit,
    Limit,
    fit,
    fit_blocks,
    fit_experts,
    fit_rest,
)
from headrace.offload.files import Stamp, StreamedFile, open_streamed, stamp_of
from headrace.offload.pieces import Piece, Residency
from headrace.offload.prefix import Ranked
from headrace.offload.recall import Predictor
from headrace.offload.route_statistics import RouteStatistics
from headrace.placing import Activations, Placed, pieces_of, place
from headrace.promises import promised
from headrace.sizes import format_size
from headrace.stack import Stack, stack_of
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.pack import Kernels, Pack, shipped
from headrace.targets.target import Target
from headrace.team import default_threads

FREE_SHARE = 0.95  # of free memory that a model takes by itself
ENOUGH = Limit()
# What a process that compiles kernels takes.
COMPILER_BYTES = 200 << 20


@dataclass(frozen=True)
class Prepared:
    """A header turned into everything that loading needs."""

    file: ModelFile
    stamps: Mapping[Path, Stamp]  # of its files, when their headers were read
    decoder: Decoder
    placed: list[Placed]
    target: Target
    shape: plans.Shape
    wanted_context: int  # tokens, were there memory enough
    pieces: Sequence[Piece]  # of the weights that can be streamed
    parts: Mapping[str, int]  # bytes of memory by what they are for
    residency: Residency | None = None  # None: all weights stay in memory
    budget: int | None = None  # that was asked for
    limit: int | None = None  # and what there is: less, if that is not free
    pack: Pack | None = None  # the kernel pack that was asked for
    logits_rows: int = 0  # that whoever scores a text would hold at a time, were there room
    logits_at_once: int = 0  # and what there is room for
    stack: Stack | None = None  # of the matrices that are stacks of blocks
    blocks: int = 0  # of it that stay in memory
    rest: Ranked | None = None  # all of it, if what does not stay is read for every pass
    room: ExpertRoom | None = None  # of experts that may be brought when they are wanted
    slots: int = 0  # for experts, if they are
    learned: RouteStatistics | None = None  # of the file beside the model
    not_learned: str | None = None  # why that file is of no use
    fired: Fired | None = None  # how often clusters of neurons do
    predictor: Predictor = "fitted"
    wanted_predictor: Predictor = "fitted"  # were there memory enough
    tables: int = 0  # bytes of what that has in memory, of which there may be none

    @property
    def used_blocks(self) -> int:
        """Blocks that a pass computes with."""
        return self.blocks if self.rest is None else len(self.rest.pieces)

    def expert_bytes(self, n_tokens: int) -> int:
        """Bytes of experts that a pass over so many tokens is expected to read."""
        if self.room is None or not self.slots:
            return 0
        return expected_bytes(
            self.decoder, self.room, self.slots, n_tokens, self.replayed, self.fired
        )

    @property
    def expert_rate(self) -> tuple[float, float] | None:
        """See `headrace.expert_memory.expected_rate`; None: all experts are there."""
        if self.room is None or not self.slots:
            return None
        return expected_rate(self.room, self.slots, self.replayed, self.fired)

    @property
    def early_expert_rate(self) -> tuple[float, float] | None:
        """The same of the first tokens of an answer; None: nothing is known of these."""
        if self.room is None or not self.slots or self.replayed is None:
            return None
        return self.replayed.early_rate(self.slots / self.room.count)

    @property
    def replayed(self) -> RouteStatistics | None:
        """What was learned with such a predictor: rates of other ones are not known."""
        return self.learned if self.predictor in ("fitted", "gates") else None

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Tensors that may stream, by name."""
        infos = {p.matrix.name: p.info for p in self.placed}
        blocks = self.stack.blocks if self.stack else ()
        return infos | {one.info.name: one.info for one in blocks}

    @property
    def read_bytes(self) -> int:
        """Bytes of weights in memory's form that a token takes: of an embedding only a row."""
        ends = self.decoder.embedding.name, self.decoder.head.name
        tied = ends[0] == ends[1]
        whole = sum(
            p.n_bytes for p in self.placed if (tied or p.matrix.name != ends[0]) and not p.expert
        )
        placed = {p.matrix.name: p for p in self.placed}
        for routed in self.decoder.mixtures().values():  # as many as a token takes, on average
            every = sum(placed[m.name].n_bytes for m in routed.expert_matrices())
            whole += routed.active * every // len(routed.each)
        if self.fired is not None:  # as many as fire
            for shares, one in zip(self.fired.clusters, self.decoder.in_parts(), strict=True):
                every = sum(placed[m.name].n_bytes for m in one.expert_matrices())
                whole += int(every * float(shares.mean()))
        return whole + (self.stack.n_bytes(self.used_blocks) if self.stack else 0)


def prepare(
    path: Path, *, context: int | None, threads: int | None, target: str | None,
    activations: Activations = "q8", kernels: str | Path | None = None, budget: int | None = None,
    logits_rows: int = 0, whole_stack: bool = False, predictor: Predictor = "fitted",
) -> Prepared:  # fmt: skip
    """Read a header and decide sizes for this machine; nothing large is read or allocated.

    Args:
        budget: bytes that the process may take; None: what is free.
        logits_rows: rows of logits that whoever scores a text holds at a time, or fewer.
        whole_stack: compute with all blocks of a stack, and stream those that do not fit.
        predictor: what asks for experts ahead, where they are brought when they are wanted.

    Raises:
        ModelFileError, UnsupportedError: the file cannot be used.
        ContextOverflowError: the context asked for is longer than the model's.
        BudgetError: the model does not fit.
        KernelError: the target is unknown or cannot run here, or `kernels` is no usable pack.
    """
    pack = None if kernels is None else Pack(kernels)
    if activations not in get_args(Activations):
        raise ValueError(f"activations must be 'q8' or 'f32', not {activations!r}")
    file = open_model(path)
    chosen = _picked(target, pack)
    n_threads = default_threads() if threads is None else thread_count(threads)
    most = max(16, 4 * (os.cpu_count() or 1))  # beyond, threads only wait for each other
    if n_threads > most:
        raise ValueError(f"threads must be at most {most} on this machine, not {n_threads}")
    if predictor not in get_args(Predictor):
        raise ValueError(f"predictor must be one of {get_args(Predictor)}, not {predictor!r}")
    learned, not_learned = statistics_of(path, file)
    if predictor in ("pairs", "affinity") and learned is None:
        if not describe(file).mixtures():
            raise UnsupportedError(
                f"has no mixtures of experts: there is nothing that predictor {predictor!r} could "
                "ask for ahead; leave it out",
                path=file.paths[0],
            )
        raise UnsupportedError(
            f"there are no statistics of its routes for predictor {predictor!r}: "
            f"{not_learned or '`headrace trace MODEL TEXT --learn` makes some'}",
            path=file.paths[0],
        )
    if predictor == "pairs" and learned is not None and not len(learned.pairs):
        raise UnsupportedError(
            "the table of pairs of its experts is too large to be kept: use predictor 'affinity'",
            path=file.paths[0],
        )
    limit = limit_of(budget)
    if learned is not None:
        learned = learned.only(predictor)
    sized = partial(
        prepare_for, chosen, file, context, n_threads, activations, logits_rows=logits_rows,
        whole_stack=whole_stack,
    )  # fmt: skip
    wanted, tables = predictor, predictor_bytes(learned, predictor)
    prepared = None
    with contextlib.suppress(BudgetError):
        prepared = sized(limit=limit, tables=tables)
    if prepared is None and predictor == "fitted" and learned is not None and tables:
        predictor, learned = "gates", learned.only("gates")  # which take nothing
        with contextlib.suppress(BudgetError):
            prepared = sized(limit=limit)
    if prepared is None:
        limit = limit_of(budget, share=1.0)  # better without a margin than not at all
        prepared = sized(limit=limit, tables=tables if predictor == wanted else 0)
    if whole_stack and prepared.stack is None:
        raise UnsupportedError(
            "is no stack of blocks, and loads whole: leave out --whole-stack and --draft self",
            path=file.paths[0],
        )
    return replace(
        prepared, pack=pack, budget=budget, limit=limit.n_bytes, learned=learned,
        not_learned=not_learned, predictor=predictor, wanted_predictor=wanted, tables=tables,
    )  # fmt: skip


def bounds(
    path: Path, *, context: int | None = None, threads: int | None = None,
    target: str | None = None, kernels: str | Path | None = None, logits_rows: int = 0,
    whole_stack: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """The fewest bytes that a process works in with a model, and what it takes whole.

    Arguments and what is raised are as in `prepare`.
    """
    return bounds_of(
        open_model(path), context=context, threads=threads, target=target, kernels=kernels,
        logits_rows=logits_rows, whole_stack=whole_stack,
    )  # fmt: skip


def bounds_of(
    file: ModelFile, *, context: int | None = None, threads: int | None = None,
    target: str | None = None, kernels: str | Path | None = None, logits_rows: int = 0,
    whole_stack: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """`bounds` of a header that is known already, such as that of a file not written yet."""
    chosen = _picked(target, None if kernels is None else Pack(kernels))
    n_threads = threads or default_threads()
    options: dict[str, Any] = {"logits_rows": logits_rows, "whole_stack": whole_stack}
    whole = prepare_for(chosen, file, context, n_threads, **options)
    most = sum(whole.parts.values())
    try:
        prepare_for(chosen, file, whole.shape.context, n_threads, limit=Limit(1), **options)
    except BudgetError as error:
        return min(error.needed_bytes, most), most
    raise AssertionError("a model fits in one byte")


def limit_of(budget: int | None, owner: object = None, share: float = FREE_SHARE) -> Limit:
    """What a model may have, the process included: a budget, but no more than is free.

    `owner` is the model if it is loaded; what the others may take is not free. Without a budget it
    is a `share` of what is free.
    """
    asked = Limit(budget, f"the budget (`memory`) is {format_size(budget)}" if budget else "")
    available = available_bytes()
    if available is None:
        return asked
    # What the process has already is part of what it may have.
    others = promised(besides=owner)
    soft = min(cgroup_limits(), default=available + resident_bytes())
    free = max(0, min(available + resident_bytes(), soft) - others)
    if budget is not None and budget <= free:
        return asked
    beside = f", {format_size(others)} for other models not counted" if others else ""
    if budget is None and share < 1:
        private = min(available + resident_bytes(private=True), soft) - others
        free = max(0, int(private * share))
    said = f"this process can have {format_size(free)} (free memory and cgroup limit{beside})"
    return Limit(free, said)


def _picked(target: str | None, pack: Pack | None) -> Target:
    if pack is None:
        return pick_target(target)
    try:
        return pick_target(target, pack.levels)
    except KernelError as error:
        raise KernelError(f"the kernel pack {pack.folder}: {error}") from error


def prepare_for(
    target: Target, file: ModelFile, context: int | None, threads: int,
    activations: Activations = "q8", limit: Limit = ENOUGH, logits_rows: int = 0,
    whole_stack: bool = False, tables: int = 0,
) -> Prepared:  # fmt: skip
    """The same for any machine; `tables` are the bytes of a predictor's.

    Raises:
        ModelFileError, UnsupportedError: the file cannot be used.
        ContextOverflowError: the context asked for is longer than the model's.
        BudgetError: the model does not fit.
    """
    stamps = {path: stamp_of(path) for path in file.paths}
    decoder = describe(file)
    stack = stack_of(file, decoder)
    placed = place(file, decoder, activations, stack)
    if activations == "f32":
        target = replace(target, bf16_dot=False)  # float32 throughout
    if context is not None and whole("context", context, low=1) > decoder.context:
        raise ContextOverflowError(
            f"{file.paths[0]}: a context of {context} tokens is longer than the {decoder.context} "
            f"that the model was trained for; ask for {decoder.context} or fewer"
        )
    rest = stack.ranked() if stack and whole_stack else None
    # Of a stack as many blocks are kept as fit; else nothing of it has to be streamed.
    pieces = [] if stack else pieces_of(streamed_matrices(decoder, placed))
    n_pieces = len(pieces) if rest is None else len(rest.pieces)
    room = room_of(decoder, placed, tables)
    sizes = Sizes(decoder, placed, target, threads, n_pieces, stack, logits_rows, room)
    found = fit_in(
        limit,
        sizes.whole(context),
        sizes.streaming(context, limit.n_bytes),
        pieces,
        stack,
        rest,
        room,
        file,
    )
    shape = plans.Shape(found.choice.context, found.choice.chunk, threads)
    return Prepared(
        file, stamps, decoder, placed, target, shape,
        context or min(decoder.context, DEFAULT_CONTEXT), pieces, found.parts, found.residency,
        stack=stack, blocks=found.blocks, logits_rows=logits_rows,
        logits_at_once=found.choice.logits_rows, rest=rest, room=room, slots=found.slots,
        fired=fired_of(file, decoder),
    )  # fmt: skip


def fit_in(
    limit: Limit, whole: Iterable[Choice], small: Iterable[Choice], pieces: Sequence[Piece],
    stack: Stack | None, rest: Ranked | None, room: ExpertRoom | None, file: ModelFile,
) -> Fit:  # fmt: skip
    """What of a model stays in memory, in whichever way it can be cut.

    Raises:
        BudgetError: not even the least fits.
    """
    name = str(file.paths[0])
    if room is not None:
        return fit_experts(limit, whole, small, pieces, room, name)
    if stack is not None and rest is not None:
        return fit_rest(limit, whole, small, stack, rest, name)
    if stack is not None:
        return fit_blocks(limit, whole, small, stack, name)
    return fit(limit, whole, small, pieces, name)


def open_files(prepared: Prepared) -> dict[Path, StreamedFile]:
    """The files of a prepared model, whatever may be streamed from them.

    Raises:
        ModelFileError: one cannot be opened, or is not what it was when the model was prepared.
    """
    return open_streamed(prepared.stamps)


def kernel_store(prepared: Prepared) -> Kernels:
    """Where a prepared model's kernels come from.

    That is the pack that was asked for; or the one that the installation brought, if it has all
    that the model needs; or the cache of compiled ones.

    All cores compile what is missing, but only as many processes as have room in what the model may
    have: that happens before anything of it is loaded. One always may, if the system has room.

    Raises:
        BudgetError: kernels have to be compiled, and there is no room for that.
    """
    if prepared.pack is not None:
        return prepared.pack.store(prepared.target)
    needed = plans.kernels_of(prepared.decoder, prepared.placed, prepared.target, prepared.stack)
    if packed := shipped(needed, prepared.target):
        return packed
    n_workers = default_threads()
    if prepared.limit is not None:
        n_workers = min(n_workers, (prepared.limit - PROCESS_BYTES) // COMPILER_BYTES)
    store = KernelStore(prepared.target, max(1, n_workers))
    free = available_bytes()
    if free is not None and free < COMPILER_BYTES and store.missing(needed):
        raise BudgetError(
            f"{prepared.file.paths[0]}: kernels have to be compiled once, by another process of "
            f"{format_size(COMPILER_BYTES)}, and {format_size(free)} are free (free memory and "
            "cgroup limit). Run it once where there is more, with the same HEADRACE_CACHE, or take "
            "kernels along (`headrace targets build`, --kernels)",
            needed_bytes=resident_bytes() + COMPILER_BYTES,
        )
    return store
