"""What this machine can do for a prepared model, measured: memory, passes, flash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from headrace import plan as plans
from headrace.expert_memory import sample_reads
from headrace.loaders.progress import Progress
from headrace.machine import best_read_bandwidth, known_read_bandwidth
from headrace.offload import flash, requests
from headrace.offload.files import StreamedFile, close_all
from headrace.offload.modes import FlashRate, ReadMode
from headrace.planning import Prepared, open_files
from headrace.prediction import Rates
from headrace.streaming import reads_of
from headrace.targets.pack import Kernels
from headrace.team import Team, default_threads

PROMPT_TOKENS = 128  # whose time to the first token is predicted


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
    from headrace.sample import take_sample  # most models are loaded without

    p = prepared
    needed = plans.kernels_of(p.decoder, p.placed, p.target, p.stack)
    addresses = store.load(needed, progress)
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
            min(prompt_tokens, p.shape.chunk), room, p.stack, p.used_blocks,
        )  # fmt: skip
    finally:
        team.close()
    if p.residency is None and not p.slots:
        return Rates(memory, sample=sample, cores=default_threads())
    files = open_files(p)
    try:
        reader = store.load([requests.kernel()])["window_read"]
        found = measure_flash(p, reader, files)
    finally:
        close_all(files.values())
    return Rates(memory, found, sample, default_threads())


def measure_flash(
    prepared: Prepared, reader: int, files: Mapping[Path, StreamedFile]
) -> dict[ReadMode, FlashRate]:
    """The ways to read what a prepared model streams, and how fast they are.

    Args:
        prepared: a model of which something is streamed.
        reader: address of the kernel that reads.
        files: its files, open.

    Raises:
        ModelFileError: its files cannot be read.
    """
    residency = prepared.residency
    if residency is not None:
        reads = reads_of(prepared.infos, residency.streamed)
        return flash.measure(files, reads, residency.slot_bytes, reader)
    if not prepared.slots:
        raise ValueError("nothing is streamed")
    reads, slot_bytes = sample_reads(prepared.placed)
    return flash.measure(files, reads, slot_bytes, reader)
