"""Which tiles and which blocks of sums cost the fewest instructions, within so much fast memory.

Instructions of a call are counted in the emulator, not estimated: they do not depend on the numbers
that are computed, only on shapes and distances, so each is counted once and kept on disk. A call's
memory is what it reads and writes, each byte once. All blocks give the same bits; tiles do, too,
where sums are kept in halves, and else but for gradients of weights, which are rounded behind each
tile.

Source: the exhaustive search of PULP-TrainLib's autotuner (Nadalini et al., 2022).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.atomic_file import write_whole
from headrace.errors import UnsupportedError
from headrace.folders import cache_root
from headrace.micro.half.machine import LINES_OF, operands_of, touched_bytes
from headrace.micro.half.windows import Tile
from headrace.micro.kernels import matmul
from headrace.micro.kernels.numbers import Kind, dtype_of
from headrace.micro.kernels.table import kernel_table
from headrace.micro.lowered import At, Step
from headrace.micro.network import MicroNetwork
from headrace.micro.training import Learning, TrainingStep, training_step
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import count_instructions
from headrace.targets.target import Target

FAST_BYTES = 64 << 10  # PULP's L1
_SCRATCH = (4 << 10, 8 << 10, 16 << 10, 32 << 10)
_COLUMNS = (0, 32, 16)
_SLACK = 64  # bytes beside what a call reads
_ROWS, _PERIOD = 5, 12  # a product's rows of a line: blocks have 1, 2, 3, 4 or 6

Progress = Callable[[int, int, str], None]


class Costs:
    """Instructions of calls on a chip, counted in its emulator and kept on disk.

    Args:
        target: the chip.

    Raises:
        KernelError: by `instructions`: nothing here emulates the chip.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.counted = target, 0
        self._codes: dict[str, bytes] = {}
        self._path = cache_root() / "micro-costs" / f"{target.name}.json"
        self._known: dict[str, int] = _read(self._path)

    def instructions(self, step: Step) -> int:
        """Of a call of a convolution, of its kernel's own.

        Kernels do the same for each of their lines, and a product does for each 12 rows of one:
        some are counted, which tells all.
        """
        slot = LINES_OF[step.kernel]
        lines = _number(step, slot)
        if lines < 1:
            return self._counted(step)
        one, two = (self._of_rows(_with(step, slot, n)) for n in (1, 2))
        return one + (lines - 1) * (two - one)

    def _of_rows(self, step: Step) -> int:
        rows = _number(step, _ROWS)
        if not step.kernel.startswith("matmul") or rows <= 3 * _PERIOD:
            return self._counted(step)
        first = _PERIOD + rows % _PERIOD
        few, more = (self._counted(_with(step, _ROWS, first + n)) for n in (0, _PERIOD))
        return few + (rows - first) // _PERIOD * (more - few)

    def _counted(self, step: Step) -> int:
        if step.kernel not in self._codes:
            row = kernel_table()[step.kernel]
            self._codes |= KernelStore(self.target).objects([row])
        code = self._codes[step.kernel]
        shape = [None if isinstance(slot, At) else slot for slot in step.slots]
        key = hashlib.sha256(code + repr(shape).encode()).hexdigest()[:32]
        if key not in self._known:
            machine, launch = self.target.machines[0], (argument_block(step), 1)
            found = count_instructions(
                step.kernel, code, self.target, machine, [launch], loads=False
            )
            self._known[key] = found.instructions
            self.counted += 1
        return self._known[key]

    def keep(self) -> None:
        """Write what was counted."""
        if self.counted:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._known).encode(), durable=False)
            self.counted = 0


def _number(step: Step, slot: int) -> int:
    value = step.slots[slot]
    return value if isinstance(value, int) else 0


def _with(step: Step, slot: int, value: int) -> Step:
    return replace(step, slots=(*step.slots[:slot], value, *step.slots[slot + 1 :]))


def _read(path: Path) -> dict[str, int]:
    """Counts of an earlier run; none where the file is not what it was written as."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(one, int) for one in found.values())
    return found if whole else {}


def argument_block(step: Step) -> list[Any]:
    """An argument block with memory of zeros for what a call reads and writes."""
    slots: list[Any] = list(step.slots)
    for one in operands_of(step):
        ends = [(n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True)]
        before = -sum(end for end in ends if end < 0)
        behind = sum(end for end in ends if end > 0)
        array = np.zeros(before + behind + 2 * _SLACK, np.uint8)
        slots[one.slot] = array[before:]
    unused = np.zeros(_SLACK, np.uint8)
    return [unused if isinstance(slot, At) else slot for slot in slots]


def best_block(step: Step, costs: Costs) -> Step:
    """A product of halves with the blocks of sums that take the fewest instructions."""
    if step.kernel != matmul.NAMES["half"]:
        return step
    names = [step.kernel, *(matmul.variant("half", *block) for block in matmul.VARIANTS)]
    return min((replace(step, kernel=name) for name in names), key=costs.instructions)


def tuned_step(
    network: MicroNetwork, target: Target, learning: Learning, *, kind: Kind = "half",
    fast_bytes: int = FAST_BYTES, progress: Progress | None = None,
) -> TrainingStep:  # fmt: skip
    """A training step with the tiles and blocks that take the fewest instructions.

    Args:
        fast_bytes: that a call of a convolution or of its gradients may read and write.
        progress: called with what is done, of how much, and a name.

    Raises:
        KernelError: nothing here emulates the chip.
        UnsupportedError: as of `training_step`, or no tile of a layer is small enough.
    """
    costs = Costs(target)
    two = 32 // dtype_of(kind).itemsize  # two vectors
    choices = [Tile(scratch, columns * two // 16) for scratch in _SCRATCH for columns in _COLUMNS]
    phases = [one for one in training_step(network, target, learning, kind=kind).phases]
    tiled = [name for name in dict.fromkeys(phases) if name.endswith((": forward", " gradient"))]
    steps = {
        tile: _by_phase(
            training_step(
                network, target, learning, kind=kind, tiles=dict.fromkeys(tiled, tile)
            )
        )
        for tile in choices
    }  # fmt: skip
    chosen: dict[str, Tile] = {}
    try:
        for done, name in enumerate(tiled):
            if progress is not None:
                progress(done, len(tiled), "counting instructions")
            calls = {tile: found[name] for tile, found in steps.items()}
            if any(operands_of(step) for step in calls[choices[0]]):
                chosen[name] = _best_tile(name, calls, costs, fast_bytes)
            costs.keep()
        found = training_step(network, target, learning, kind=kind, tiles=chosen)
        best = tuple(best_block(step, costs) for step in found.steps)
    finally:
        costs.keep()
    if progress is not None:
        progress(len(tiled), len(tiled), "counting instructions")
    return replace(found, steps=best)


def _by_phase(step: TrainingStep) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for name, one in zip(step.phases, step.steps, strict=True):
        found.setdefault(name, []).append(one)
    return found


def _best_tile(name: str, calls: dict[Tile, list[Step]], costs: Costs, fast_bytes: int) -> Tile:
    needed = {tile: max(map(touched_bytes, steps)) for tile, steps in calls.items()}
    fit = [tile for tile, n_bytes in needed.items() if n_bytes <= fast_bytes]
    if not fit:
        raise UnsupportedError(
            f"{name}: its smallest tile takes {min(needed.values())} bytes of fast memory, more "
            f"than {fast_bytes}"
        )
    return min(
        fit,
        key=lambda tile: (
            sum(costs.instructions(step) for step in calls[tile] if operands_of(step)),
            tile.scratch,
        ),
    )
