"""A training step that fits in a chip's SRAM and takes the fewest instructions there.

What was found is kept in the cache, by all that decides it: the network, what of it learns and how,
the chip and its kernels, and the SRAM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.atomic_file import write_whole
from headrace.errors import BudgetError
from headrace.folders import cache_root
from headrace.micro.autotune import BLOCKS, Progress, Tuner, with_kernels
from headrace.micro.half.windows import Tile
from headrace.micro.kernels.numbers import Kind
from headrace.micro.kernels.table import kernel_table
from headrace.micro.learning import Learning
from headrace.micro.network import MicroNetwork
from headrace.micro.program import TRAIN
from headrace.micro.stack import stack_bytes
from headrace.micro.training import TrainingStep, training_step
from headrace.micro.training_plan import TrainingPlan, plan_training
from headrace.sizes import format_size
from headrace.targets.emulation.count import NO_PLUGIN, plugin
from headrace.targets.emulation.machines import why_not
from headrace.targets.keys import COMPILER, kernel_key
from headrace.targets.target import Target


@dataclass(frozen=True)
class Tuned:
    """A training step on a chip.

    Attributes:
        not_counted: why its tiles were not chosen by instructions; None: they were.
    """

    plan: TrainingPlan
    not_counted: str | None = None


def tuned_plan(
    network: MicroNetwork, target: Target, learning: Learning, sram: int | None = None, *,
    kind: Kind = "half", progress: Progress | None = None,
) -> Tuned:  # fmt: skip
    """Plan a training step for a chip.

    Args:
        sram: bytes for the arena and the stack; None: as many as the fastest step takes.
        progress: called with (done, total, what) while instructions are counted.

    Raises:
        BudgetError: it takes more; it says how much.
        KernelError: a kernel does not compile for the chip.
        UnsupportedError: as of `training_step`.
    """
    plain = training_step(network, target, learning, kind=kind)
    missing = why_not(target.machines[0]) or (NO_PLUGIN if plugin() is None else None)
    if missing is not None:
        plan = plan_training(network, target, plain)
        _check(plan, sram)
        return Tuned(plan, missing)
    path = cache_root() / "micro-tuned" / f"{target.name}-{_key(plain, target, sram)}.json"
    if (known := _known(path)) is not None:
        step = training_step(network, target, learning, kind=kind, tiles=known[0])
        if _may_call(step, known[1]):
            plan = plan_training(network, target, with_kernels(step, known[1]))
            _check(plan, sram)
            return Tuned(plan)
    tuner = Tuner(network, target, learning, kind, progress=progress)
    plan, tiles = _searched(network, target, tuner, sram)
    kernels = [call.kernel for call in plan.program.functions[TRAIN]]
    _check(plan, sram)
    kept = {name: [tile.scratch, tile.columns] for name, tile in tiles.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"tiles": kept, "kernels": kernels}).encode(), durable=False)
    return Tuned(plan)


def _taken(plan: TrainingPlan) -> int:
    return plan.program.arena_bytes + stack_bytes(plan.program)


def _check(plan: TrainingPlan, sram: int | None) -> None:
    if sram is not None and (needed := _taken(plan)) > sram:
        stack = needed - plan.program.arena_bytes
        raise BudgetError(
            f"{plan.program.name} does not learn in {format_size(sram)} of SRAM on "
            f"{plan.program.target.name}: values, gradients and what is trained take "
            f"{format_size(needed)}, of which the stack is {format_size(stack)}; allow that, train "
            "less, or update at once",
            needed_bytes=needed,
        )


def _searched(
    network: MicroNetwork, target: Target, tuner: Tuner, sram: int | None
) -> tuple[TrainingPlan, dict[str, Tile]]:
    """The step with the fewest instructions that fits, as far as it is found: where the most SRAM
    is taken, smaller tiles are taken one after the other. Else the one that takes least."""
    most: dict[str, int] = {}
    room, found = None, list[tuple[int, TrainingPlan, dict[str, Tile]]]()
    while True:
        tiles = tuner.tiles(most)
        step = tuner.step(tiles)
        alive = _alive(step)
        if room is None or max(alive) <= room:
            plan = plan_training(network, target, with_kernels(step, tuner.blocks(step)))
            needed = _taken(plan)
            found.append((needed, plan, tiles))
            if sram is None or needed <= sram:
                return plan, tiles
            room = sram - needed + plan.program.arena_bytes
        smaller = next(_smaller(step, alive, tiles, tuner, room), None)
        if smaller is None:
            plan = plan_training(network, target, with_kernels(step, tuner.blocks(step)))
            found.append((_taken(plan), plan, tiles))
            return min(found, key=lambda one: one[0])[1:]
        most |= smaller


def _alive(step: TrainingStep) -> list[int]:
    """Bytes that are taken at each call."""
    found = [0] * len(step.steps)
    for lives in step.lives().values():
        for life in lives:
            for i in range(life.first, life.last + 1):
                found[i] += life.end - life.begin
    return found


def _smaller(
    step: TrainingStep, alive: list[int], tiles: Mapping[str, Tile], tuner: Tuner, room: int
) -> Iterator[dict[str, int]]:
    """Less scratch for a phase, of those first that take most; none where that is of no use."""
    for i in sorted(range(len(alive)), key=lambda i: -alive[i]):
        name = step.phases[i]
        scratch = tuner.smaller(name, tiles[name].scratch) if name in tiles else None
        if scratch is not None:
            yield {name: scratch}
        elif alive[i] > room:
            return


def _key(step: TrainingStep, target: Target, sram: int | None) -> str:
    """Of all that decides what is found; numbers that are computed with do not."""
    table, names = kernel_table(), {*(one.kernel for one in step.steps), *BLOCKS}
    kernels = [kernel_key(table[name], target, *COMPILER) for name in sorted(names)]
    calls = [
        (one.kernel, *(slot for slot in one.slots if not isinstance(slot, float)))
        for one in step.steps
    ]
    return hashlib.sha256(repr((kernels, calls, step.phases, sram)).encode()).hexdigest()[:32]


def _known(path: Path) -> tuple[dict[str, Tile], list[str]] | None:
    """Tiles and kernels of an earlier search; None where the file is not what it was written as."""
    try:
        found = json.loads(path.read_bytes())
        tiles = {name: Tile(*map(int, pair)) for name, pair in found["tiles"].items()}
        return tiles, [str(name) for name in found["kernels"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _may_call(step: TrainingStep, kernels: Sequence[str]) -> bool:
    """Whether these are kernels of the step's calls, but for blocks of sums."""
    return len(kernels) == len(step.steps) and all(
        name == one.kernel or (one.kernel == BLOCKS[0] and name in BLOCKS)
        for one, name in zip(step.steps, kernels, strict=True)
    )
