"""Answer from a header alone: what a model takes in memory, what a token reads, how fast it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from headrace import plan as plans
from headrace.arguments import whole
from headrace.available import available_bytes, cgroup_limits, resident_bytes
from headrace.embedding import embedding_bytes
from headrace.errors import ContextOverflowError, KernelError, NoCompilerError
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.kernels import kv_cache
from headrace.loaders.gguf import ModelFile
from headrace.loaders.tiled import open_model
from headrace.machine import best_read_bandwidth, known_read_bandwidth
from headrace.offload import flash, requests
from headrace.offload.budget import Choice, Limit, fit
from headrace.offload.files import Stamp, StreamedFile, close_all, open_streamed, stamp_of
from headrace.offload.modes import ReadMode, choose
from headrace.offload.pieces import LEAST_SLOTS, Piece, Residency, least_bytes
from headrace.prediction import Rates, prediction
from headrace.sizes import format_size
from headrace.streaming import reads_of
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.pack import Kernels, Pack, shipped
from headrace.targets.target import Target
from headrace.team import Team, default_threads
from headrace.weights import (
    Activations,
    PlacedMatrix,
    Progress,
    padded16,
    pieces_of,
    place,
    streamable,
)

DEFAULT_CONTEXT = 4096
LEAST_CONTEXT = 256  # that is chosen where memory is short
ACTIVATION_BUDGET_BYTES = 48 << 20
MAX_CHUNK, LEAST_CHUNK = 512, 32
KV_SHARE = 8  # where weights stream, the KV cache of a chosen context takes at most this part
ACTIVATION_SHARE = 16  # and activations this
FREE_SHARE = 0.95  # of free memory that a model takes by itself
ENOUGH = Limit()
PROMPT_TOKENS = 128  # whose time to the first token is predicted
# The interpreter with numpy, llvmlite and loaded kernels, and what a token of the vocabulary costs
# (measured on Linux with Python 3.11; docs/performance.md).
PROCESS_BYTES = 100 << 20
VOCABULARY_ENTRY_BYTES = 500
# What each piece of the weights takes in plans, where some of them stream.
PIECE_BYTES = 3000
# What a process that compiles kernels takes.
COMPILER_BYTES = 200 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """What loading and running a model takes; all sizes in bytes.

    Attributes:
        wanted_context: tokens of context, were there memory enough.
        budget, limit: memory that was asked for, and what of it (or at all) there is.
        fits: whether all weights stay in memory.
        weights: matrices as they would lie in memory; `file` is what the model file has.
        resident_weights: what of them stays in memory; the rest is streamed through a `window`.
        expanded: tensors whose type has no kernel: name, type in the file, format, both sizes.
        bytes_per_token: weights that a decode step reads; each token of context adds
            `kv_bytes_per_context_token` to it.
        flash_bytes_per_token: of the file, read for each pass.
        predicted_tok_s: decode speed at an empty context from `memory_read_gb_s` and
            `flash_read_gb_s`, measured on this machine.
        predicted_first_token_s: from a loaded model to the first token of an answer to 128 tokens.
        advice: what would change the speed most.
    """

    model: str
    architecture: str
    target: str
    threads: int
    context: int
    wanted_context: int
    chunk: int
    file: int
    weights: int
    resident_weights: int
    window: int
    vectors: int
    kv_cache: int
    activations: int
    process: int
    peak_bytes: int
    parameters: int
    layers: int
    bytes_per_token: int
    flash_bytes_per_token: int
    kv_bytes_per_context_token: int
    memory_read_gb_s: float | None
    flash_read_gb_s: float | None
    read_mode: str | None
    predicted_tok_s: float | None
    predicted_first_token_s: float | None
    advice: str | None
    budget: int | None
    limit: int | None
    fits: bool
    expanded: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def notices(self) -> list[str]:
        """What a user should know before the wait, where memory is short."""
        found = []
        if self.budget is not None and self.limit is not None and self.limit < self.budget:
            found.append(
                f"only {format_size(self.limit)} of the {format_size(self.budget)} asked for are "
                "free: the model is held to that"
            )
        if self.flash_bytes_per_token:
            rate = self.flash_read_gb_s
            how = "" if rate is None else f" at {rate:.1f} GB/s ({self.read_mode})"
            speed = self.predicted_tok_s
            about = "" if speed is None else f", about {speed:.2g} tok/s"
            missing = self.peak_bytes + self.weights - self.resident_weights - self.window
            found.append(
                f"{format_size(self.flash_bytes_per_token)} of weights are read from the file for "
                f"each token{how}{about}; with {format_size(missing)} of memory none would be"
            )
        if self.context < self.wanted_context:
            found.append(
                f"the context is {self.context} tokens, as memory is short: --context asks for more"
            )
        return found


@dataclass(frozen=True)
class Prepared:
    """A header turned into everything that loading needs."""

    file: ModelFile
    stamps: Mapping[Path, Stamp]  # of its files, before they were read
    decoder: Decoder
    placed: list[PlacedMatrix]
    target: Target
    shape: plans.Shape
    wanted_context: int  # tokens, were there memory enough
    pieces: Sequence[Piece]  # of the weights that can be streamed
    parts: Mapping[str, int]  # bytes of memory by what they are for
    residency: Residency | None = None  # None: all weights stay in memory
    budget: int | None = None  # that was asked for
    limit: int | None = None  # and what there is: less, if that is not free
    pack: Pack | None = None  # the kernel pack that was asked for


def prepare(
    path: Path, *, context: int | None, threads: int | None, target: str | None,
    activations: Activations = "q8", kernels: str | Path | None = None, budget: int | None = None,
) -> Prepared:  # fmt: skip
    """Read a header and decide sizes for this machine; nothing large is read or allocated.

    Args:
        budget: bytes that the process may take; None: what is free.

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
    n_threads = default_threads() if threads is None else whole("threads", threads, low=1)
    most = max(16, 4 * (os.cpu_count() or 1))  # beyond, threads only wait for each other
    if n_threads > most:
        raise ValueError(f"threads must be at most {most} on this machine, not {n_threads}")
    limit = limit_of(budget)
    prepared = prepare_for(chosen, file, context, n_threads, activations, limit)
    return replace(prepared, pack=pack, budget=budget, limit=limit.n_bytes)


