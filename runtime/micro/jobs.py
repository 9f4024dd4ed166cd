"""What a chip does one after the other: layers, whole or some of their rows, and moves of rows.

Layers **by rows** (patch-based inference as in MCUNetV2, Lin et al., 2110.15352, with patches as
wide as the image): the last of some layers is made a few rows at a time, and of what lies between
only those rows are there that are still wanted. Rows that the next ones need, too, are moved to the
front, so that nothing is computed twice, and every bit is what whole layers give. The result is
written over rows of what the first layer reads, as soon as nobody needs these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.micro.kernels.move import FROM, TO
from headrace.micro.lowered import At
from headrace.micro.network import Depthwise, Layer, Value, View

Range = tuple[int, int]  # rows: the first one, and the one behind the last


@dataclass(frozen=True)
class Job:
    """A step before it has addresses.

    Attributes:
        layer: whole or partial; None: a move.
        at: where in which value of the network what it reads and makes lies, by name; of a move
            `TO` and `FROM`.
        index: of the layer in the network.
        moved_bytes: of a move.
    """

    layer: Layer | None
    at: Mapping[str, At]
    index: int
    moved_bytes: int = 0


@dataclass(frozen=True)
class ByRows:
    """Layers that run by rows.

    Attributes:
        first, last: the first layer, and the one behind the last.
        rows: that the last of them makes at a time.
    """

    first: int
    last: int
    rows: int


@dataclass
class Bands:
    """Rows of values while layers run by rows.

    Attributes:
        made: of each band and each layer, the rows that it makes.
        needed: of each band and each value between, the rows that are read.
    """

    made: list[dict[int, Range]] = field(default_factory=list)
    needed: list[dict[str, Range]] = field(default_factory=list)


def rows_read(layer: Layer, value: Value, rows: Range) -> Range:
    """Rows of what a layer reads that some of its rows are made of."""
    windows = getattr(layer, "windows", None)
    if windows is None:
        return rows
    stride, pad = windows.strides[0], windows.pads[0]
    reach = (windows.taps[0] - 1) * windows.dilations[0] + 1
    begin, end = rows[0] * stride - pad, (rows[1] - 1) * stride - pad + reach
    return max(0, begin), min(value.image[0], end)


def can_run_by_rows(layers: Sequence[Layer]) -> bool:
    """Whether each makes rows of rows, and reads what one of them makes, or the first reads."""
    known = {value.name for value in layers[0].reads}
    if len(known) != 1:
        return False
    for layer in layers:
        images = all(len(value.shape) == 3 for value in (*layer.reads, layer.makes))
        if isinstance(layer, View) or not images:
            return False
        rows = layer.makes.image[0]
        if not hasattr(layer, "windows") and any(v.image[0] != rows for v in layer.reads):
            return False
        if any(value.name not in known for value in layer.reads):
            return False
        known.add(layer.makes.name)
    return True


def bands_of(layers: Sequence[Layer], rows: int) -> Bands:
    """Which rows are made and needed, band after band; layers by their place among these."""
    found = Bands()
    last = layers[-1]
    done = [0] * len(layers)
    for begin in range(0, last.makes.image[0], rows):
        wanted = {last.makes.name: (begin, min(begin + rows, last.makes.image[0]))}
        made: dict[int, Range] = {}
        needed: dict[str, Range] = {}
        for i in range(len(layers) - 1, -1, -1):
            layer = layers[i]
            until = wanted.get(layer.makes.name, (0, 0))[1]
            if until <= done[i]:
                continue
            made[i] = (done[i], until)
            done[i] = until
            for value in layer.reads:
                span = rows_read(layer, value, made[i])
                before = needed.get(value.name, span)
                needed[value.name] = (min(span[0], before[0]), max(span[1], before[1]))
                wanted[value.name] = needed[value.name]
        found.made.append(dict(sorted(made.items())))
        found.needed.append(needed)
    return found


def part_of(layer: Layer, rows: Range, reads: Sequence[Value], makes: Value) -> Layer:
    """The part of a layer that makes some rows of its result."""
    changes: dict[str, Any] = {"reads": tuple(reads), "makes": makes}
    windows = getattr(layer, "windows", None)
    if windows is not None:
        above = max(0, windows.pads[0] - rows[0] * windows.strides[0])
        changes["windows"] = replace(windows, pads=(above, windows.pads[1]))
    if isinstance(layer, Depthwise):
        changes["whole"] = layer.makes.image[:2]
    return replace(layer, **changes)


def some_rows(value: Value, rows: Range) -> Value:
    """Rows of an image as an image."""
    return replace(value, shape=(rows[1] - rows[0], *value.shape[1:]))


def row_bytes(value: Value) -> int:
    """Of a row of an image."""
    _, columns, channels = value.image
    return columns * channels * value.dtype.itemsize


def jobs_by_rows(
    layers: Sequence[Layer], first: int, rows: int
) -> tuple[list[Job], dict[str, int], int]:
    """Jobs of layers by rows.

    Args:
        layers: those.
        first: the place of the first in the network.
        rows: that the last of them makes at a time.

    Returns:
        The jobs; bytes of each piece between the layers; and how far above its own result the
        first layer's input has to begin, if they share a piece.
    """
    given, result = layers[0].reads[0], layers[-1].makes
    bands = bands_of(layers, rows)
    between = {layer.makes.name: layer.makes for layer in layers[:-1]}
    held: dict[str, Range] = dict.fromkeys(between, (0, 0))
    most = dict.fromkeys(between, 0)
    jobs: list[Job] = []
    above = 0
    # A layer that reads the input itself may not write over what it reads.
    at_once = any(value.name == given.name for value in layers[-1].reads)
    for band, made in enumerate(bands.made):
        later = _later(bands, band + (not at_once), given.name, given.image[0])
        for i, span in made.items():
            layer = layers[i]
            name = layer.makes.name
            if name in between:
                keep = _later(bands, band, name, span[0])
                jobs += _moved(layer.makes, held, keep, first + i)
                held[name] = (held[name][0], span[1])
                most[name] = max(most[name], span[1] - held[name][0])
            jobs.append(_part_job(layer, span, held, first + i))
            if name == result.name:
                written = span[1] * row_bytes(result)
                above = max(above, written - later * row_bytes(given))
    sizes = {name: most[name] * row_bytes(value) for name, value in between.items()}
    return jobs, sizes, above


def _later(bands: Bands, band: int, name: str, end: int) -> int:
    """The first row of a value that a band or one behind it reads."""
    return min((one[name][0] for one in bands.needed[band:] if name in one), default=end)


def _moved(value: Value, held: dict[str, Range], keep: int, index: int) -> Iterator[Job]:
    """Forget rows that nobody needs any more: those that are left go to the front."""
    begin, end = held[value.name]
    keep = min(keep, end)
    if keep <= begin:
        return
    held[value.name] = (keep, end)
    if keep < end:
        size = row_bytes(value)
        at = {TO: At(value.name), FROM: At(value.name, (keep - begin) * size)}
        yield Job(None, at, index, (end - keep) * size)


def _part_job(layer: Layer, span: Range, held: Mapping[str, Range], index: int) -> Job:
    at: dict[str, At] = {}
    reads = []
    for value in layer.reads:
        rows = rows_read(layer, value, span)
        part = some_rows(value, rows)
        begin = rows[0] - held.get(value.name, (0, 0))[0]
        at[part.name] = At(value.name, begin * row_bytes(value))
        reads.append(part)
    makes = some_rows(layer.makes, span)
    begin = span[0] - held.get(layer.makes.name, (0, 0))[0]
    at[makes.name] = At(layer.makes.name, begin * row_bytes(layer.makes))
    return Job(part_of(layer, span, reads, makes), at, index)
