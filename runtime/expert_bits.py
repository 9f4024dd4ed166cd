"""How many bits each expert of a mixture gets, so that a text loses no more than is allowed.

After EdgeMoE (2308.14352): all experts at each width say which two neighbouring widths the bound
lies between; then those that matter least get the lower one, as many as the bound allows, found by
bisection. What is measured is the model itself, whose experts in memory are replaced by what they
will be. How much an expert matters is what the text loses when all experts of its layer get the
lower width, shared among them by how much each one's outputs change on the tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.calibration import LayerInputs
from headrace.expert_trial import Trial
from headrace.families.decoder import Experts
from headrace.loaders.gguf import TensorReader
from headrace.loaders.progress import Progress
from headrace.model import load
from headrace.partial_file import PartialFile, check_disk
from headrace.placing import Placed, PlacedMatrix, dense
from headrace.recipe import Method, Recipe, recipe_for
from headrace.rounding import Rounder
from headrace.rows import raw_rows
from headrace.sparse.format import TILE_ROWS, Floats
from headrace.sparse.gptq import output_errors
from headrace.sparse.registry import FORMATS
from headrace.windows import Windows

FORMATS_OF = {2: "i2_g64", 3: "i3_g64", 4: "i4_g32", 8: "q8_0"}  # of widths in bits
LOSS = 0.02  # by how much perplexity may rise, as a share

Expert = tuple[int, int]  # layer, number


class RoundedExperts:
    """All experts at all widths: their bytes in a file, tile by tile, and how far they are off."""

    def __init__(
        self, experts: Mapping[Expert, Sequence[PlacedMatrix]], widths: Sequence[int],
        method: Method,
    ) -> None:  # fmt: skip
        self.experts, self.widths = experts, tuple(sorted(widths))
        self.recipes = {
            (one, width): [recipe_for(p, _format(p, width), method) for p in matrices]
            for one, matrices in experts.items()
            for width in self.widths
        }
        self._at, at = dict[tuple[Expert, int], int](), 0
        for key, recipes in self.recipes.items():
            self._at[key] = at
            at += sum(r.placed.packed_bytes for r in recipes) + 8
        self.size = at

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
            errors = dict.fromkeys(self.widths, 0.0)
            at = {width: self._at[one, width] for width in self.widths}
            for m, placed in enumerate(matrices):
                name = placed.matrix.name
                read = inputs.of(name)
                exact = _floats(reader, placed)
                h = None if read is None else read.h
                whole = _output(h, exact)
                for width in self.widths:
                    recipe = self.recipes[one, width][m]
                    data = np.zeros(recipe.placed.packed_bytes, np.uint8)

                    def put(start: int, some: np.ndarray, data: np.ndarray = data) -> None:
                        data[start : start + some.size] = some.reshape(-1)

                    rounder.round(recipe, read, put)
                    write(at[width], data)
                    at[width] += data.size
                    lost = _output(h, exact - decoded(recipe, data))
                    errors[width] += lost / max(whole, 1e-30)
            for width in self.widths:  # of all outputs: `whole` is down's
                write(at[width], np.array([errors[width] * whole]).view(np.uint8))
            made(i + 1)

    def error(self, one: Expert, width: int, read: Callable[[int, int], bytes]) -> float:
        """How far the outputs of an expert are off on the text, in squares, about."""
        n_bytes = sum(r.placed.packed_bytes for r in self.recipes[one, width])
        (found,) = np.frombuffer(read(self._at[one, width] + n_bytes, 8))
        return float(found)

    def matrices(
        self, one: Expert, width: int, read: Callable[[int, int], bytes]
    ) -> list[tuple[str, Floats]]:
        """An expert's matrices as they are at a width: float32."""
        at, found = self._at[one, width], []
        for recipe in self.recipes[one, width]:
            n = recipe.placed.packed_bytes
            data = np.frombuffer(read(at, n), np.uint8)
            found.append((recipe.placed.matrix.name, decoded(recipe, data)))
            at += n
        return found


def _format(placed: PlacedMatrix, width: int) -> str:
    """The format of a width; short rows of down get the next one whose blocks fit them."""
    formats = [FORMATS_OF[more] for more in FORMATS_OF if more >= width]
    fit = (name for name in formats if placed.matrix.columns % FORMATS[name].block == 0)
    return next(fit, formats[0])