def limit_of(budget: int | None) -> Limit:
    """What this process may have in all: a budget, but no more than is free."""
    asked = Limit(budget, f"the budget (`memory`) is {format_size(budget)}" if budget else "")
    available = available_bytes()
    if available is None:
        return asked
    # What the process has already is part of what it may have.
    soft = min(cgroup_limits(), default=available + resident_bytes())
    free = min(available + resident_bytes(), soft)
    if budget is not None and budget <= free:
        return asked
    said = f"this process can have {format_size(free)} (free memory and cgroup limit)"
    if budget is not None:
        return Limit(free, said)
    private = min(available + resident_bytes(private=True), soft)
    return Limit(int(private * FREE_SHARE), said)


def _picked(target: str | None, pack: Pack | None) -> Target:
    if pack is None:
        return pick_target(target)
    try:
        return pick_target(target, pack.levels)
    except KernelError as error:
        raise KernelError(f"the kernel pack {pack.folder}: {error}") from error


def prepare_for(
    target: Target, file: ModelFile, context: int | None, threads: int,
    activations: Activations = "q8", limit: Limit = ENOUGH,
) -> Prepared:  # fmt: skip
    """The same for any machine.

    Raises:
        ModelFileError, UnsupportedError: the file cannot be used.
        ContextOverflowError: the context asked for is longer than the model's.
        BudgetError: the model does not fit.
    """
    decoder = describe(file)
    placed = place(file, decoder, activations)
    if activations == "f32":
        target = replace(target, bf16_dot=False)  # float32 throughout
    if context is not None and whole("context", context, low=1) > decoder.context:
        raise ContextOverflowError(
            f"{file.paths[0]}: a context of {context} tokens is longer than the {decoder.context} "
            f"that the model was trained for; ask for {decoder.context} or fewer"
        )
    sizes = _Sizes(decoder, placed, target, threads)
    pieces = pieces_of(streamed_matrices(decoder, placed))
    found = fit(
        limit,
        sizes.whole(context),
        sizes.streaming(context, limit.n_bytes),
        pieces,
        str(file.paths[0]),
    )
    shape = plans.Shape(found.choice.context, found.choice.chunk, threads)
    stamps = {path: stamp_of(path) for path in file.paths}
    return Prepared(
        file, stamps, decoder, placed, target, shape,
        context or min(decoder.context, DEFAULT_CONTEXT), pieces, found.parts, found.residency,
    )  # fmt: skip


