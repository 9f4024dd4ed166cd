"""Answer from a header alone: what a model takes in memory, what a token reads, how fast it is."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from headrace import plan as plans
from headrace.arguments import whole
from headrace.available import available_bytes, resident_bytes
from headrace.errors import BudgetError, ContextOverflowError, KernelError, NoCompilerError
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.kernels import kv_cache
from headrace.loaders.gguf import ModelFile
from headrace.loaders.tiled import open_model
from headrace.sizes import format_size
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.pack import Kernels, Pack, shipped
from headrace.targets.target import Target
from headrace.team import default_threads
from headrace.weights import Activations, PlacedMatrix, padded16, place

DEFAULT_CONTEXT = 4096
ACTIVATION_BUDGET_BYTES = 48 << 20
MAX_CHUNK = 512
# The interpreter with numpy, llvmlite and loaded kernels, and what a token of the vocabulary costs
# (measured on Linux with Python 3.11; docs/performance.md).
PROCESS_BYTES = 100 << 20
VOCABULARY_ENTRY_BYTES = 500
# What a process that compiles kernels takes.
COMPILER_BYTES = 200 << 20
# What kernels reach of the read bandwidth, and a barrier's cost with the work around it.
DECODE_SHARE = 0.90
BARRIER_S = 1.5e-6


@dataclass(frozen=True)
class MemoryPlan:
    """What loading and running a model takes; all sizes in bytes.

    Attributes:
        weights: matrices as they lie in memory; `file` is what the model file has.
        expanded: tensors whose type has no kernel: name, type in the file, format, both sizes.
        bytes_per_token: weights that a decode step reads; each token of context adds
            `kv_bytes_per_context_token` to it.
        predicted_tok_s: decode speed at an empty context from `memory_read_gb_s`, measured on this
            machine.
    """

    model: str
    architecture: str
    target: str
    threads: int
    context: int
    chunk: int
    file: int
    weights: int
    vectors: int
    kv_cache: int
    activations: int
    process: int
    peak_bytes: int
    parameters: int
    layers: int
    bytes_per_token: int
    kv_bytes_per_context_token: int
    memory_read_gb_s: float | None
    predicted_tok_s: float | None
    budget: int | None
    fits: bool
    expanded: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """A header turned into everything that loading needs."""

    file: ModelFile
    decoder: Decoder
    placed: list[PlacedMatrix]
    target: Target
    shape: plans.Shape
    pack: Pack | None = None  # the kernel pack that was asked for


def prepare(
    path: Path, *, context: int | None, threads: int | None, target: str | None,
    activations: Activations = "q8", kernels: str | Path | None = None,
) -> Prepared:  # fmt: skip
    """Read a header and decide sizes for this machine; nothing large is read or allocated.

    Raises:
        ModelFileError, UnsupportedError: the file cannot be used.
        ContextOverflowError: the context asked for is longer than the model's.
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
    return replace(prepare_for(chosen, file, context, n_threads, activations), pack=pack)


def _picked(target: str | None, pack: Pack | None) -> Target:
    if pack is None:
        return pick_target(target)
    try:
        return pick_target(target, pack.levels)
    except KernelError as error:
        raise KernelError(f"the kernel pack {pack.folder}: {error}") from error


