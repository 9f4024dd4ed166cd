"""How many bits each expert of a mixture gets, so that a text loses no more than is allowed.

After EdgeMoE (2308.14352): those that matter least get fewer bits, as many as the bound allows,
found by bisection. A text's loss goes up and down on the way: past the first crossing that was
found, the next steps are tried as well. What is measured is the model itself, whose experts in
memory are replaced by what they will be. How much an expert matters is what the text loses when all
experts of its layer get a lower width, shared among them by how much each one's outputs change on
the tokens that chose it; so those that tokens hardly ever choose may get very few bits, and what
that saves goes to those that they choose most. What comes out is no larger than with the two
neighbouring widths alone that the bound lies between, which are tried, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from headrace.calibration import LayerInputs
from headrace.expert_trial import Trial
from headrace.loaders.gguf import TensorReader
from headrace.loaders.progress import Progress
from headrace.placing import PlacedMatrix
from headrace.recipe import Method, Recipe, recipe_for
from headrace.rounding import Rounder
from headrace.rows import raw_rows
from headrace.sparse.format import TILE_ROWS, Floats
from headrace.sparse.gptq import output_errors
from headrace.sparse.registry import FORMATS

# Of widths in bits; where rows are no whole blocks of the first one, the next one is taken.
FORMATS_OF = {2: ("i2_g64",), 3: ("i3_g64",), 4: ("i4_g64", "i4_g32"), 8: ("q8_0",)}
LOSS = 0.02  # by how much perplexity may rise, as a share

_LEAST_LOST = 0.25  # of what layers lose on average, that each is taken to lose
_MORE_TRIALS = 32  # behind where bisection ended
_FIRST_TRY, _LAST_TRY = 32, 256  # of all parts, these shares are given fewer bits at a time there

PARTS = "gate and up", "down"  # of an expert, which have widths of their own
_REMARK_BYTES = 3 * 8

Expert = tuple[int, int]  # layer, number
Part = tuple[int, int, str]  # the same, and one of PARTS
Read = Callable[[int, int], bytes]  # of the file: offset, bytes
# For a layer and the widths of all parts, the matrices that change beside the experts': float32.
Fit = Callable[[int, Mapping[Part, int]], Sequence[tuple[str, Floats]]]


class RoundedExperts:
    """All experts at all widths: their bytes in a file, tile by tile, and how far they are off.

    Gate and up of an expert have one width, down has its own.

    Attributes:
        parts: the matrices that share a width, in the order of a pass.
        recipes: what becomes of them at each width.
    """

    def __init__(
        self, experts: Mapping[Expert, Sequence[PlacedMatrix]], widths: Sequence[int],
        method: Method,
    ) -> None:  # fmt: skip
        """Lay out the file.

        Args:
            experts: gate (if there is one), up and down of each.
        """
        self.experts, self.widths = experts, tuple(sorted(widths))
        self.parts: dict[Part, Sequence[PlacedMatrix]] = {}
        for one, (*before, down) in experts.items():
            self.parts |= {(*one, "gate and up"): before, (*one, "down"): (down,)}
        self.recipes = {
            (one, width): [recipe_for(p, _format(p, width), method) for p in matrices]
            for one, matrices in self.parts.items()
            for width in self.widths
        }
        self._at, at = dict[tuple[Part, int], int](), 0
        for part, width in self.recipes:
            self._at[part, width] = at
            at += self.n_bytes(part, width) + _REMARK_BYTES
        self.size = at

    def n_bytes(self, one: Part, width: int) -> int:
        """Of the matrices of a part, at a width."""
        return sum(recipe.placed.packed_bytes for recipe in self.recipes[one, width])

    def make(
        self, rounder: Rounder, reader: TensorReader, inputs: LayerInputs,
        write: Callable[[int, np.ndarray], None], done: int, made: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Round what is not yet; experts come in the order of a pass.

        Args:
            done: experts that are made already.
            made: called with how many are.
        """
        for i, (one, matrices) in enumerate(self.experts.items()):
            if i < done:
                continue
            down = matrices[-1]
            found = [self._part((*one, kind), rounder, reader, inputs, write) for kind in PARTS]
            name = down.matrix.name
            # What a matrix's output is off by is a share of the expert's, which is down's.
            whole = _output(inputs.sums(name), floats_of(reader, down))
            for kind, lost in zip(PARTS, found, strict=True):
                for width, (share, unmoved) in lost.items():
                    few = inputs.of(name) is None
                    said = np.array([share * whole, unmoved, few], np.float64)
                    part = *one, kind
                    write(self._at[part, width] + self.n_bytes(part, width), said.view(np.uint8))
            made(i + 1)

    def _part(
        self, one: Part, rounder: Rounder, reader: TensorReader, inputs: LayerInputs,
        write: Callable[[int, np.ndarray], None],
    ) -> dict[int, tuple[float, int]]:  # fmt: skip
        """Round a part; by width: the shares that its outputs are off by, and rows not moved."""
        lost = dict.fromkeys(self.widths, (0.0, 0))
        at = {width: self._at[one, width] for width in self.widths}
        for m, placed in enumerate(self.parts[one]):
            name = placed.matrix.name
            read = inputs.of(name)
            exact = floats_of(reader, placed)
            h = inputs.sums(name)
            whole = max(_output(h, exact), 1e-30)
            for width in self.widths:
                recipe = self.recipes[one, width][m]
                data = np.zeros(recipe.placed.packed_bytes, np.uint8)

                def put(start: int, some: np.ndarray, data: np.ndarray = data) -> None:
                    data[start : start + some.size] = some.reshape(-1)

                rounder.round(recipe, read, put)
                write(at[width], data)
                at[width] += data.size
                share, unmoved = lost[width]
                share += _output(h, exact - decoded(recipe, data)) / whole
                lost[width] = share, unmoved + rounder.forget(name)
        return lost

    def remark(self, one: Part, width: int, read: Read) -> tuple[float, int, bool]:
        """What is known of a part at a width.

        Returns:
            how far the outputs of its expert are off on the text, in squares, about; the rows that
            GPTQ did not move; whether too few tokens have chosen the expert.
        """
        at = self._at[one, width] + self.n_bytes(one, width)
        error, unmoved, few = np.frombuffer(read(at, _REMARK_BYTES))
        return float(error), int(unmoved), bool(few)

    def tiles(self, one: Part, width: int, read: Read) -> list[tuple[Recipe, np.ndarray]]:
        """The matrices of a part as they are written at a width, uint8."""
        at, found = self._at[one, width], []
        for recipe in self.recipes[one, width]:
            n = recipe.placed.packed_bytes
            found.append((recipe, np.frombuffer(read(at, n), np.uint8)))
            at += n
        return found

    def matrices(self, one: Part, width: int, read: Read) -> list[tuple[str, Floats]]:
        """The matrices of a part as they are at a width: float32."""
        return [
            (recipe.placed.matrix.name, decoded(recipe, data))
            for recipe, data in self.tiles(one, width, read)
        ]


