"""Compress a model into a stack of blocks: see `headrace.write_stack`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from headrace.compress_job import COMPARING, Compressed, Job
from headrace.decompose_stack import Blocks
from headrace.least_memory import Need
from headrace.loaders.gguf import ModelFile
from headrace.price import least_bytes_of_stack
from headrace.stack_order import check_text as check_sort_text
from headrace.stack_order import least_bytes as least_to_sort
from headrace.stack_order import measure_blocks
from headrace.write_stack import write_stack


def compress_stack(job: Job) -> Compressed:
    """Raises what `headrace.compress.compress` raises."""
    o = job.options
    measured = o.calibrate if o.sort == "perplexity" else None
    if measured is not None:
        check_sort_text(job.model, measured)
    with ExitStack() as stack:
        inputs = job.inputs()
        if inputs is not None:
            stack.enter_context(inputs)

        def ready(blocks: Blocks, planned: ModelFile, levels: Sequence[int]) -> None:
            needs = list[Need]()
            if o.evaluate is not None:
                both = least_bytes_of_stack(job.path, planned, levels, job.threads)
                needs = [(COMPARING, both - job.process)]
            if measured is not None:
                alone = least_to_sort(planned, job.threads)
                needs.append(("trying blocks (--sort perplexity)", alone - job.process))
            needs += blocks.needs(None if inputs is None else inputs.held)
            needs += [] if inputs is None else inputs.needs()
            job.check_memory(needs)

        def price(written: Path, levels: Sequence[int]) -> dict[str, Any]:
            return job.measure(written, tuple(levels))

        try_blocks = None
        if measured is not None:
            try_blocks = partial(
                measure_blocks, text=measured, threads=job.threads, memory=job.memory,
                progress=job.progress, notice=job.say,
            )  # fmt: skip
        found = write_stack(
            job.path, job.target, rank=o.rank, inputs=None if inputs is None else inputs.of,
            n_threads=o.threads, room=job.room, ready=ready, key=o.key(job.model),
            measure=try_blocks, price=None if o.evaluate is None else price,
            progress=job.progress, check=job.check_target, notice=job.say,
        )  # fmt: skip
    return Compressed(job.target, job.model.size_bytes, job.target.stat().st_size, price=found)