def prepare_for(
    target: Target, file: ModelFile, context: int | None, threads: int,
    activations: Activations = "q8",
) -> Prepared:  # fmt: skip
    """The same for any machine.

    Raises:
        ModelFileError, UnsupportedError: the file cannot be used.
        ContextOverflowError: the context asked for is longer than the model's.
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
    wanted = min(decoder.context, DEFAULT_CONTEXT) if context is None else context
    chunk = _chunk(decoder, placed, target, wanted, threads)
    return Prepared(file, decoder, placed, target, plans.Shape(wanted, chunk, threads))


def _chunk(
    decoder: Decoder, placed: list[PlacedMatrix], target: Target, context: int, threads: int
) -> int:
    """The longest chunk of prefill whose activations stay within their budget."""
    chunk = min(MAX_CHUNK, -(-context // 16) * 16)
    while chunk > 32:
        shape = plans.Shape(context, chunk, threads)
        if sum(plans.buffer_sizes(decoder, placed, target, shape).values()) <= (
            ACTIVATION_BUDGET_BYTES + context * 1024
        ):
            break
        chunk //= 2
    return chunk


def memory_plan(
    prepared: Prepared, *, budget: int | None = None, bandwidth: float | None = None
) -> MemoryPlan:
    """Sizes and a prediction for a prepared model; `bandwidth` in bytes per second."""
    p, d = prepared, prepared.decoder
    sizes = plans.buffer_sizes(d, p.placed, p.target, p.shape)
    weights = sum(one.n_bytes for one in p.placed)
    vectors = sum(padded16(v.size) * 4 for v in {v.name: v for v in d.vectors()}.values())
    kv = plans.kv_bytes(d, p.shape.context)
    activations = sum(sizes.values()) + sum(plans.table_sizes(d, p.shape).values())
    process = PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * d.vocabulary
    peak = weights + vectors + kv + activations + process
    tied = d.embedding.name == d.head.name
    read = sum(one.n_bytes for one in p.placed if tied or one.matrix.name != d.embedding.name)
    kv_token = plans.kv_bytes(d, 1) // kv_cache.CHUNK
    predicted = None if bandwidth is None else predict_tok_s(read, len(d.layers), bandwidth)
    return MemoryPlan(
        model=str(p.file.paths[0]),
        architecture=d.architecture,
        target=p.target.name,
        threads=p.shape.threads,
        context=p.shape.context,
        chunk=p.shape.chunk,
        file=p.file.size_bytes,
        weights=weights,
        vectors=vectors,
        kv_cache=kv,
        activations=activations,
        process=process,
        peak_bytes=peak,
        parameters=sum(one.matrix.rows * one.matrix.columns for one in p.placed),
        layers=len(d.layers),
        bytes_per_token=read,
        kv_bytes_per_context_token=kv_token,
        memory_read_gb_s=None if bandwidth is None else bandwidth / 1e9,
        predicted_tok_s=predicted,
        budget=budget,
        fits=budget is None or peak <= budget,
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


def kernel_store(prepared: Prepared, plan: MemoryPlan | None = None) -> Kernels:
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
    if plan is not None and plan.budget is not None:
        n_workers = min(n_workers, (plan.peak_bytes - PROCESS_BYTES) // COMPILER_BYTES)
    return KernelStore(prepared.target, max(1, n_workers))


def predict_tok_s(bytes_per_token: int, layers: int, bandwidth: float) -> float:
    """Decode speed at an empty context: bytes at the memory's rate, and five barriers a layer."""
    barriers = 5 * layers + 2
    return 1 / (bytes_per_token / (bandwidth * DECODE_SHARE) + barriers * BARRIER_S)


def check_budget(plan: MemoryPlan) -> None:
    """Refuse a budget that the plan does not fit in.

    Raises:
        BudgetError: names what is needed, and for what.
    """
    if plan.budget is not None and not plan.fits:
        raise _too_small(
            plan, f"the budget (`memory`) is {format_size(plan.budget)}. Allow more, or ask"
        )


def check_available(plan: MemoryPlan) -> None:
    """Refuse a model that the machine has no room for: a process that is killed says nothing.

    Raises:
        BudgetError: names what is needed, and for what.
    """
    available = available_bytes()
    if available is not None:
        available += resident_bytes()  # the plan's peak counts the process whole
    if available is not None and plan.peak_bytes > available:
        raise _too_small(
            plan,
            f"this process can have {format_size(available)} (free memory and cgroup limit). End "
            "other programs, take a smaller model, or ask",
        )


def _too_small(plan: MemoryPlan, limit: str) -> BudgetError:
    return BudgetError(
        f"{plan.model} needs {format_size(plan.peak_bytes)} of memory: weights "
        f"{format_size(plan.weights)}, KV cache {format_size(plan.kv_cache)} for {plan.context} "
        f"tokens of context, activations {format_size(plan.activations)}, the process "
        f"{format_size(plan.process)}; {limit} for a shorter context",
        needed_bytes=plan.peak_bytes,
    )


def plan_model(
    path: str | Path,
    *,
    memory: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    target: str | None = None,
    kernels: str | Path | None = None,
    measure: bool = True,
) -> MemoryPlan:
    """Plan a model from its header; with `measure`, predict its speed on this machine.

    Without a compiler and without kernels that were built ahead there is no prediction.

    Raises:
        what `prepare` raises. A budget that is too small is no error here: see `fits`.
    """
    prepared = prepare(Path(path), context=context, threads=threads, target=target, kernels=kernels)
    bandwidth = None
    if measure:
        from headrace.machine import best_read_bandwidth

        # Without kernels to measure with, the rest of the plan is as good.
        with contextlib.suppress(NoCompilerError):
            bandwidth = best_read_bandwidth(kernel_store(prepared), prepared.shape.threads)
    return memory_plan(prepared, budget=memory, bandwidth=bandwidth)