def decoded(recipe: Recipe, data: np.ndarray) -> Floats:
    """The weights of tiles: float32 [rows, columns]."""
    placed = recipe.placed
    assert isinstance(placed, PlacedMatrix)
    fmt, m = placed.format, placed.matrix
    tiles = data.reshape(-1, m.columns // fmt.block, fmt.tile_block_bytes)
    return fmt.decode(fmt.untile(tiles, len(tiles) * TILE_ROWS))[: m.rows]


def _floats(reader: TensorReader, placed: PlacedMatrix) -> Floats:
    as_floats = replace(placed, format=FORMATS["f32"])
    raw = raw_rows(reader, as_floats, 0, placed.matrix.rows)
    found: Floats = raw.view(np.float32)[: placed.matrix.rows]
    return found


def _output(h: Floats | None, w: Floats) -> float:
    """The sum of squares of what a matrix gives; without statistics, of inputs that are alike."""
    return float(np.square(w).sum()) if h is None else float(output_errors(h, w).sum())


def choose_widths(
    rounded: RoundedExperts, read: Callable[[int, int], bytes], trial: Trial, loss: float,
    progress: Progress | None = None, notice: Callable[[str], None] = lambda line: None,
) -> tuple[dict[Expert, int], float]:  # fmt: skip
    """The width of each expert, such that perplexity rises by no more than `loss`, and its rise.

    Where not even the highest width of all meets the bound, that is what all get.

    Args:
        read: bytes of what `RoundedExperts.make` wrote.
        progress: called with (measured, in all, what).
        notice: called with what all experts at a width cost.
    """
    experts, widths = list(rounded.experts), rounded.widths
    layers = sorted({layer for layer, _ in experts})
    total = len(widths) + len(layers) + len(experts).bit_length()
    measured = 0
    now = dict[Expert, int]()

    def put(wanted: Mapping[Expert, int]) -> None:
        for one, width in wanted.items():
            if now.get(one) != width:
                for name, weights in rounded.matrices(one, width, read):
                    trial.put(name, weights)
                now[one] = width

    def tell() -> None:
        nonlocal measured
        measured += 1
        if progress is not None:
            progress(min(measured, total), total, "measuring experts")

    def rise(wanted: Mapping[Expert, int]) -> float:
        put(wanted)
        found = trial.rise()
        tell()
        return found

    lower, found = 0, 0.0
    for upper in widths:
        found = rise(dict.fromkeys(experts, upper))
        notice(f"all experts at {upper} bits: perplexity rises by {found:.2%}")
        if found <= loss:
            break
        lower = upper
    if lower in (0, widths[-1]):
        return dict.fromkeys(experts, upper), found
    base = trial.divergence()
    matter = dict[Expert, float]()
    for layer in layers:
        ours = [one for one in experts if one[0] == layer]
        put(dict.fromkeys(ours, lower))
        lost = max(trial.divergence() - base, 0.0)
        tell()
        put(dict.fromkeys(ours, upper))
        shares = [
            max(rounded.error(one, lower, read) - rounded.error(one, upper, read), 0.0)
            for one in ours
        ]
        whole = sum(shares) or 1.0
        matter |= {one: lost * part / whole for one, part in zip(ours, shares, strict=True)}
    order = sorted(experts, key=lambda one: (matter[one], one))
    good, bad = (0, found), len(experts)
    while bad - good[0] > 1:
        n = (good[0] + bad) // 2
        lost = rise({one: lower if i < n else upper for i, one in enumerate(order)})
        if lost <= loss:
            good = n, lost
        else:
            bad = n
    return {one: lower if i < good[0] else upper for i, one in enumerate(order)}, good[1]


def waiting_of(target: Path) -> Path:
    """The file beside a model whose part has its experts in all widths."""
    return target.with_name(f"{target.name}.experts")


def expert_recipes(
    path: Path, target: Path, placed: Sequence[Placed], mixtures: Mapping[int, Experts],
    widths: Sequence[int], loss: float, *, method: Method, inputs: LayerInputs, rounder: Rounder,
    reader: TensorReader, windows: Windows, key: str, stack: ExitStack, threads: int,
    memory: int | None, progress: Progress | None, notice: Callable[[str], None],
) -> tuple[dict[str, Recipe], str]:  # fmt: skip
    """What becomes of the matrices of experts, and what is to be said about it.

    Rounded experts wait in a file beside `target`, which goes when `stack` ends without an error.

    Args:
        path: the model, of which `placed` are the matrices.
        windows: of the text that losses are measured on.
        key: what decides the experts' bytes but for widths.
    """
    by_name = {p.matrix.name: dense(p) for p in placed}
    experts = {
        (layer, e): [by_name[m.name] for m in one.matrices()]
        for layer, mixture in mixtures.items()
        for e, one in enumerate(mixture.computed)
    }
    rounded = RoundedExperts(experts, widths, method)
    waiting = waiting_of(target)
    check_disk(target, {waiting: rounded.size})
    spill = stack.enter_context(PartialFile(waiting, f"{key} {rounded.widths}", rounded.size))
    spill.tell(notice, len(experts), "experts")
    rounded.make(rounder, reader, inputs, spill.write, spill.done, spill.finish)
    context = windows.context
    options: dict[str, Any] = {"context": context, "logits_rows": windows.scored}
    with load(path, threads=threads, memory=memory, **options) as model:
        trial = Trial(model, windows)
        chosen, rise = choose_widths(rounded, spill.read, trial, loss, progress, notice)
    found = {
        recipe.placed.matrix.name: recipe
        for one, width in chosen.items()
        for recipe in rounded.recipes[one, width]
    }
    counts = {width: list(chosen.values()).count(width) for width in rounded.widths}
    said = ", ".join(f"{n:,} at {width} bits" for width, n in counts.items() if n)
    over = "" if rise <= loss else f", above the bound of {loss:.2%}: use larger --expert-bits"
    return found, f"experts: {said}; on the text perplexity rises by {rise:.2%}{over}"
