"""Write a model whose layers are stacks of blocks: see `headrace.stack`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from headrace.decompose_stack import Blocks, InputsOf, MadeBlock
from headrace.entries import entry_of, others
from headrace.errors import HeadraceError, UnsupportedError
from headrace.families import describe
from headrace.families.decoder import Decoder, Matrix
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.progress import Progress
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import (
    ALIGNMENT,
    Entry,
    build_header,
    layout_key,
    open_model,
    tiled_type,
)
from headrace.partial_file import PartialFile, check_disk, drop
from headrace.placing import PlacedMatrix, dense, place
from headrace.price import price_keys
from headrace.recipe import ENDS, ENOUGH_BITS
from headrace.rows import read_as_it_is
from headrace.sparse.bitstack import LEVELS, RANKS, BlockShape, rank_for
from headrace.sparse.registry import FORMATS
from headrace.stack import block_format, block_name, refuse_stack

STACK = "bitstack"  # what it is called among the formats that a file may get
PRICED_LEVELS = 1, 2, 3, 4, 6, 8, 12  # whose price stands in the file, beside that of all

_Source: TypeAlias = PlacedMatrix | TensorInfo | MadeBlock


def write_stack(
    src: str | Path,
    dst: str | Path,
    *,
    rank: int | None = None,
    levels: int = LEVELS,
    inputs: InputsOf | None = None,
    n_threads: int = 1,
    room: int | None = None,
    key: str = "",
    measure: Callable[[Path, PartialFile], None] | None = None,
    price: Callable[[Path, Sequence[int]], dict[str, Any]] | None = None,
    ready: Callable[[Blocks, ModelFile, Sequence[int]], object] = lambda blocks, file, levels: None,
    check: Callable[[], object] = lambda: None,
    progress: Progress | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Write the matrices of a model's layers as stacks; embedding, head and vectors stay whole.

    Each thread has one matrix in memory; blocks wait on the disk until their order is known. The
    first blocks of all matrices come first, in the order of a pass. Within each level after that
    come those first that take most from the error of their matrix's output: of its square on the
    inputs' text, as a part of that of the output; or those with which the model is best, if that is
    measured. What is done when something goes wrong stays in hidden files beside `dst`, and a call
    with the same `key` goes on there.

    Args:
        src: whatever `headrace.load` takes.
        dst: the file to write; one of that name is replaced.
        rank: vectors of a block; default: what suits the model's width.
        levels: blocks of a matrix.
        inputs: what the inputs of a matrix were like on some text, by its name; called in the
            order of a pass. Without it all inputs count the same.
        n_threads: that decompose, a matrix each.
        room: bytes that this may take; None: no limit.
        key: all that decides the blocks, but for rank and levels.
        measure: called with a complete file and one for what it finds, as
            `headrace.stack_order.measure_blocks` has it.
        price: called with the complete file and numbers of levels; what it gives stands in the
            file, see `headrace.price`.
        ready: called before the work with what is to be made, the file that will come of it, and
            the numbers of levels that get a price; there is no work if it raises something.
        check: called before the file gets its name; it does not if this raises something.
        progress: called with (done, total, what).
        notice: called with a line that the user should know before the wait.

    Returns:
        what `price` gave.

    Raises:
        UnsupportedError: the model cannot run, is a stack itself, or has weights beyond float16.
        ModelNotFoundError, DownloadError, ModelFileError: no usable source, or weights that are no
            finite numbers.
        BudgetError: the work on one matrix does not fit in `room`.
        HeadraceError: `dst` cannot be written.
        ValueError: `rank` or `levels` is none that there is.
    """
    if levels < 1 or levels > LEVELS:
        raise ValueError(f"levels must lie in 1..{LEVELS}, not {levels}")
    if rank is not None and rank not in RANKS:
        raise ValueError(f"rank must be one of {', '.join(map(str, RANKS))}, not {rank}")
    target = Path(os.path.expanduser(dst))
    model = open_model(resolve(src, progress=progress))
    decoder = describe(model)
    refuse_stack(model, decoder)
    if decoder.in_parts():
        raise UnsupportedError(
            "a mixture of experts, or clusters of neurons, cannot be a stack of blocks; use "
            "another --format",
            path=model.paths[0],
        )
    placed = [dense(p) for p in place(model, decoder, "q8")]
    stacked = tuple(p for p in placed if _stackable(p.matrix, decoder))
    blocks = Blocks(stacked, rank or rank_for(decoder.width), levels)
    key = f"{key} {blocks.rank} {levels}"
    priced = [level for level in PRICED_LEVELS if level < levels] if price is not None else []
    reserved = {} if price is None else price_keys(None, priced)
    found = None

    def layout(order: list[MadeBlock]) -> tuple[_Layout, bytes]:
        entries, sources = _entries(model, decoder, placed, order, blocks.rank)
        header, places, size = build_header(model, entries, reserved)
        laid = f"{key} {layout_key(model, entries, size)}"
        return _Layout(entries, sources, places, laid, size), header

    # The order of the blocks is not known yet, but changes no size.
    entries, _ = _entries(model, decoder, placed, blocks.in_order(None), blocks.rank)
    ready(blocks, _planned(model, entries), priced)
    waiting, tried, trial = beside(target)
    count = (levels - 1) * len(stacked)
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(TensorReader())
            spill = stack.enter_context(PartialFile(waiting, key, blocks.offsets[-1]))
            spill.tell(notice, len(stacked), "matrices")
            kept = None
            if measure is None:
                for path in (tried, trial):
                    drop(path, notice)
            elif count:
                kept = stack.enter_context(PartialFile(tried, f"{key} measured", 8 * count))
                kept.tell(notice, count, "blocks that were tried")
            size = layout(blocks.in_order(None))[0].size
            # A trial is gone when the file itself is begun.
            first = trial if kept is not None and kept.done < count else target
            sizes = {first: size, waiting: blocks.offsets[-1]}
            check_disk(target, sizes, " until the order of its blocks is known")
            try:
                blocks.make(reader, spill, inputs, n_threads, room, progress)
                losses = None
                if measure is not None and kept is not None:
                    if kept.done < count:  # in a file in the order that needs no measuring
                        made, header = layout(blocks.in_order(spill))
                        with PartialFile(trial, made.key, made.size) as file:
                            made.write(file, header, reader, spill, progress)
                            measure(file.path, kept)
                    found_losses = np.frombuffer(kept.read(0, 8 * count))
                    losses = found_losses.reshape(levels - 1, len(stacked))
                made, header = layout(blocks.in_order(spill, losses))
                with PartialFile(target, made.key, made.size) as file:
                    file.tell(notice, len(made.entries), "tensors")
                    made.write(file, header, reader, spill, progress)
                    if price is not None:
                        found = price(file.path, priced)
                        tag = price_keys(found, priced)
                        header, _, whole_size = build_header(model, made.entries, tag)
                        if whole_size != made.size:
                            raise AssertionError("the price tag has another size than announced")
                        file.write(0, header)
                    file.publish(check)
            except OSError as error:  # as a HeadraceError, so that the parts stay
                raise HeadraceError(
                    f"cannot write {target}: {error.strerror or error}; what is decomposed "
                    "stays in a hidden file beside it, and the same command goes on there"
                ) from error
    except OSError as error:
        raise HeadraceError(f"cannot write {target}: {error.strerror or error}") from error
    return found


