"""Which layers of a network run by rows, so that it fits in a chip's SRAM.

Between two layers where one value alone is there, a network can be cut. Each part runs whole or by
rows (`headrace.micro.jobs`), and the arena is the most that a part takes. Of all ways to cut, those
are looked for that fit with the fewest calls of kernels, or, where none fits, that take least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from headrace.errors import BudgetError, UnsupportedError
from headrace.micro.jobs import ByRows, can_run_by_rows
from headrace.micro.lowered import Lowered
from headrace.micro.network import MicroNetwork, Port, Value
from headrace.micro.packing import packed
from headrace.micro.plan import MicroPlan, placed
from headrace.micro.schedule import Schedule
from headrace.micro.stack import stack_bytes
from headrace.targets.target import Target

Progress = Callable[[int, int, str], None]
_LARGER = 4  # parts in a row that take too much before longer ones are not tried
_HEIGHTS = (1, 2, 4, 8)  # rows that the last layer of a part makes at a time


@dataclass(frozen=True)
class _Part:
    """Layers from one cut to another.

    Attributes:
        n_bytes: of SRAM.
        calls: of kernels.
        by_rows: how it runs, if not whole.
    """

    n_bytes: int
    calls: int
    by_rows: ByRows | None


def plan_within(
    network: MicroNetwork, target: Target, sram: int | None, progress: Progress | None = None
) -> MicroPlan:
    """Plan a network for a chip: all layers whole, if that fits.

    Args:
        sram: bytes for the arena and the stack; None: as many as whole layers take.
        progress: called with (done, total, what) while parts are tried.

    Raises:
        BudgetError: no way takes so little; it says how much the least takes.
        KernelError: a kernel does not compile for the chip.
        UnsupportedError: there are no kernels for a layer.
    """
    known: dict[object, Lowered] = {}
    whole = placed(Schedule(network, target, known=known), ())
    if sram is None or _taken(whole) <= sram:
        return whole
    parts = _parts(network, target, known, whole.arena_bytes, progress)
    count = len(network.layers)

    def made(bound: int) -> MicroPlan | None:
        way = _cheapest(parts, bound, count)
        if way is not None and way not in tried:
            tried[way] = placed(Schedule(network, target, way, known), way)
        return None if way is None else tried[way]

    # A whole plan may take more than its parts, as neighbours share a piece: then less is asked of
    # them; and all ways are looked at that may take less than the best so far.
    tried: dict[tuple[ByRows, ...], MicroPlan] = {(): whole}
    first = made(sram - stack_bytes(whole.program))
    if first is not None and _taken(first) <= sram:
        return first
    for bound in sorted({part.n_bytes for options in parts.values() for part in options}):
        if bound >= min(one.arena_bytes for one in tried.values()):
            break
        made(bound)
    fitting = [one for one in tried.values() if _taken(one) <= sram]
    if fitting:
        return min(fitting, key=lambda one: len(one.calls))
    least = min(tried.values(), key=_taken)
    needed = _taken(least)
    raise BudgetError(
        f"{network.name} does not fit in {sram:,} bytes of SRAM on {target.name}: it takes "
        f"{needed:,} at least, of which the stack is {needed - least.arena_bytes:,} "
        f"({_taken(whole):,} with whole layers); allow that (`sram`), or take a network with "
        "smaller images or fewer channels",
        needed_bytes=needed,
    )


def _taken(plan: MicroPlan) -> int:
    return plan.arena_bytes + stack_bytes(plan.program)


def _cuts(network: MicroNetwork) -> dict[int, Value]:
    """Values that alone are there in front of a layer, by the layer's place."""
    last, there = network.last_reads(), [port.value for port in network.inputs]
    found = {}
    for i, layer in enumerate(network.layers):
        there = [value for value in there if last.get(value.name, -1) >= i]
        if len(there) == 1:
            found[i] = there[0]
        there.append(layer.makes)
    return found


def _parts(
    network: MicroNetwork, target: Target, known: dict[object, Lowered], most: int,
    progress: Progress | None,
) -> dict[tuple[int, int], list[_Part]]:  # fmt: skip
    """Parts by their first layer and the one behind the last, of those that take at most `most`."""
    cuts = _cuts(network)
    ends = [*(i for i in cuts if i > 0), len(network.layers)]
    found: dict[tuple[int, int], list[_Part]] = {}
    for done, first in enumerate(cuts):
        if progress is not None:
            progress(done, len(cuts), "parts")
        larger = 0  # parts in a row that take more
        for last in (end for end in ends if end > first):
            options = list(_ways(network, target, known, first, last, cuts, most))
            larger = 0 if options else larger + 1
            if larger > _LARGER:
                break
            if options:
                found[first, last] = options
    return found


def _ways(
    network: MicroNetwork, target: Target, known: dict[object, Lowered], first: int, last: int,
    cuts: dict[int, Value], most: int,
) -> Iterator[_Part]:  # fmt: skip
    layers = network.layers[first:last]
    given, made = cuts[first], layers[-1].makes
    there = {given.name, *(layer.makes.name for layer in layers)}
    outputs = [port for port in network.outputs if port.value.name in there]
    part = replace(
        network, layers=layers, inputs=(Port("", (), given),),
        outputs=(Port("", (), made), *outputs),
    )  # fmt: skip
    whole = last - first == 1 or not any(first < cut < last for cut in cuts)
    if whole:
        schedule = Schedule(part, target, known=known)
        yield _Part(packed(schedule.pieces(), tries=0).n_bytes, _calls(schedule), None)
    if not can_run_by_rows(layers):
        return
    for height in _HEIGHTS:
        if height > max(1, made.image[0] // 2):
            break
        rows = ByRows(0, len(layers), height)
        try:
            schedule = Schedule(part, target, (rows,), known)
        except UnsupportedError:
            return
        n_bytes = packed(schedule.pieces(), tries=0).n_bytes
        if n_bytes > most:
            return
        yield _Part(n_bytes, _calls(schedule), ByRows(first, last, height))


def _calls(schedule: Schedule) -> int:
    return sum(len(part.steps) for _, part in schedule.jobs)


def _cheapest(
    parts: dict[tuple[int, int], list[_Part]], bound: int, count: int
) -> tuple[ByRows, ...] | None:
    """The way with the fewest calls of which each part is within a bound; None: there is none."""
    best: dict[int, tuple[int, tuple[ByRows, ...]]] = {0: (0, ())}
    for first, last in sorted(parts):
        if first not in best:
            continue
        for part in parts[first, last]:
            if part.n_bytes > bound:
                continue
            calls, way = best[first]
            calls += part.calls
            way = way if part.by_rows is None else (*way, part.by_rows)
            if last not in best or calls < best[last][0]:
                best[last] = (calls, way)
    return best[count][1] if count in best else None
