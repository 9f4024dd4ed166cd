"""Experts that wait in a file in all widths, until it is chosen which of them a model gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.calibration import LayerInputs
from headrace.expert_bits import (
    PARTS,
    Choice,
    Expert,
    Fit,
    Part,
    Read,
    RoundedExperts,
    choose_widths,
    floats_of,
)
from headrace.expert_trial import Trial
from headrace.families.decoder import Experts
from headrace.loaders.gguf import TensorReader
from headrace.loaders.progress import Progress
from headrace.model import load
from headrace.partial_file import PartialFile, check_disk
from headrace.placing import Placed, PlacedMatrix, dense
from headrace.recipe import Method, Recipe
from headrace.rounding import Rounder
from headrace.shared_fit import SharedSums
from headrace.sizes import format_size
from headrace.sparse.format import Floats
from headrace.windows import Windows


def waiting_of(target: Path) -> Path:
    """The file beside a model whose part has its experts in all widths."""
    return target.with_name(f"{target.name}.experts")


class WaitingExperts:
    """Experts in the widths that were chosen; their bytes wait in a file.

    Attributes:
        said: what is to be said about them.
        few: experts that too few tokens have chosen to round them by GPTQ: (layer, expert).
    """

    def __init__(
        self, rounded: RoundedExperts, choice: Choice, read: Read, over: str,
        fitted: Mapping[str, int], fit: Fit,
    ) -> None:  # fmt: skip
        """Say what was chosen.

        Args:
            over: over what perplexity rises, if not over the source alone.
            fitted: matrices that make up for what rounding changes, by name, and their layers.
            fit: gives what becomes of them; see `choose_widths`.
        """
        self._rounded, self._choice, self._read = rounded, choice, read
        self.fitted, self._fit = fitted, fit
        chosen = choice.widths.items()
        self._part_of = {
            recipe.placed.matrix.name: one
            for one, width in chosen
            for recipe in rounded.recipes[one, width]
        }
        self._recipes = {
            recipe.placed.matrix.name: recipe
            for one, width in chosen
            for recipe in rounded.recipes[one, width]
        }
        self.few = {one[:2] for one, width in chosen if rounded.remark(one, width, read)[2]}
        counts = []
        for kind in PARTS:
            widths = [width for one, width in chosen if one[2] == kind]
            some = ((widths.count(width), width) for width in rounded.widths)
            counts.append(kind + " of " + ", ".join(f"{n:,} at {w} bits" for n, w in some if n))
        n_bytes = sum(rounded.n_bytes(one, width) for one, width in chosen)
        self.said = (
            f"experts: {'; '.join(counts)}; {format_size(n_bytes)}; on the text perplexity rises "
            f"by {choice.rise:.2%}{over}"
        )
        if choice.rise > choice.bound:
            self.said += f", above the bound of {choice.bound:.2%}: use larger --expert-bits"

    def recipe(self, one: Recipe) -> Recipe:
        """What becomes of a matrix, of which `one` says what would if it were not for experts."""
        name = one.placed.matrix.name
        if name in self.fitted and one.method is None:  # it is not copied any more
            one = replace(one, method="rtn")
        return self._recipes.get(name, one)

    def tiles(self, name: str) -> np.ndarray | None:
        """The bytes of a matrix as they are written; None: it is none of these."""
        one = self._part_of.get(name)
        if one is None:
            return None
        for recipe, data in self._rounded.tiles(one, self._choice.widths[one], self._read):
            if recipe.placed.matrix.name == name:
                return data
        raise AssertionError(f"{name} is not of its part")

    def changed(self, name: str) -> Floats | None:
        """What becomes of a matrix that makes up for rounded experts; None: it is none of these."""
        layer = self.fitted.get(name)
        return None if layer is None else dict(self._fit(layer, self._choice.widths))[name]

    def remember(self, rounder: Rounder) -> None:
        """Let a rounder know what is remarkable about those that were chosen."""
        for one, width in self._choice.widths.items():
            _, unmoved, _ = self._rounded.remark(one, width, self._read)
            rounder.remember(self._rounded.parts[one][0].matrix.name, unmoved)


def waiting_experts(
    path: Path, target: Path, placed: Sequence[Placed], mixtures: Mapping[int, Experts],
    widths: Sequence[int], loss: float, over: int | None, *, method: Method, inputs: LayerInputs,
    again: LayerInputs, downs: Mapping[int, PlacedMatrix], rounder: Rounder, reader: TensorReader,
    windows: Windows, key: str, stack: ExitStack, threads: int,
    memory: int | None, progress: Progress | None, notice: Callable[[str], None],
) -> WaitingExperts:  # fmt: skip
    """Round the experts of a model and choose their widths.

    They wait in a file beside `target`, which goes when `stack` ends without an error.

    Args:
        path: the model, of which `placed` are the matrices.
        over: see `choose_widths`.
        again: of the same text, to be watched once more, with rounded experts.
        downs: of the shared parts that make up for rounding, by layer.
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
    sums = SharedSums(mixtures, downs, rounded.widths, rounded.size)
    waiting = waiting_of(target)
    check_disk(target, {waiting: sums.size})
    key = f"{key} {rounded.widths} parts {sorted(downs)} sums"
    spill = stack.enter_context(PartialFile(waiting, key, sums.size))
    spill.tell(notice, len(experts), "experts")
    order = [layer for layer, _ in experts]

    def made(n: int) -> None:
        layer = order[n - 1]
        if layer in downs and layer not in order[n:]:
            sums.collect(
                layer,
                lambda e, width: [
                    w for _, w in rounded.matrices((layer, e, PARTS[0]), width, spill.read)
                ],
                again, spill.write, threads,
            )  # fmt: skip
        spill.finish(n)

    rounded.make(rounder, reader, inputs, spill.write, spill.done, made)

    def fit(layer: int, widths: Mapping[Part, int]) -> list[tuple[str, Floats]]:
        if layer not in downs:
            return []

        def of_expert(e: int) -> tuple[int, Floats, Floats]:
            one: Expert = layer, e
            ((_, now),) = rounded.matrices((*one, PARTS[1]), widths[*one, PARTS[1]], spill.read)
            return widths[*one, PARTS[0]], floats_of(reader, experts[one][-1]), now

        more = sums.correction(layer, of_expert, spill.read)
        return [(downs[layer].matrix.name, floats_of(reader, downs[layer]) + more)]

    context = windows.context
    options: dict[str, Any] = {"context": context, "logits_rows": windows.scored}
    with load(path, threads=threads, memory=memory, **options) as model:
        trial = Trial(model, windows)
        choice = choose_widths(rounded, spill.read, trial, loss, over, progress, notice, fit)
    beside = ""
    if over is not None:
        beyond = (1 + choice.rise) / (1 + choice.bound) * (1 + loss) - 1
        beside = f" over the source, {beyond:.2%} over all experts at {over} bits"
    fitted = {p.matrix.name: layer for layer, p in downs.items()}
    found = WaitingExperts(rounded, choice, spill.read, beside, fitted, fit)
    found.remember(rounder)
    return found