def refit(prepared: Prepared, budget: int | None) -> Prepared:
    """The same model with the same context in another budget.

    Raises:
        BudgetError: it does not fit.
    """
    p = prepared
    sizes = _Sizes(p.decoder, p.placed, p.target, p.shape.threads)
    choice = sizes.choice(p.shape.context, p.shape.chunk)
    limit = limit_of(budget)
    found = fit(limit, [choice], [choice], p.pieces, str(p.file.paths[0]))
    return replace(
        p, parts=found.parts, residency=found.residency, budget=budget, limit=limit.n_bytes
    )


def least(prepared: Prepared) -> Prepared:
    """The same model with the same context in as little memory as it can have."""
    sizes = _Sizes(prepared.decoder, prepared.placed, prepared.target, prepared.shape.threads)
    choice = sizes.choice(prepared.shape.context, prepared.shape.chunk)
    n_bytes = sum(choice.whole.values())
    if len(prepared.pieces) >= LEAST_SLOTS:
        n_bytes = min(n_bytes, sum(choice.streaming.values()) + least_bytes(prepared.pieces))
    found = fit(Limit(n_bytes), [choice], [choice], prepared.pieces, "")
    return replace(prepared, parts=found.parts, residency=found.residency, limit=n_bytes)


def streamed_matrices(decoder: Decoder, placed: list[PlacedMatrix]) -> list[PlacedMatrix]:
    """What may be streamed: not an embedding of its own, whose rows are looked up in the file."""
    tied = decoder.embedding.name == decoder.head.name
    return [p for p in placed if tied or p.matrix.name != decoder.embedding.name]


