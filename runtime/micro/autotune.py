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
from collections.abc import Callable, Mapping, Sequence
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
from headrace.micro.learning import Learning
from headrace.micro.lowered import At, Step
from headrace.micro.network import MicroNetwork
from headrace.micro.training import TrainingStep, training_step
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import count_instructions
from headrace.targets.target import Target

FAST_BYTES = 64 << 10  # PULP's L1
COUNTING = "counting instructions"
_SCRATCH = (4 << 10, 8 << 10, 16 << 10, 32 << 10)
_COLUMNS = (0, 32, 16)
_SLACK = 64  # bytes beside what a call reads
_ROWS, _PERIOD = 5, 12  # a product's rows of a line: blocks have 1, 2, 3, 4 or 6

# Products of halves by their blocks of sums, which take the same arguments; the first is the usual.
BLOCKS = (matmul.NAMES["half"], *(matmul.variant("half", *block) for block in matmul.VARIANTS))

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
    if step.kernel != BLOCKS[0]:
        return step
    return min((replace(step, kernel=name) for name in BLOCKS), key=costs.instructions)


class Tuner:
    """Tiles and blocks of a training step, by counted instructions.

    Args:
        fast_bytes: that a call of a convolution or of its gradients may read and write; None: as
            many as it wants.
        progress: called with what is done, of how much, and a name.

    Raises:
        KernelError: nothing here emulates the chip.
        UnsupportedError: as of `training_step`, or no tile of a layer is small enough.
    """

    def __init__(
        self, network: MicroNetwork, target: Target, learning: Learning, kind: Kind = "half",
        fast_bytes: int | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._of = network, target, learning
        self._kind, self._costs = kind, Costs(target)
        two = 32 // dtype_of(kind).itemsize  # two vectors
        tiles = [Tile(scratch, columns * two // 16) for scratch in _SCRATCH for columns in _COLUMNS]
        phases = dict.fromkeys(self.step({}).phases)
        names = [one for one in phases if one.endswith((": forward", " gradient"))]
        calls = {tile: _by_phase(self.step(dict.fromkeys(names, tile))) for tile in tiles}
        # Of each phase: tiles with their instructions, and bytes of scratch.
        self._options: dict[str, dict[Tile, int]] = {}
        try:
            for done, name in enumerate(names):
                if progress is not None:
                    progress(done, len(names), COUNTING)
                if any(operands_of(step) for step in calls[tiles[0]][name]):
                    of_phase = {tile: found[name] for tile, found in calls.items()}
                    self._options[name] = self._costs_of(name, of_phase, fast_bytes)
                self._costs.keep()
        finally:
            self._costs.keep()
        if progress is not None:
            progress(len(names), len(names), COUNTING)

    def _costs_of(
        self, name: str, calls: dict[Tile, list[Step]], fast_bytes: int | None
    ) -> dict[Tile, int]:
        if fast_bytes is not None:
            needed = {tile: max(map(touched_bytes, steps)) for tile, steps in calls.items()}
            if min(needed.values()) > fast_bytes:
                raise UnsupportedError(
                    f"{name}: its smallest tile takes {min(needed.values())} bytes of fast memory, "
                    f"more than {fast_bytes}"
                )
            calls = {tile: calls[tile] for tile, n in needed.items() if n <= fast_bytes}
        return {
            tile: sum(self._costs.instructions(step) for step in steps if operands_of(step))
            for tile, steps in calls.items()
        }

    def step(self, tiles: Mapping[str, Tile]) -> TrainingStep:
        """The step with these tiles."""
        network, target, learning = self._of
        return training_step(network, target, learning, kind=self._kind, tiles=tiles)

    def tiles(self, most: Mapping[str, int]) -> dict[str, Tile]:
        """The tiles with the fewest instructions, by phase.

        Args:
            most: bytes of a tile's scratch, by phase.
        """
        found = {}
        for name, costs in self._options.items():
            fit = [one for one in costs if one.scratch <= most.get(name, one.scratch)]
            found[name] = min(fit, key=lambda tile: (costs[tile], tile.scratch))
        return found

    def smaller(self, name: str, scratch: int) -> int | None:
        """The next smaller scratch that a phase can do with; None: there is none."""
        options = self._options.get(name, ())
        return max((one.scratch for one in options if one.scratch < scratch), default=None)

    def blocks(self, step: TrainingStep) -> tuple[str, ...]:
        """Kernels of a step, with the blocks of sums that take the fewest instructions."""
        try:
            return tuple(best_block(one, self._costs).kernel for one in step.steps)
        finally:
            self._costs.keep()


def tuned_step(
    network: MicroNetwork, target: Target, learning: Learning, *, kind: Kind = "half",
    fast_bytes: int | None = FAST_BYTES, progress: Progress | None = None,
) -> TrainingStep:  # fmt: skip
    """A training step with the tiles and blocks that take the fewest instructions.

    Args:
        fast_bytes, progress: as of `Tuner`.

    Raises:
        KernelError, UnsupportedError: as of `Tuner`.
    """
    tuner = Tuner(network, target, learning, kind, fast_bytes, progress)
    step = tuner.step(tuner.tiles({}))
    return with_kernels(step, tuner.blocks(step))


def with_kernels(step: TrainingStep, kernels: Sequence[str]) -> TrainingStep:
    """A step that calls these kernels in the place of its own, which take the same arguments."""
    pairs = zip(step.steps, kernels, strict=True)
    return replace(step, steps=tuple(replace(one, kernel=name) for one, name in pairs))


def _by_phase(step: TrainingStep) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for name, one in zip(step.phases, step.steps, strict=True):
        found.setdefault(name, []).append(one)
    return found
