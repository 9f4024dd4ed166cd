"""A network on a chip: the calls of kernels in order, and where everything lies.

Values and what layers need for themselves share one piece of SRAM, the arena; a value has its place
from the layer that makes it to the last one that reads it, and a layer may write its result over
what it reads, where its kernels can and nobody else reads that. Constants and argument blocks are
in flash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.errors import UnsupportedError
from headrace.micro.jobs import ByRows
from headrace.micro.lowered import SCRATCH, At, Lowered
from headrace.micro.network import MicroNetwork
from headrace.micro.packing import Packing, packed
from headrace.micro.ports import about
from headrace.micro.program import (
    ARENA,
    RUN,
    Call,
    ConstantPool,
    PlacedArray,
    Program,
    call_of,
)
from headrace.micro.schedule import Schedule, scratch_of
from headrace.targets.target import Target


@dataclass(frozen=True)
class MicroPlan:
    """A network on a chip.

    Attributes:
        calls: in order.
        constants: all of them, in one piece.
        packing: of what lies in the arena.
        places: of inputs and outputs in the arena, by the values' names.
        by_rows: layers that run by rows.
    """

    network: MicroNetwork
    target: Target
    calls: tuple[Call, ...]
    constants: bytes
    packing: Packing
    places: dict[str, int]
    by_rows: tuple[ByRows, ...] = ()

    @property
    def arena_bytes(self) -> int:
        """SRAM for values and what layers need for themselves."""
        return self.packing.n_bytes

    @property
    def program(self) -> Program:
        """The same for a linker."""
        ports = [
            [
                PlacedArray(
                    p.value.name,
                    self.places[p.value.name],
                    p.value.shape,
                    p.value.dtype,
                    about(p),
                )
                for p in of
            ]
            for of in (self.network.inputs, self.network.outputs)
        ]
        return Program(
            self.network.name, self.target, {RUN: self.calls}, self.constants, (),
            self.arena_bytes, tuple(ports[0]), tuple(ports[1]),
        )  # fmt: skip


def plan_network(
    network: MicroNetwork, target: Target, by_rows: Sequence[ByRows] = ()
) -> MicroPlan:
    """Plan a network for a chip.

    Args:
        by_rows: layers that run by rows, in order; see `headrace.micro.jobs`.

    Raises:
        UnsupportedError: there are no kernels for a layer, or layers cannot run by rows.
    """
    return placed(Schedule(network, target, by_rows), tuple(by_rows))


def placed(schedule: Schedule, by_rows: tuple[ByRows, ...]) -> MicroPlan:
    """The plan of a schedule."""
    packing = packed(schedule.pieces())
    bases = {
        name: At(ARENA, packing.offsets[at.name] + at.offset) for name, at in schedule.bases.items()
    }
    constants, at = _constants(part for _, part in schedule.jobs)
    calls = []
    for job, part in schedule.jobs:
        known = at[id(part)]
        own = {name: bases[at.name].behind(at.offset) for name, at in job.at.items()}
        if part.scratch_bytes:
            own[SCRATCH] = At(ARENA, packing.offsets[scratch_of(job)])
        if twice := own.keys() & known.keys():
            raise UnsupportedError(
                f"{min(twice)}: a value has the name of a layer's weights or bias; rename it"
            )
        calls += [call_of(step, {**own, **known}, job.index) for step in part.steps]
    network = schedule.network
    ports = {port.value.name for port in (*network.inputs, *network.outputs)}
    places = {name: at.offset for name, at in bases.items() if name in ports}
    return MicroPlan(network, schedule.target, tuple(calls), constants, packing, places, by_rows)


def _constants(parts: Iterable[Lowered]) -> tuple[bytes, Mapping[int, Mapping[str, At]]]:
    """All constants in one piece, and where each part has its own."""
    found: dict[int, Mapping[str, At]] = {}
    pool = ConstantPool()
    for part in parts:
        if id(part) not in found:
            found[id(part)] = {name: pool.add(array) for name, array in part.constants.items()}
    return pool.content(), found