@dataclass(frozen=True)
class _Sizes:
    """The sizes that a planner may choose for a model."""

    decoder: Decoder
    placed: list[PlacedMatrix]
    target: Target
    threads: int

    def whole(self, context: int | None) -> Iterator[Choice]:
        """With all weights in memory: shorter contexts only where that is what is wanting."""
        wanted = context or min(self.decoder.context, DEFAULT_CONTEXT)
        for tokens in [wanted] if context else _halves(wanted, LEAST_CONTEXT):
            yield self.choice(tokens, self._chunk(tokens, ACTIVATION_BUDGET_BYTES))

    def streaming(self, context: int | None, limit: int | None) -> Iterator[Choice]:
        """With weights streamed: a context that leaves most memory to weights."""
        room = max(0, (limit or 0) - self._process())
        one = plans.kv_bytes(self.decoder, kv_cache.CHUNK)
        wanted = min(self.decoder.context, DEFAULT_CONTEXT)
        if context is None:
            chunks = min(room // KV_SHARE // one, wanted // kv_cache.CHUNK)
            wanted = max(min(LEAST_CONTEXT, wanted), chunks * kv_cache.CHUNK)
        activations = min(ACTIVATION_BUDGET_BYTES, room // ACTIVATION_SHARE)
        tokens = context or wanted
        for n_bytes in (activations, 0):  # the least there is, where more does not fit
            yield self.choice(tokens, self._chunk(tokens, n_bytes))

    def _process(self) -> int:
        return PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * self.decoder.vocabulary

    def _chunk(self, context: int, n_bytes: int) -> int:
        """The longest chunk of prefill whose activations stay within `n_bytes`."""
        chunk = min(MAX_CHUNK, -(-context // 16) * 16)
        while chunk > LEAST_CHUNK:
            shape = plans.Shape(context, chunk, self.threads)
            sizes = plans.buffer_sizes(self.decoder, self.placed, self.target, shape)
            if sum(sizes.values()) <= n_bytes + context * 1024:
                break
            chunk //= 2
        return chunk

    def choice(self, context: int, chunk: int) -> Choice:
        """What these sizes take."""
        d = self.decoder
        shape = plans.Shape(context, chunk, self.threads)
        sizes = plans.buffer_sizes(d, self.placed, self.target, shape)
        vectors = {v.name: v for v in d.vectors()}.values()
        fixed = {
            "vectors": sum(padded16(v.size) * 4 for v in vectors),
            "KV cache": plans.kv_bytes(d, context),
            "activations": sum(sizes.values()) + sum(plans.table_sizes(d, shape).values()),
            "the process": self._process(),
        }
        streamed = streamed_matrices(d, self.placed)
        stay = sum(p.n_bytes for p in streamed if not streamable(p))
        embedding = next(p for p in self.placed if p.matrix.name == d.embedding.name)
        rows = embedding_bytes(embedding, chunk)
        steps = len(pieces_of(streamed)) * PIECE_BYTES
        return Choice(
            context, chunk,
            {"weights": sum(p.n_bytes for p in self.placed), **fixed},
            {"weights": stay, **fixed, "activations": fixed["activations"] + rows + steps},
        )  # fmt: skip


def _halves(n: int, low: int) -> Iterator[int]:
    yield n
    while n // 2 >= low:
        n //= 2
        yield n


def memory_plan(prepared: Prepared, rates: Rates | None = None) -> MemoryPlan:
    """Sizes and a prediction for a prepared model."""
    p, d, parts = prepared, prepared.decoder, prepared.parts
    rates = rates or Rates()
    tied = d.embedding.name == d.head.name
    read = sum(one.n_bytes for one in p.placed if tied or one.matrix.name != d.embedding.name)
    peak = sum(parts.values())
    prompt_tokens = min(PROMPT_TOKENS, p.shape.context)
    speed = prediction(rates, p.residency, read_bytes=read, prompt_tokens=prompt_tokens)
    return MemoryPlan(
        model=str(p.file.paths[0]),
        architecture=d.architecture,
        target=p.target.name,
        threads=p.shape.threads,
        context=p.shape.context,
        wanted_context=p.wanted_context,
        chunk=p.shape.chunk,
        file=p.file.size_bytes,
        weights=sum(one.n_bytes for one in p.placed),
        resident_weights=parts["weights"],
        window=parts.get("window", 0),
        vectors=parts["vectors"],
        kv_cache=parts["KV cache"],
        activations=parts["activations"],
        process=parts["the process"],
        peak_bytes=peak,
        parameters=sum(one.matrix.rows * one.matrix.columns for one in p.placed),
        layers=len(d.layers),
        bytes_per_token=read,
        flash_bytes_per_token=0 if p.residency is None else p.residency.streamed_bytes,
        kv_bytes_per_context_token=plans.kv_bytes(d, 1) // kv_cache.CHUNK,
        memory_read_gb_s=None if rates.memory is None else rates.memory / 1e9,
        flash_read_gb_s=None if rates.flash is None else rates.flash / 1e9,
        read_mode=None if rates.mode is None else str(rates.mode),
        predicted_tok_s=speed.tok_s,
        predicted_first_token_s=speed.first_token_s,
        advice=speed.advice,
        budget=p.budget,
        limit=p.limit,
        fits=p.residency is None,
        expanded=tuple(
            {
                "tensor": one.matrix.name,
                "type": one.info.type,
                "loads_as": one.format.name,
                "file_bytes": one.info.n_bytes,
                "bytes": one.n_bytes,
            }
            for one in p.placed
            if one.expanded
        ),
    )


def kernel_store(prepared: Prepared) -> Kernels:
    """Where a prepared model's kernels come from.

    That is the pack that was asked for; or the one that the installation brought, if it has all
    that the model needs; or the cache of compiled ones.

    All cores compile what is missing. With a budget, only as many processes as have room in the
    plan's peak: that happens before anything of the model is loaded.
    """
    if prepared.pack is not None:
        return prepared.pack.store(prepared.target)
    needed = plans.kernels_of(prepared.decoder, prepared.placed, prepared.target)
    if packed := shipped(needed, prepared.target):
        return packed
    n_workers = default_threads()
    if prepared.budget is not None:
        n_workers = min(n_workers, (prepared.budget - PROCESS_BYTES) // COMPILER_BYTES)
    return KernelStore(prepared.target, max(1, n_workers))


def plan_model(
    path: str | Path,
    *,
    memory: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    target: str | None = None,
    kernels: str | Path | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> MemoryPlan:
    """Plan a model from its header; with `measure`, predict its speed on this machine.

    Without a compiler and without kernels that were built ahead there is no prediction.

    Raises:
        what `prepare` raises.
    """
    prepared = prepare(
        Path(path), context=context, threads=threads, target=target, kernels=kernels, budget=memory
    )
    rates = Rates()
    if measure:
        # Without kernels to measure with, the rest of the plan is as good.
        with contextlib.suppress(NoCompilerError):
            rates = measure_rates(prepared, kernel_store(prepared), progress=progress)
    return memory_plan(prepared, rates)


def measure_rates(
    prepared: Prepared, store: Kernels, *, prompt_tokens: int = PROMPT_TOKENS,
    probe: bool = True, progress: Progress | None = None,
) -> Rates:  # fmt: skip
    """What this machine can do for a prepared model that is not loaded yet.

    Args:
        store: kernels; what is not there is compiled first.
        prompt_tokens: of a prompt that is read.
        probe: measure memory's bandwidth too; else it is what was measured before.

    Raises:
        ModelFileError: something is to be streamed, and the files cannot be read.
    """
    from headrace.sample import take_sample

    p = prepared
    addresses = store.load(plans.kernels_of(p.decoder, p.placed, p.target), progress)
    team = Team(addresses, p.shape.threads)
    try:
        memory = (
            best_read_bandwidth(store, team)
            if probe
            else known_read_bandwidth(p.target.name, p.shape.threads)
        )
        room = None
        if p.limit is not None:
            taken = (n for name, n in p.parts.items() if name not in ("weights", "window"))
            room = p.limit - sum(taken)
        sample = take_sample(
            p.file, p.decoder, p.placed, p.target, addresses, team,
            min(prompt_tokens, p.shape.chunk), room,
        )  # fmt: skip
    finally:
        team.close()
    if p.residency is None:
        return Rates(memory, sample=sample)
    files = open_files(p)
    try:
        reader = store.load([requests.kernel()])["window_read"]
        mode, flash_rate = measure_flash(p, reader, files)
    finally:
        close_all(files.values())
    return Rates(memory, flash_rate, mode, sample)


def open_files(prepared: Prepared) -> dict[Path, StreamedFile]:
    """The files of a prepared model, whatever may be streamed from them.

    Raises:
        ModelFileError: one cannot be opened, or is not what it was when the model was prepared.
    """
    return open_streamed(prepared.stamps)


def measure_flash(
    prepared: Prepared, reader: int, files: Mapping[Path, StreamedFile]
) -> tuple[ReadMode, float]:
    """The fastest way to read what a prepared model streams, and its bytes per second.

    Args:
        prepared: a model of which something is streamed.
        reader: address of the kernel that reads.
        files: its files, open.

    Raises:
        ModelFileError: its files cannot be read.
    """
    residency = prepared.residency
    if residency is None:
        raise ValueError("nothing is streamed")
    reads = reads_of({p.matrix.name: p for p in prepared.placed}, residency.streamed)
    rates = flash.measure(files, reads, residency.slot_bytes, reader)
    mode = choose(rates)
    return mode, rates[mode]