def _format(placed: PlacedMatrix, width: int) -> str:
    """The format of a width; short rows of down get the next one whose blocks fit them."""
    formats = [name for more in FORMATS_OF if more >= width for name in FORMATS_OF[more]]
    fit = (name for name in formats if placed.matrix.columns % FORMATS[name].block == 0)
    return next(fit, formats[0])


def decoded(recipe: Recipe, data: np.ndarray) -> Floats:
    """The weights of tiles: float32 [rows, columns]."""
    placed = recipe.placed
    assert isinstance(placed, PlacedMatrix)
    fmt, m = placed.format, placed.matrix
    tiles = data.reshape(-1, m.columns // fmt.block, fmt.tile_block_bytes)
    return fmt.decode(fmt.untile(tiles, len(tiles) * TILE_ROWS))[: m.rows]


def floats_of(reader: TensorReader, placed: PlacedMatrix) -> Floats:
    as_floats = replace(placed, format=FORMATS["f32"])
    raw = raw_rows(reader, as_floats, 0, placed.matrix.rows)
    found: Floats = raw.view(np.float32)[: placed.matrix.rows]
    return found


def _output(h: Floats | None, w: Floats) -> float:
    """The sum of squares of what a matrix gives; without statistics, of inputs that are alike."""
    return float(np.square(w).sum()) if h is None else float(output_errors(h, w).sum())


@dataclass(frozen=True)
class Choice:
    """The width of each part of an expert, and what that costs.

    Attributes:
        rise: of perplexity, as a share of the source's.
        bound: what it was to stay within, over the source, too.
    """

    widths: dict[Part, int]
    rise: float
    bound: float


def choose_widths(
    rounded: RoundedExperts, read: Read, trial: Trial, loss: float, over: int | None = None,
    progress: Progress | None = None, notice: Callable[[str], None] = lambda line: None,
    fit: Fit = lambda layer, widths: (),
) -> Choice:  # fmt: skip
    """The width of each part, such that perplexity rises by no more than `loss`.

    Where not even the highest width of all meets the bound, that is what all get.

    Args:
        read: bytes of what `RoundedExperts.make` wrote.
        over: the width of `rounded` at which all experts have the perplexity that may rise; None:
            the source's may.
        progress: called with (measured, in all, what).
        notice: called with what all experts at a width cost.
        fit: gives what else of a layer changes with the widths of its parts.
    """
    parts, widths = list(rounded.parts), rounded.widths
    layers = sorted({layer for layer, *_ in parts})
    total = len(widths) + len(layers) + 2 * len(parts).bit_length() + _MORE_TRIALS
    measured = 0
    now, alike = dict[Part, int](), dict[int, float]()

    def put(wanted: Mapping[Part, int]) -> None:
        new = {one: width for one, width in wanted.items() if now.get(one) != width}
        for one, width in new.items():
            for name, weights in rounded.matrices(one, width, read):
                trial.put(name, weights)
        now.update(new)
        for layer in {one[0] for one in new}:
            for name, weights in fit(layer, now):
                trial.put(name, weights)

    def tell() -> None:
        nonlocal measured
        measured += 1
        if progress is not None:
            progress(min(measured, total), total, "measuring experts")

    def rise(wanted: Mapping[Part, int]) -> float:
        put(wanted)
        found = trial.rise()
        tell()
        return found

    def rise_at(width: int) -> float:
        if width not in alike:
            alike[width] = rise(dict.fromkeys(parts, width))
            notice(f"all experts at {width} bits: perplexity rises by {alike[width]:.2%}")
        return alike[width]

    bound = loss if over is None else (1 + rise_at(over)) * (1 + loss) - 1
    lower = 0
    for upper in widths:
        if rise_at(upper) <= bound:
            break
        lower = upper
    if lower in (0, widths[-1]):
        return Choice(dict.fromkeys(parts, upper), alike[upper], bound)
    put(dict.fromkeys(parts, upper))
    base = trial.divergence()
    # What the text loses when a layer's experts get the lowest width, of which much is known beside
    # what other layers happen to make good; where it is that alone, some share of the average.
    lost, off = dict[int, float](), dict[int, float]()
    for layer in layers:
        ours = [one for one in parts if one[0] == layer]
        put(dict.fromkeys(ours, widths[0]))
        lost[layer] = max(trial.divergence() - base, 0.0)
        tell()
        put(dict.fromkeys(ours, upper))
        off[layer] = sum(
            rounded.remark(one, widths[0], read)[0] - rounded.remark(one, upper, read)[0]
            for one in ours
        )
    least = _LEAST_LOST * sum(lost.values()) / len(layers)
    worth = {layer: max(lost[layer], least) / max(off[layer], 1e-30) for layer in layers}

    def within(some: Sequence[int]) -> tuple[Choice, list[_Step]]:
        """Few bytes of such widths, the highest of which loses little enough; what may follow."""
        steps = sorted(
            step
            for one in parts
            for step in _steps_down(
                one,
                [
                    (w, rounded.n_bytes(one, w), worth[one[0]] * rounded.remark(one, w, read)[0])
                    for w in reversed(some)
                ],
            )
        )

        def after(n: int) -> dict[Part, int]:
            return dict.fromkeys(parts, some[-1]) | {step.part: step.width for step in steps[:n]}

        good, bad, found = 0, len(steps) + 1, dict[int, float]()
        while bad - good > 1:
            n = (good + bad) // 2
            found[n] = rise(after(n))
            if found[n] <= bound:
                good = n
            else:
                bad = n
        rises = found[good] if good else rise_at(some[-1])
        return Choice(after(good), rises, bound), steps[good:]

    def further(choice: Choice, steps: Sequence[_Step]) -> Choice:
        """Steps that are still within the bound, where those that follow refused ones are not."""
        at, n = 0, max(1, len(parts) // _FIRST_TRY)
        least = max(1, len(parts) // _LAST_TRY)
        refused = set[Part]()
        for _ in range(_MORE_TRIALS):
            some = [step for step in steps[at : at + n] if step.part not in refused]
            if some:
                wanted = choice.widths | {step.part: step.width for step in some}
                rises = rise(wanted)
                if rises > bound and n > least:
                    n = max(least, n // 2)
                    continue
                if rises <= bound:
                    choice = replace(choice, widths=wanted, rise=rises)
                else:
                    refused |= {step.part for step in some}
            at += n
            if at >= len(steps):
                break
        return choice

    # Errors at far lower widths may do more than what is known of them says.
    choices = [within(some) for some in {(lower, upper): None, widths: None}]
    return further(
        *min(choices, key=lambda one: sum(rounded.n_bytes(*part) for part in one[0].widths.items()))
    )


class _Step(NamedTuple):
    """A part getting fewer bits: sorted, steps come with what loses least for the bytes first."""

    cost: float  # what the text loses for each byte that is saved
    part: Part
    wider: int  # minus the width, so that wider ones of a part come first
    width: int


def _steps_down(part: Part, widths: Sequence[tuple[int, int, float]]) -> Iterator[_Step]:
    """From width to width, such that each saves as much as it can for what is lost.

    Args:
        widths: the width, its bytes and what is lost, from the widest on.
    """
    at = 0
    while True:
        _, n_bytes, lost = widths[at]
        ahead = [
            (max(widths[i][2] - lost, 0.0) / (n_bytes - widths[i][1]), -i)
            for i in range(at + 1, len(widths))
            if widths[i][1] < n_bytes
        ]
        if not ahead:
            return
        cost, i = min(ahead)
        at = -i
        yield _Step(cost, part, -widths[at][0], widths[at][0])
