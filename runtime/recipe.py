"""Which format each matrix of a model gets when it is compressed, and how it is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from headrace.errors import UnsupportedError
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile
from headrace.placing import PlacedMatrix, place
from headrace.sparse.format import Format
from headrace.sparse.registry import FORMATS

KEEP = "keep"
Method = Literal["rtn", "search", "gptq"]
METHODS: tuple[str, ...] = get_args(Method)
ENOUGH_BITS = 8.5  # of an embedding or a head that stays what it is
ENDS = "q8_0"  # what it becomes otherwise
# Codebooks want a search that weighs what errors matter: formats that have one are only read.
WRITTEN = {name: fmt for name, fmt in FORMATS.items() if fmt.unpacked is None}


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
    model: ModelFile, decoder: Decoder, format: str, ends: str | None, method: Method
) -> list[Recipe]:
    """What becomes of each matrix, in the order of a pass.

    Matrices of layers get `format`; embedding and head get `ends`, and are never rounded by GPTQ:
    an embedding has no inputs that would have statistics.

    Args:
        format, ends: names of formats, or "keep": what it loads as. `ends` None: "keep" where that
            takes 8.5 bits or fewer a weight or `format` is "keep", else q8_0.

    Raises:
        UnsupportedError: no such format, or one that `method` cannot round to.
        ModelFileError: the model cannot be used.
    """
    for name in (format, ends or KEEP):
        if name not in WRITTEN and name != KEEP:
            known = ", ".join([KEEP, "bitstack", *sorted(WRITTEN)])
            what = (
                f"{name} is read, not written"
                if name in FORMATS
                else f"there is no format {name!r}"
            )
            raise UnsupportedError(f"{what}; there is: {known}")
    if method not in METHODS:
        raise UnsupportedError(f"there is no method {method!r}; there is: {', '.join(METHODS)}")
    if method != "rtn" and (format == KEEP or FORMATS[format].grid is None):
        those = ", ".join(sorted(name for name, fmt in FORMATS.items() if fmt.grid is not None))
        raise UnsupportedError(
            f"--method {method} rounds to {those}, not to {format!r}; use one of these or rtn"
        )
    outer = {decoder.embedding.name, decoder.head.name}
    found = []
    for placed in place(model, decoder, "q8"):
        at_end = placed.matrix.name in outer
        name = format
        if at_end:
            small = format == KEEP or placed.format.bits_per_weight <= ENOUGH_BITS
            name = ends or (KEEP if small else ENDS)
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
        for fmt in WRITTEN.values()
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
