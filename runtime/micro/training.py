"""A training step of a network of real numbers, as calls of kernels: batch 1, as on a chip.

Forward, keeping what is needed backward; the gradient of the loss; backward up to the first layer
that is trained, and no further; updates by gradient descent with momentum. Only chosen weights and
biases are trained ("sparse update" of Lin et al., "On-Device Training Under 256KB Memory",
2206.15472); they lie in SRAM, all others in flash.

Of halves each trained number takes a half, a half for what is lost in rounding it, a half of
velocity if there is momentum, and, until it is updated, a half of gradient. All gradients are
looked at before anything is updated, as a step with an overflow is skipped as a whole; or each is
used as soon as it is there, and forgotten (`Learning.at_once`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.half import LOWERED, convolution, depthwise, gradients
from headrace.micro.half.convolution import bias_of, weights_of
from headrace.micro.half.machine import names_of
from headrace.micro.half.windows import WHOLE, Tile
from headrace.micro.kernels import elementwise, learning
from headrace.micro.kernels.numbers import UNBOUNDED, Kind, dtype_of
from headrace.micro.learning import Learning, check_trained
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import (
    OWN,
    Activation,
    Add,
    Concatenation,
    Convolution,
    Depthwise,
    Layer,
    MicroNetwork,
    Padding,
    Pool,
    Softmax,
    Value,
    View,
)
from headrace.micro.packing import Life
from headrace.micro.placing import lowered_in
from headrace.micro.training_state import STATE, WANTED, gradient_of, rest_of, velocity_of
from headrace.targets.target import Target

_PROBABILITIES = f"{OWN}probabilities"
SLACK = 16  # bytes behind a value that kernels may write, where it is cleared


@dataclass(frozen=True)
class TrainingStep:
    """Calls of kernels of a training step, before anything has an address.

    Attributes:
        steps: in order; `phases` says of each what it is for.
        constants: in flash.
        state: in SRAM all the time: what is trained, velocities and the loss scale, and what they
            are at first.
        values: bytes of all else in SRAM.
        given: names of values that are there at the begin: the input, and what is wanted.
        made: the name of the network's output, which is there at the end.
        dtype: of values.
    """

    steps: tuple[Step, ...]
    phases: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]
    values: Mapping[str, int]
    given: tuple[str, str]
    made: str
    dtype: np.dtype[Any]

    def lives(self) -> dict[str, tuple[Life, ...]]:
        """From which step to which bytes of SRAM are taken, by name."""
        last = len(self.steps) - 1
        found = {
            name: Life(0, -(-array.nbytes // 16) * 16, 0, last)
            for name, array in self.state.items()
        }
        for i, step in enumerate(self.steps):
            for name in names_of(step):
                if name in self.values:
                    first = 0 if name in self.given else i
                    known = found.get(name, Life(0, self.values[name], first, i))
                    found[name] = known._replace(last=i)
        found[self.made] = found[self.made]._replace(last=last)
        return {name: (life,) for name, life in found.items()}


def training_step(
    network: MicroNetwork, target: Target, learning: Learning, *, kind: Kind = "half",
    tiles: Mapping[str, Tile] | None = None,
) -> TrainingStep:  # fmt: skip
    """A training step as calls of kernels.

    Args:
        tiles: how much of a layer kernels do at a time, by phase ("NAME: forward", "NAME: weight
            gradient", "NAME: input gradient"); see `headrace.micro.autotune`.

    Raises:
        UnsupportedError: a layer has no gradient, or nothing is trained.
    """
    return _Builder(network, target, learning, kind, tiles or {}).build()


class _Builder:
    def __init__(
        self, network: MicroNetwork, target: Target, how: Learning, kind: Kind,
        tiles: Mapping[str, Tile],
    ) -> None:  # fmt: skip
        self.network, self.target, self.how = network, target, how
        self.kind, self.tiles = kind, tiles
        self.size = dtype_of(kind).itemsize
        self.steps: list[Step] = []
        self.phases: list[str] = []
        self.constants: dict[str, np.ndarray] = {}
        self.state: dict[str, np.ndarray] = {STATE: learning.first_state(how.scale)}
        self.values: dict[str, int] = {}
        self.alias: dict[str, str] = {}
        # Of each value: where its gradient is, and whether nobody else has it.
        self.found: dict[str, tuple[At, bool]] = {}
        self.late: list[tuple[str, At]] = []  # parameters, and their gradients
        self._check()

    def _check(self) -> None:
        has_codes = any(value.codes is not None for value in self.network.values())
        if has_codes or len(self.network.inputs) != 1:
            raise UnsupportedError("networks of real numbers with one input are trained")
        (output, *more), last = self.network.outputs, self.network.layers[-1]
        if more or output.value.name != last.makes.name:
            raise UnsupportedError("networks whose last layer makes their one output are trained")
        check_trained(self.network, self.how.trained)
        for layer in self.network.layers:
            if layer.name in self.how.trained and depthwise.dense(layer) is not layer:
                raise UnsupportedError(
                    f"{layer.name}: it makes several channels of one: not trained"
                )

    # ---- parts ------------------------------------------------------------------------------

    def _add(self, phase: str, part: Lowered) -> None:
        scratch = f"{SCRATCH} {len(self.steps)}"
        if part.scratch_bytes:
            self.values[scratch] = part.scratch_bytes
        for name, array in part.constants.items():
            if name not in self.state:
                self.constants.setdefault(name, array)
        names = {**self.alias, SCRATCH: scratch}
        for step in part.steps:
            slots = tuple(
                At(names.get(slot.name, slot.name), slot.offset) if isinstance(slot, At) else slot
                for slot in step.slots
            )
            self.steps.append(Step(step.kernel, slots))
            self.phases.append(phase)

    def _room(self, name: str, elements: int) -> At:
        self.values[name] = elements * self.size + SLACK
        return At(name)

    def _elementwise(
        self, phase: str, operation: str, a: At, b: At, c: At, n: int,
        constants: tuple[float, float] = UNBOUNDED,
    ) -> None:  # fmt: skip
        step = Step(elementwise.name_of(operation, self.kind), (a, b, c, n, *constants))
        self._add(phase, Lowered((step,)))

    def _lowered(self, layer: Layer) -> Lowered:
        tile = self.tiles.get(f"{layer.name}: forward", WHOLE)
        more = {"tile": tile} if isinstance(layer, Convolution | Depthwise) else {}
        if isinstance(layer, Concatenation | Padding):
            return lowered_in(layer, self.target, wide=self.kind == "single")
        return LOWERED[type(layer)](layer, self.target, kind=self.kind, **more)

    # ---- forward ----------------------------------------------------------------------------

    def build(self) -> TrainingStep:
        given, layers = self.network.inputs[0].value, [*map(_plain, self.network.layers)]
        self._room(given.name, given.elements)
        made = self.network.outputs[0].value
        if self.how.loss == "cross entropy" and not isinstance(layers[-1], Softmax):
            made = Value(_PROBABILITIES, layers[-1].makes.shape, None)
            layers.append(Softmax(_PROBABILITIES, (layers[-1].makes,), made))
        for layer in layers:
            self._keep_trained(layer)
            if isinstance(layer, View):
                read = layer.reads[0].name
                self.alias[layer.makes.name] = self.alias.get(read, read)
                continue
            self._room(layer.makes.name, layer.makes.elements)
            self._add(f"{layer.name}: forward", self._lowered(layer))
        self._backward(layers, made)
        self._update()
        names = [*self.values, *self.constants, *self.state, *self.alias]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UnsupportedError(
                f"{min(twice)}: a value has the name of a layer's weights or bias; rename it"
            )
        name = self.alias.get(made.name, made.name)
        return TrainingStep(
            tuple(self.steps), tuple(self.phases), self.constants, self.state, self.values,
            (given.name, WANTED), name, dtype_of(self.kind),
        )  # fmt: skip

    def _keep_trained(self, layer: Layer) -> None:
        what = self.how.trained.get(layer.name)
        if what is None:
            return
        assert isinstance(layer, Convolution | Depthwise)
        exact = _parameters(layer, "single")
        for name, is_trained in ((weights_of(layer), what.weights), (bias_of(layer), what.bias)):
            if is_trained:
                stored = exact[name].astype(dtype_of(self.kind))
                self.state[name] = stored
                if self.kind == "half":
                    rest = exact[name] - stored.astype(np.float32)
                    self.state[rest_of(name)] = rest.astype(np.float16)
                if self.how.momentum:
                    self.state[velocity_of(name)] = np.zeros_like(stored)

    # ---- backward ---------------------------------------------------------------------------

    def _backward(self, layers: Sequence[Layer], made: Value) -> None:
        wanted = self._room(WANTED, made.elements)
        logits = layers[-1].reads[0] if self.how.loss == "cross entropy" else made
        factor = 1.0 if self.how.loss == "cross entropy" else 1.0 / made.elements
        if isinstance(layers[-1], Softmax) and self.how.loss == "cross entropy":
            factor = layers[-1].beta
            layers = layers[:-1]
        dy = self._room(gradient_of(logits.name), made.elements)
        block = (At(made.name), wanted, dy, made.elements, At(STATE), factor)
        self._add("loss", Lowered((Step(learning.LOSS[self.kind], block),)))
        self.found[logits.name] = dy, True
        needs = self._needs(layers)
        for layer in reversed(layers):
            if layer.makes.name in needs and layer.makes.name in self.found:
                self._layer_backward(layer, needs)

    def _needs(self, layers: Sequence[Layer]) -> set[str]:
        """Values that something trained decides."""
        found: set[str] = set()
        for layer in layers:
            if layer.name in self.how.trained or any(v.name in found for v in layer.reads):
                found.add(layer.makes.name)
        return found

    def _layer_backward(self, layer: Layer, needs: set[str]) -> None:
        phase = f"{layer.name}: backward"
        dy, own = self.found.pop(layer.makes.name)
        x, y, n = layer.reads[0], At(layer.makes.name), layer.makes.elements
        bounds = getattr(layer, "bounds", UNBOUNDED)
        if bounds != UNBOUNDED and not isinstance(layer, View):
            to = dy if own else self._room(f"{gradient_of(layer.makes.name)}, bounded", n)
            self._elementwise(phase, "within", dy, y, to, n, bounds)
            dy, own = to, True
        if isinstance(layer, View):
            self._give(phase, x, dy, own)
        elif isinstance(layer, Add):
            for value in layer.reads:
                if value.name in needs:
                    self._give(phase, value, dy, False)
        elif isinstance(layer, Activation) and layer.kind == "identity":
            self._give(phase, x, dy, own)
        elif isinstance(layer, Pool):
            dx = self._new(x)
            part = gradients.pool_gradient(layer, self.kind, At(x.name), y, dy, dx)
            self._add(phase, part)
            self._give(phase, x, dx, True)
        elif isinstance(layer, Convolution | Depthwise):
            self._weights_backward(layer, dy)
            if x.name in needs:
                dx, weights = self._new(x), At(weights_of(layer))
                phase = f"{layer.name}: input gradient"
                tile = self.tiles.get(phase, WHOLE)
                part = gradients.input_gradient(layer, self.kind, dy, weights, dx, tile)
                if weights.name not in self.state:
                    part = replace(
                        part, constants={**part.constants, **_parameters(layer, self.kind)}
                    )
                self._add(phase, part)
                self._give(phase, x, dx, True)
        else:
            raise UnsupportedError(
                f"{layer.name}: there is no gradient of {type(layer).__name__}; train only layers "
                "behind it"
            )
        if self.how.at_once:
            # Not before: what it reads gets its gradient from the weights as they were.
            self._updates()

    def _new(self, value: Value) -> At:
        name = gradient_of(value.name)
        while name in self.values:
            name += ", again"
        return self._room(name, value.elements)

    def _give(self, phase: str, value: Value, dx: At, own: bool) -> None:
        """A value's gradient, or more of it."""
        if value.name not in self.found:
            self.found[value.name] = dx, own
            return
        known, known_own = self.found[value.name]
        to = dx if own else known if known_own else self._new(value)
        self._elementwise(phase, "add", dx, known, to, value.elements)
        self.found[value.name] = to, True

    def _weights_backward(self, layer: Convolution | Depthwise, dy: At) -> None:
        what = self.how.trained.get(layer.name)
        if what is None:
            return
        x = At(layer.reads[0].name)
        if what.weights:
            name = weights_of(layer)
            dw = self._room(gradient_of(name), self.state[name].size)
            phase = f"{layer.name}: weight gradient"
            tile = self.tiles.get(phase, WHOLE)
            self._add(phase, gradients.weight_gradient(layer, self.kind, x, dy, dw, tile))
            self._parameter(name, dw)
        if what.bias:
            name = bias_of(layer)
            db = self._room(gradient_of(name), self.state[name].size)
            self._add(
                f"{layer.name}: bias gradient", gradients.bias_gradient(layer, self.kind, dy, db)
            )
            self._parameter(name, db)

    # ---- update -----------------------------------------------------------------------------

    def _parameter(self, name: str, gradient: At) -> None:
        self.late.append((name, gradient))
        block = gradient, self.state[name].size, At(STATE)
        self._add("check", Lowered((Step(learning.FINITE[self.kind], block),)))

    def _updates(self) -> None:
        for name, gradient in self.late:
            velocity = At(velocity_of(name)) if self.how.momentum else gradient
            rest = At(rest_of(name)) if self.kind == "half" else At(name)
            block = (
                At(name), rest, velocity, gradient, self.state[name].size, At(STATE),
                -self.how.rate, self.how.momentum,
            )  # fmt: skip
            self._add("update", Lowered((Step(learning.UPDATE[self.kind], block),)))
        self.late = []

    def _update(self) -> None:
        self._updates()
        block = At(STATE), float(self.how.good_steps or math.inf)
        self._add("update", Lowered((Step(learning.RESCALE, block),)))


def _plain(layer: Layer) -> Layer:
    """Convolutions in the place of what has no kernels of its own."""
    return depthwise.dense(layer)


def _parameters(layer: Convolution | Depthwise, kind: Kind) -> dict[str, np.ndarray]:
    if isinstance(layer, Convolution):
        return convolution.parameters(layer, kind)
    return depthwise.parameters(layer, kind)
