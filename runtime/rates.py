"""What this machine can do for a prepared model, measured: memory, products, flash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from headrace import plan as plans
from headrace.kernels import execute
from headrace.machine import best_read_bandwidth, product_rate
from headrace.offload import flash, requests
from headrace.offload.files import StreamedFile, close_all
from headrace.offload.modes import ReadMode, choose
from headrace.planning import Prepared, open_files
from headrace.prediction import Rates
from headrace.sparse import linear
from headrace.sparse.registry import FORMATS
from headrace.streaming import reads_of
from headrace.targets.pack import Kernels
from headrace.team import Team


def measure_rates(prepared: Prepared, store: Kernels) -> Rates:
    """What this machine can do for a prepared model.

    Raises:
        ModelFileError: something is to be streamed, and the files cannot be read.
    """
    team = Team(store.load(execute.kernels().values()), prepared.shape.threads)
    try:
        rates = Rates(
            best_read_bandwidth(store, team), products=measure_products(prepared, store, team)
        )
    finally:
        team.close()
    if prepared.residency is None:
        return rates
    files = open_files(prepared)
    try:
        reader = store.load([requests.kernel()])["window_read"]
        mode, rate = measure_flash(prepared, reader, files)
    finally:
        close_all(files.values())
    return replace(rates, flash=rate, mode=mode)


def measure_products(prepared: Prepared, store: Kernels, team: Team) -> float:
    """Multiply-adds per second in prefill, of the format that most weights have."""
    sizes: dict[str, int] = {}
    for one in prepared.placed:
        sizes[one.format.name] = sizes.get(one.format.name, 0) + one.n_bytes
    fmt = FORMATS[max(sizes, key=lambda name: sizes[name])]
    mode = plans.modes(prepared.target)["prefill"]
    kernel = linear.kernels(fmt)[mode.operation(fmt.activation)]
    return product_rate(store, team, kernel, fmt, mode.group(mode.kind(fmt.activation)))


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