def beside(target: Path) -> tuple[Path, Path, Path]:
    """Files whose parts lie beside that of a stack: its blocks, what was tried, and a trial."""
    blocks, losses, trial = (
        target.with_name(f"{target.name}.{what}") for what in ("blocks", "losses", "trial")
    )
    return blocks, losses, trial


@dataclass(frozen=True)
class _Layout:
    """The tensors of a file, what they are made of, and where they are.

    Attributes:
        key: what decides the bytes, but for the price.
        size: bytes of the file.
    """

    entries: list[Entry]
    sources: list[_Source]
    places: list[int]
    key: str
    size: int

    def write(
        self, file: PartialFile, header: bytes, reader: TensorReader, spill: PartialFile,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        """Write what the file has not got yet, with the blocks that `spill` has."""
        file.write(0, header)
        total = self.places[-1] + self.entries[-1].n_bytes
        for i in range(file.done, len(self.entries)):
            at = self.places[i]
            for data in _bytes_of(self.sources[i], reader, spill):
                file.write(at, data)
                at += data.nbytes
            if at - self.places[i] != self.entries[i].n_bytes:
                raise AssertionError(f"{self.entries[i].name} takes other bytes than announced")
            file.finish(i + 1)
            if progress is not None:
                progress(at, total, "writing")
        file.complete()


def _planned(model: ModelFile, entries: Sequence[Entry]) -> ModelFile:
    """The file that is to be written, as if its first tensor began the source's file."""
    tensors, at = {}, 0
    for e in entries:
        tensors[e.name] = TensorInfo(e.name, e.type, e.shape, model.paths[0], at, e.n_bytes)
        at += -(-e.n_bytes // ALIGNMENT) * ALIGNMENT
    return replace(model, tensors=tensors)


def _stackable(matrix: Matrix, decoder: Decoder) -> bool:
    """Whether a matrix becomes a stack: those of layers, whose inputs are a multiple of 32."""
    return matrix.name not in _ends(decoder) and matrix.columns % 32 == 0


def _ends(decoder: Decoder) -> tuple[str, str]:
    return decoder.embedding.name, decoder.head.name


def _smaller(placed: PlacedMatrix) -> PlacedMatrix:
    """An embedding or a head as other compressed files have it."""
    fmt = FORMATS[ENDS]
    if placed.format.bits_per_weight <= ENOUGH_BITS or placed.matrix.columns % fmt.block:
        return placed
    return replace(placed, format=fmt)


def _entries(
    model: ModelFile,
    decoder: Decoder,
    placed: list[PlacedMatrix],
    blocks: list[MadeBlock],
    rank: int,
) -> tuple[list[Entry], list[_Source]]:
    vectors, rest = others(model, decoder, placed)
    whole = [
        _smaller(p) if p.matrix.name in _ends(decoder) else p
        for p in placed
        if not _stackable(p.matrix, decoder)
    ]
    sources: list[_Source] = [*vectors, *whole, *rest, *blocks]
    return [_entry(source, rank) for source in sources], sources


def _entry(source: _Source, rank: int) -> Entry:
    if not isinstance(source, MadeBlock):
        return entry_of(source)
    m = source.matrix
    assert source.n_bytes == BlockShape(m.rows, m.columns, rank).n_bytes
    name, kind = block_name(m.name, source.level), block_format(rank)
    return Entry(name, tiled_type(kind), (m.rows, m.columns), source.n_bytes, kind)


def _bytes_of(source: _Source, reader: TensorReader, spill: PartialFile) -> Iterator[np.ndarray]:
    if isinstance(source, MadeBlock):
        yield np.frombuffer(spill.read(source.offset, source.n_bytes), np.uint8)
    else:
        yield from read_as_it_is(reader, source)
