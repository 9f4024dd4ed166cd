"""Jobs of a network in order, and the pieces of SRAM that they take."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import UnsupportedError
from headrace.micro.arithmetic import lowered
from headrace.micro.jobs import ByRows, Job, can_run_by_rows, jobs_by_rows
from headrace.micro.kernels import move
from headrace.micro.lowered import SCRATCH, At, Lowered
from headrace.micro.network import OWN, Layer, MicroNetwork, View
from headrace.micro.packing import ALIGNED, Life, Lives
from headrace.targets.target import Target

_ROWS = f"{OWN}rows"  # behind a value's name: some of its rows


def scratch_of(job: Job) -> str:
    """The piece that a job has for itself; a layer's parts have one."""
    return f"{SCRATCH} of layer {job.index}"


class Schedule:
    """Jobs of a network in order, and what of SRAM they take when.

    Args:
        network, target: of the plan.
        by_rows: layers that run by rows, in order.
        known: layers and parts of them as calls of kernels, from other schedules for the same
            target; more comes to it.

    Attributes:
        jobs: with what each of them is on the chip.
        bases: the piece of each value, or of some rows of it, and where in that it lies.

    Raises:
        UnsupportedError: there are no kernels for a layer, or layers cannot run by rows.
    """

    def __init__(
        self, network: MicroNetwork, target: Target, by_rows: Sequence[ByRows] = (),
        known: dict[object, Lowered] | None = None,
    ) -> None:  # fmt: skip
        self.network, self.target = network, target
        self._known = {} if known is None else known
        self.jobs: list[tuple[Job, Lowered]] = []
        self.bases = {port.value.name: At(port.value.name) for port in network.inputs}
        self._sizes = {value.name: value.n_bytes for value in network.values()}
        self._last = network.last_reads()
        self._times = {name: [0, 0] for name in self.bases}
        starts, at = {one.first: one for one in by_rows}, 0
        while at < len(network.layers):
            if at in starts:
                self._add_rows(starts[at])
                at = starts[at].last
            else:
                self._add_whole(at)
                at += 1
        for port in network.outputs:
            self._times[port.value.name][1] = len(self.jobs)

    def pieces(self) -> dict[str, Lives]:
        """What is taken of SRAM when, by piece; steps are jobs."""
        found: dict[str, list[Life]] = {}
        for name, base in self.bases.items():
            life = Life(base.offset, base.offset + self._sizes[name], *self._times[name])
            found.setdefault(base.name, []).append(life)
        for step, (job, part) in enumerate(self.jobs):
            if part.scratch_bytes:
                own = Life(0, part.scratch_bytes, step, step)
                found.setdefault(scratch_of(job), []).append(own)
        return {name: tuple(lives) for name, lives in found.items()}

    def _lowered(self, layer: Layer) -> Lowered:
        shapes = (*(value.shape for value in layer.reads), layer.makes.shape)
        key = layer.name, getattr(layer, "windows", None), shapes
        if key not in self._known:
            self._known[key] = lowered(layer, self.target)
        return self._known[key]

    def _add(self, job: Job, part: Lowered) -> None:
        step = len(self.jobs)
        for at in job.at.values():
            self._times.setdefault(at.name, [step, step])[1] = step
        self.jobs.append((job, part))

    def _add_whole(self, index: int) -> None:
        layer = self.network.layers[index]
        part, name = self._lowered(layer), layer.makes.name
        self.bases[name] = At(name)
        if isinstance(layer, View):
            self.bases[name] = self.bases[layer.reads[0].name]
        for read in part.over:
            twice = sum(self.bases[v.name].name == self.bases[read].name for v in layer.reads) > 1
            if not twice and not self._is_busy(read, index):
                self.bases[name] = self.bases[read]
                break
        values = (*layer.reads, layer.makes)
        self._add(Job(layer, {value.name: At(value.name) for value in values}, index), part)

    def _is_busy(self, name: str, last: int) -> bool:
        """Whether something in a value's piece is read behind a layer."""
        piece = self.bases[name].name
        return any(
            base.name == piece and self._last.get(other, -1) > last
            for other, base in self.bases.items()
        )

    def _add_rows(self, of: ByRows) -> None:
        layers = self.network.layers[of.first : of.last]
        between = [layer.makes.name for layer in layers[:-1]]
        if not can_run_by_rows(layers) or any(
            self._last.get(name, of.last) >= of.last for name in between
        ):
            raise UnsupportedError(
                f"layers {of.first} to {of.last - 1} cannot run by rows: they have to be layers of "
                "images that read the first one's input or each other, and nobody else them"
            )
        jobs, sizes, above = jobs_by_rows(layers, of.first, of.rows)
        given, result = layers[0].reads[0].name, layers[-1].makes.name
        for name, n_bytes in sizes.items():
            self.bases[name + _ROWS] = At(name + _ROWS)
            self._sizes[name + _ROWS] = n_bytes
        self.bases[result] = At(result)
        # A larger one would begin far in front, and so would what lies before it in the piece.
        fits = self._sizes[result] <= self._sizes[given]
        if fits and not self._is_busy(given, of.last - 1):
            self._lay_over(result, given, -(-above // ALIGNED) * ALIGNED)
        for job in jobs:
            at = {
                name: At(one.name + _ROWS if one.name in sizes else one.name, one.offset)
                for name, one in job.at.items()
            }
            placed = Job(job.layer, at, job.index, job.moved_bytes)
            part = move.lowered(job.moved_bytes) if job.layer is None else self._lowered(job.layer)
            self._add(placed, part)

    def _lay_over(self, result: str, given: str, above: int) -> None:
        """Let a result begin so many bytes in front of what it is made of."""
        base = self.bases[given]
        short = max(0, above - base.offset)  # all else in the piece goes up by that
        for name, other in self.bases.items():
            if other.name == base.name:
                self.bases[name] = At(other.name, other.offset + short)
        self.bases[result] = At(base.name, base.offset + short - above)
