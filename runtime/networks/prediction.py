"""How long a run of a plan takes whose weights are read meanwhile, before any of them is there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

from headrace.loaders.onnx_model import OnnxModel
from headrace.machine import known_read_bandwidth
from headrace.memory import Arena
from headrace.networks.engine import Engine
from headrace.networks.native import NativeRegion
from headrace.networks.needs import NetworkMemory
from headrace.networks.network_plan import NetworkPlan
from headrace.networks.operation import Operation, Weight
from headrace.networks.streaming import TilesAt, packed_of, reads_of
from headrace.offload import flash, requests
from headrace.offload.files import close_all, open_streamed, stamp_of
from headrace.offload.modes import FlashRate, ReadMode, Work, choose
from headrace.offload.window import Read, Window
from headrace.team import default_threads

_RUNS = 3  # of kernels, the fastest of which counts


@dataclass(frozen=True)
class Prediction:
    """What a run takes.

    Attributes:
        compute_s: kernels of ours, with weights that are there.
        flash: bytes per second, and how they are read; None: no weights are read.
        seconds: the run; without what onnxruntime computes.
    """

    compute_s: float
    flash: float | None
    mode: ReadMode | None
    seconds: float


def predict(
    plan: NetworkPlan, memory: NetworkMemory, engine: Engine, model: OnnxModel
) -> Prediction:
    """The time of a run: of computing as of zeros, and of reading as the disk is now.

    Raises:
        KernelError: a kernel cannot be had.
        ModelFileError: the file cannot be read.
    """
    compute_s = sum(_compute_s(run, plan) for run in plan.natives)
    bandwidth = known_read_bandwidth(engine.target.name, engine.threads)
    if bandwidth is not None:
        compute_s = max(compute_s, memory.parts["weights"] / bandwidth)
    if memory.residency is None:
        return Prediction(compute_s, None, None, compute_s)
    work = Work(memory.streamed_bytes, compute_s, engine.threads, default_threads())
    rates = _rates(plan, memory, engine, model)
    mode = choose(rates, work)
    return Prediction(compute_s, rates[mode].bytes_s, mode, work.seconds(rates[mode]))


def _compute_s(run: NativeRegion, plan: NetworkPlan) -> float:
    """Of a region with zeros for inputs and weights, which take no memory."""
    held = {}
    for name in run.inputs:
        of = plan.graph.types[name]
        held[name] = np.zeros(of.shape or (), tensor_dtype_to_np_dtype(of.elem_type))
    run.link(_Zeros(run), again=True)
    try:
        best = float("inf")
        for _ in range(_RUNS):
            began = time.perf_counter()
            run.run(held)
            best = min(best, time.perf_counter() - began)
    finally:
        run.release()
    return best


class _Zeros:
    """Weights that are all zero: one piece of memory that is never written, and so not there."""

    window: Window | None = None
    address = 0

    def __init__(self, run: NativeRegion) -> None:
        sizes = (
            weight.n_bytes
            for one in run.operations
            for weight in one.weights.values()
            if isinstance(weight, Weight)
        )
        self._arena = Arena({"zeros": max(sizes, default=0) + 4096})

    def parts(self, operation: Operation, name: str) -> list[TilesAt] | None:
        """One part, if it is no weight that is there anyway."""
        if name != next(iter(_weights(operation)), None):
            return None
        tiles = 0 if operation.cut is None else operation.cut.tiles
        return [TilesAt(0, tiles, self._arena.base, None)]

    def rows(self, operation: Operation) -> dict[str, int] | None:
        """Of all other weights."""
        return dict.fromkeys(_weights(operation)[1:], self._arena.base)

    def fetch(self, operation: Operation, values: Mapping[str, np.ndarray]) -> None:
        """Nothing."""


def _weights(operation: Operation) -> list[str]:
    return [name for name, weight in operation.weights.items() if isinstance(weight, Weight)]


def _rates(
    plan: NetworkPlan, memory: NetworkMemory, engine: Engine, model: OnnxModel
) -> dict[ReadMode, FlashRate]:
    residency = memory.residency
    assert residency is not None
    packed = packed_of(plan.needs, model, engine.target.name)
    assert packed is not None
    streamed = residency.streamed
    if packed.is_there:
        reads = reads_of(list(plan.needs.streamable), streamed, packed.places)
    else:  # as many bytes of the model, which lies on a disk as well
        largest = max((info for info, _ in model.weights.values()), key=lambda info: info.n_bytes)
        size = stamp_of(largest.path)[0]
        reads, at = [], 0
        for piece in streamed:
            n_bytes = min(piece.read_bytes, size)
            at = at if at + n_bytes <= size else 0
            reads.append(Read(largest.path, largest.name, at, n_bytes))
            at += n_bytes
    files = open_streamed({path: stamp_of(path) for path in {read.path for read in reads}})
    try:
        reader = engine.addresses_of([requests.kernel()])["window_read"]
        return flash.measure(files, reads, residency.slot_bytes, reader)
    finally:
        close_all(files.values())
