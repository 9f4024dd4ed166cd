"""Which format each matrix of a model gets when it is compressed, and how it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from headrace.errors import UnsupportedError
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.placing import PlacedMatrix, place
from headrace.rows import some_rows
from headrace.sparse.format import Format
from headrace.sparse.group_size import ADAPTIVE, SAMPLE_ROWS, choose_format
from headrace.sparse.registry import FORMATS

Progress = Callable[[int, int | None, str], None]

KEEP = "keep"
Method = Literal["rtn", "search", "gptq"]
METHODS: tuple[str, ...] = get_args(Method)
ENOUGH_BITS = 8.5  # of an embedding or a head that stays what it is
ENDS = "q8_0"  # what it becomes otherwise


@dataclass(frozen=True)
class Recipe:
    """A matrix as it will be: `placed` has the format that is written.

    Attributes:
        method: None: it has the format already, and its bytes are copied.
        instead_of: the format that was asked for, if its rows cannot be cut into that one's blocks.
    """

    placed: PlacedMatrix
    method: Method | None = None
    instead_of: str | None = None


def recipes(
    model: ModelFile, decoder: Decoder, format: str, ends: str | None, method: Method,
    reader: TensorReader, progress: Progress | None = None,
) -> list[Recipe]:  # fmt: skip
    """What becomes of each matrix, in the order of a pass.

    Matrices of layers get `format`; embedding and head get `ends`, and are never rounded by GPTQ:
    an embedding has no inputs that would have statistics.

    Args:
        format, ends: names of formats, or "keep": what it loads as. `ends` None: "keep" where that
            takes 8.5 bits or fewer a weight or `format` is "keep", else q8_0. `format` may also be
            one of `headrace.sparse.group_size.ADAPTIVE`, which is chosen for each matrix.
        reader: reads rows that such a choice looks at.
        progress: called with (matrices done, in all, what) while choosing.

    Raises:
        UnsupportedError: no such format, or one that `method` cannot round to.
        ModelFileError: the model cannot be used.
    """
    for name, others in ((format, (KEEP, *ADAPTIVE)), (ends or KEEP, (KEEP,))):
        if name not in FORMATS and name not in others:
            known = ", ".join([KEEP, "bitstack", *sorted([*FORMATS, *ADAPTIVE])])
            raise UnsupportedError(f"there is no format {name!r}; there is: {known}")
    if method not in METHODS:
        raise UnsupportedError(f"there is no method {method!r}; there is: {', '.join(METHODS)}")
    choices = ADAPTIVE.get(format) or ((FORMATS[format],) if format in FORMATS else ())
    if method != "rtn" and (not choices or any(fmt.grid is None for fmt in choices)):
        with_grid = [name for name, fmt in FORMATS.items() if fmt.grid is not None]
        those = ", ".join(sorted([*with_grid, *ADAPTIVE]))
        raise UnsupportedError(
            f"--method {method} rounds to {those}, not to {format!r}; use one of these or rtn"
        )
    outer = {decoder.embedding.name, decoder.head.name}
    found = []
    all_placed = place(model, decoder, "q8")
    for i, placed in enumerate(all_placed):
        at_end = placed.matrix.name in outer
        name = format
        if at_end:
            small = format == KEEP or placed.format.bits_per_weight <= ENOUGH_BITS
            name = ends or (KEEP if small else ENDS)
        if name in ADAPTIVE:
            fmt = choose_format(some_rows(reader, placed, SAMPLE_ROWS), choices)
            if progress is not None:
                progress(i + 1, len(all_placed), "choosing group sizes")
        else:
            fmt = placed.format if name == KEEP else FORMATS[name]
        found.append(_recipe(placed, fmt, "search" if at_end and method == "gptq" else method))
    return found


def _recipe(placed: PlacedMatrix, wanted: Format, method: Method) -> Recipe:
    fmt = _that_divides(wanted, placed.matrix.columns)
    if fmt is placed.format:
        return Recipe(placed)
    return Recipe(
        replace(placed, format=fmt),
        "rtn" if fmt.grid is None else method,
        None if fmt is wanted else wanted.name,
    )


def _that_divides(wanted: Format, columns: int) -> Format:
    """The smallest format with no fewer bits whose blocks make up a row; `wanted` itself if so."""
    if columns % wanted.block == 0:
        return wanted
    others = [
        fmt
        for fmt in FORMATS.values()
        if columns % fmt.block == 0 and fmt.bits_per_weight >= wanted.bits_per_weight
    ]
    return min(others, key=lambda fmt: (fmt.bits_per_weight, -fmt.block, fmt.name))


def remarks(chosen: Sequence[Recipe]) -> list[str]:
    """What became of matrices that could not be what was asked for, a line for each kind."""
    counts: dict[tuple[int, str, str], int] = {}
    for recipe in chosen:
        if recipe.instead_of is not None:
            placed = recipe.placed
            key = placed.matrix.columns, recipe.instead_of, placed.format.name
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{n} matri{'x' if n == 1 else 'ces'} with rows of {columns:,} get{'s' if n == 1 else ''} "
        f"{name} instead of {wanted}, whose blocks have {FORMATS[wanted].block} weights"
        for (columns, wanted, name), n in counts.items()
    ]
