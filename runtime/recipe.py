"""Which format each matrix of a model gets when it is compressed, and how it is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from headrace.errors import UnsupportedError
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.progress import Progress
from headrace.placing import Placed, PlacedMatrix, place
from headrace.pruning import PrunedMatrix
from headrace.rows import some_rows
from headrace.sparse.format import Format
from headrace.sparse.gqs import GROUP_FORMATS, UNIT
from headrace.sparse.gqs_pruning import left_out
from headrace.sparse.group_size import ADAPTIVE, SAMPLE_ROWS, choose_format
from headrace.sparse.registry import FORMATS

KEEP = "keep"
Method = Literal["rtn", "search", "gptq"]
METHODS: tuple[str, ...] = get_args(Method)
ENOUGH_BITS = 8.5  # of an embedding or a head that stays what it is
ENDS = "q8_0"  # what it becomes otherwise
UNPRUNED = "i4_g32"  # what a matrix becomes that cannot be cut into groups, or something larger
SPARSITY = 0.5
_MORE = 0.02  # of a matrix: what rows that fill no units lose beyond what was asked
# What the formats of a kind are called, where a user names the kind.
_KINDS = {
    "int2": ["i2_g64"], "int3": ["i3_g64"], "int4": ["i4_g32", "i4_auto"], "int8": ["q8_0"],
    "uint4": ["i4a_g32", "i4a_auto"], "w4": ["i4_g32", "i4_auto"], "fp4": ["mxfp4", "nvfp4"],
    "fp8": ["q8_0", "mxint8"], "mxfp8": ["mxint8"], "fp16": ["f16"], "fp32": ["f32"],
    "ternary": ["tq2_0", "tq1_0"], "2:4": ["s24_g32"],
    "sparse": ["gqs_g32", "s24_g32", "s16of32_g32"], "gqsa": ["gqs_g32"], "dgq": ["i4_dual"],
}  # fmt: skip
# Codebooks want a search that weighs what errors matter: formats that have one are only read.
WRITTEN = {name: fmt for name, fmt in FORMATS.items() if fmt.written}


@dataclass(frozen=True)
class Recipe:
    """A matrix as it will be: `placed` has the format that is written.

    Attributes:
        method: None: it has the format already, and its bytes are copied.
        instead_of: the format that was asked for, if its rows cannot be cut into that one's blocks.
    """

    placed: Placed | PrunedMatrix
    method: Method | None = None
    instead_of: str | None = None


def recipes(
    model: ModelFile, decoder: Decoder, format: str, ends: str | None, method: Method,
    reader: TensorReader, sparsity: float = SPARSITY, progress: Progress | None = None,
) -> list[Recipe]:  # fmt: skip
    """What becomes of each matrix, in the order of a pass.

    Matrices of layers get `format`, but routers of experts stay; embedding and head get `ends`, and
    are never rounded by GPTQ: an embedding has no inputs that would have statistics.

    Args:
        format, ends: names of formats, or "keep": what it loads as. `ends` None: "keep" where that
            takes 8.5 bits or fewer a weight or `format` is "keep", else q8_0. `format` may also be
            one of `headrace.sparse.group_size.ADAPTIVE`, which is chosen for each matrix.
        reader: reads rows that such a choice looks at.
        sparsity: share of the weights that a group-sparse format leaves out.
        progress: called with (matrices done, in all, what) while choosing.

    Raises:
        UnsupportedError: no such format, or one that `method` cannot round to.
        ModelFileError: the model cannot be used.
    """
    if ends in GROUP_FORMATS:
        raise UnsupportedError(f"--ends {ends}: embedding and head cannot be group-sparse")
    of_layers = [KEEP, "bitstack", *sorted([*WRITTEN, *GROUP_FORMATS, *ADAPTIVE])]
    for option, name, taken in (
        ("--format", format, of_layers),
        ("--ends", ends or KEEP, [KEEP, *sorted(WRITTEN)]),
    ):
        if name not in taken:
            if name in FORMATS:
                what = f"{name} is read, not written"
            elif name in of_layers:
                what = f"{name} is for --format alone"
            else:
                what = f"there is no format {name!r}"
                near = _near(name, taken)
                what += f" (did you mean {' or '.join(near)}?)" if near else ""
            raise UnsupportedError(f"{what}; {option} takes: {', '.join(taken)}")
    if method not in METHODS:
        raise UnsupportedError(f"there is no method {method!r}; there is: {', '.join(METHODS)}")
    gridded = [name for name, fmt in FORMATS.items() if fmt.searched]
    if method != "rtn" and format not in (*gridded, *GROUP_FORMATS, *ADAPTIVE):
        those = ", ".join(sorted([*gridded, *GROUP_FORMATS, *ADAPTIVE]))
        raise UnsupportedError(
            f"--format {format} is rounded to nearest alone: leave out --calibrate, or say "
            f"--method rtn ({method}, what a calibration is for, rounds to: {those})"
        )
    routed = decoder.mixtures().values()
    if decoder.in_parts() and format in GROUP_FORMATS:
        raise UnsupportedError(
            f"--format {format}: experts of a mixture, or clusters of neurons, cannot be "
            "group-sparse; use another format",
            path=model.paths[0],
        )
    outer = {decoder.embedding.name, decoder.head.name}
    # Small, and what they say decides which experts a token takes.
    routers = {m.name for one in routed for m in one.routers()}
    found = []
    all_placed = place(model, decoder, "q8")
    for i, placed in enumerate(all_placed):
        at_end = placed.matrix.name in outer
        name = format
        if at_end and isinstance(placed, PlacedMatrix):
            small = format == KEEP or placed.format.bits_per_weight <= ENOUGH_BITS
            name = ends or (KEEP if small else ENDS)
        if placed.matrix.name in routers:
            name = KEEP
        if name in ADAPTIVE:
            name = _chosen(reader, placed, ADAPTIVE[name]).name
            if progress is not None:
                progress(i + 1, len(all_placed), "choosing formats")
        how: Method = "search" if at_end and method == "gptq" else method
        found.append(recipe_for(placed, name, how, sparsity))
    return found


def _near(name: str, taken: Sequence[str]) -> list[str]:
    """The names that somebody who wrote `name` may have meant, three at most."""
    low = name.lower()
    if low in _KINDS:
        return _KINDS[low]
    near = get_close_matches(low, taken, n=1, cutoff=0.85)
    begins = [one for one in taken if low and (low.startswith(one) or one.startswith(low))]
    return near or begins[:3]


def _chosen(reader: TensorReader, placed: Placed, formats: Sequence[Format]) -> Format:
    """The format that suits a matrix; the first where none divides its rows."""
    if all(placed.matrix.columns % fmt.block for fmt in formats):
        return formats[0]
    return choose_format(some_rows(reader, placed, SAMPLE_ROWS), formats)


def recipe_for(placed: Placed, name: str, method: Method, sparsity: float = SPARSITY) -> Recipe:
    if name == KEEP:
        return Recipe(placed)
    matrix, groups = placed.matrix, GROUP_FORMATS.get(name)
    if groups is not None and matrix.columns % groups.group == 0:
        pruned = PrunedMatrix(matrix, placed.info, groups, sparsity)
        enough = placed.format == groups and placed.info.n_bytes <= pruned.packed_bytes
        return Recipe(placed) if enough else Recipe(pruned, method)
    fmt = _that_divides(FORMATS[UNPRUNED if groups else name], matrix.columns)
    if fmt is placed.format:
        return Recipe(placed)
    expert = isinstance(placed, PlacedMatrix) and placed.expert
    dense = PlacedMatrix(matrix, placed.info, fmt, expert=expert)
    how: Method = method if fmt.searched else "rtn"
    return Recipe(dense, how, None if fmt.name == name else name)


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


def _block_of(name: str) -> int:
    return GROUP_FORMATS[name].group if name in GROUP_FORMATS else FORMATS[name].block


def remarks(chosen: Sequence[Recipe]) -> list[str]:
    """What a user should know of what is to be made: matrices that cannot be what was asked for, a
    line for each kind, and how much is left out, if that is more than can go well.
    """
    counts: dict[tuple[int, str, str], int] = {}
    for recipe in chosen:
        if recipe.instead_of is not None:
            placed = recipe.placed
            key = placed.matrix.columns, recipe.instead_of, placed.format.name
            counts[key] = counts.get(key, 0) + 1
    asked = [r.placed.sparsity for r in chosen if isinstance(r.placed, PrunedMatrix)]
    found = []
    if max(asked, default=0) > SPARSITY:
        found.append(
            f"--sparsity {max(asked):g} leaves out more than half of the weights: expect a poor "
            "model (at 0.5 SmolLM2's perplexity is ten times its source's), and see with --evaluate"
        )
    narrow: dict[tuple[int, float, float], int] = {}
    for recipe in chosen:
        if isinstance(of := recipe.placed, PrunedMatrix):
            rows, columns = of.matrix.rows, of.matrix.columns
            share = left_out(rows, columns, of.format.group, of.sparsity)
            if share > of.sparsity + _MORE:
                at = columns, of.sparsity, round(share, 2)
                narrow[at] = narrow.get(at, 0) + 1
    found += [
        f"{n} matri{'x' if n == 1 else 'ces'} with rows of {columns:,} lose{'s' if n == 1 else ''} "
        f"{share:.0%} of the weights instead of {wanted:.0%}: groups are stored "
        f"{UNIT} weights at a time, much for rows so short, of which some may keep none"
        for (columns, wanted, share), n in narrow.items()
    ]
    return found + [
        f"{n} matri{'x' if n == 1 else 'ces'} with rows of {columns:,} get{'s' if n == 1 else ''} "
        f"{name} instead of {wanted}, whose blocks have {_block_of(wanted)} weights"
        for (columns, wanted, name), n in counts.items()
    ]
