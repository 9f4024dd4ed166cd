"""The order of a stack's blocks by perplexity, as BitStack's paper has it.

For each level after the first, with so many blocks of every matrix, one matrix after the other gets
one block more, and the perplexity of a text is taken. Within the level, those blocks come first
with which it is lowest. So there is a forward pass over the text for each block but the first ones:
here over 2 windows of 512 tokens of it (the paper: 32 of 2048).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from headrace.families import describe
from headrace.loaders.model_file import ModelFile
from headrace.loaders.progress import Progress
from headrace.loaders.tiled import open_model
from headrace.model import Model, load
from headrace.partial_file import PartialFile
from headrace.perplexity import log_probabilities, losses_of
from headrace.planning import bounds_of
from headrace.tokenizer import Tokenizer
from headrace.windows import Windows, check_length, cut_text

WINDOW, WINDOWS = 512, 2
CHARACTERS = 16  # more than a token has on average
TRIED = 3  # blocks after which it is said how long all will take


def check_text(model: ModelFile, text: str) -> None:
    """Make sure before a model is decomposed that `measure_blocks` can use a text.

    Raises:
        HeadraceError: it is shorter than one window, or the file has no usable tokenizer.
    """
    window = min(WINDOW, describe(model).context)
    tokenizer = Tokenizer.from_metadata(model.metadata, model.paths[0])
    part = text[: window * WINDOWS * CHARACTERS]
    check_length(tokenizer, part, window, "--calibrate, which --sort perplexity reads,")


def least_bytes(stack: ModelFile, threads: int | None) -> int:
    """What a process needs in which `measure_blocks` runs, by the header of a stack."""
    window = min(WINDOW, describe(stack).context)
    return bounds_of(stack, context=window, logits_rows=window, threads=threads)[0]


def measure_blocks(
    path: Path, losses: PartialFile, text: str, *, threads: int | None, memory: int | None,
    progress: Progress | None, notice: Callable[[str], None],
) -> None:  # fmt: skip
    """What the model loses with each block.

    Levels for which there is no memory are not measured.

    Args:
        path: a stack.
        losses: gets the mean loss with each block, in nats: float64 [levels - 1, matrices], NaN
            where it was not measured, infinity where there is none. It is gone on with.
        text: to measure on; its beginning is used.
        threads, memory: as `headrace.load` has them.
        progress: called with (blocks done, in all, what).
        notice: called with how long it will take.

    Raises:
        HeadraceError: the text is shorter than a window, or the model cannot be loaded.
        OSError: the disk cannot take the losses.
    """
    window = min(WINDOW, describe(open_model(path)).context)
    with load(path, context=window, logits_rows=window, threads=threads, memory=memory) as model:
        stack = model.prepared.stack
        if stack is None:
            raise AssertionError("no stack")
        names = [one.matrix.name for one in stack.blocks[: stack.least]]
        levels = len(stack) // stack.least
        measured = min(levels, model.prepared.blocks // stack.least)
        if measured < levels:
            notice(
                f"memory has room for {measured} of {levels} levels: blocks of those above are "
                "ordered by error"
            )
        part = text[: window * WINDOWS * CHARACTERS]
        windows = cut_text(model.tokenizer, part, window, WINDOWS)
        jobs = [(level, name) for level in range(1, measured) for name in names]
        began, first = time.monotonic(), losses.done
        for i, (level, name) in islice(enumerate(jobs), first, None):
            model.compute_with({**dict.fromkeys(names, level), name: level + 1})
            losses.write(8 * i, np.array([_loss(model, windows)]).view(np.uint8))
            losses.finish(i + 1)
            if i + 1 == first + TRIED:
                left = (time.monotonic() - began) / TRIED * (len(jobs) - i - 1)
                notice(f"trying {len(jobs) - i - 1:,} blocks takes about {left / 60:.0f} minutes")
            if progress is not None:
                progress(i + 1, len(jobs), "trying blocks")
        rest = np.full(len(names) * (levels - measured), np.nan)
        losses.write(8 * len(jobs), rest.view(np.uint8))
        losses.finish(len(names) * (levels - 1))


def _loss(model: Model, windows: Windows) -> float:
    """The mean over all tokens that have one before them."""
    found = []
    for ids, _ in windows:
        targets = np.array(ids[1:])
        for some, (log_p,) in log_probabilities((model,), ids, 0):
            found.append(losses_of(log_p, targets[some]))
    mean = float(np.concatenate(found).mean())
    return mean if np.isfinite(mean) else float("inf")
