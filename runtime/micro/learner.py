"""A network that learns on an emulated chip; what it learned stays from call to call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.micro.emulate import Emulated, Used, total
from headrace.micro.kernels.learning import skipped_of
from headrace.micro.learning import Learning
from headrace.micro.network import MicroNetwork
from headrace.micro.program import RUN, TRAIN
from headrace.micro.training_plan import TrainingPlan
from headrace.micro.training_state import STATE, learned
from headrace.targets.emulation.count import FunctionCounts

Progress = Callable[[int, int], None]
_IMAGE = 1 << 20  # bytes of inputs and outputs that go to the chip at once
_STEPS = 128  # at once, so that something is seen of long lessons


@dataclass(frozen=True)
class Lesson:
    """What became of training steps.

    Attributes:
        outputs: of each step, before its update: [steps, *shape of the output].
        loss: the mean of all steps'.
        skipped: steps that changed nothing, as a gradient was not finite.
        scale: of the loss, behind them.
    """

    outputs: np.ndarray
    loss: float
    skipped: int
    scale: float


class Learner:
    """A network that learns on an emulated chip; a context manager.

    Args:
        network: what learns.
        learning: how, as `plan` was made.
        plan: of the training step.

    Raises:
        KernelError: nothing here emulates the chip.
    """

    def __init__(self, network: MicroNetwork, learning: Learning, plan: TrainingPlan) -> None:
        self._network, self._learning, self.plan = network, learning, plan
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-micro-")
        self._emulated = Emulated(plan.program, self._folder.name)
        self._given, self._wanted = plan.program.inputs
        (self._made,) = plan.program.outputs
        self._state: Mapping[str, np.ndarray] | None = None

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Outputs [examples, *shape] with the weights as they are.

        Args:
            inputs: [examples, *shape], as the chip has them.
        """
        return self._called(RUN, inputs, np.zeros((len(inputs), *self._wanted.shape)))[0]

    def train(
        self, inputs: np.ndarray, wanted: np.ndarray, progress: Progress | None = None
    ) -> Lesson:
        """A training step of each example, in this order.

        Args:
            inputs: [examples, *shape], as the chip has them.
            wanted: [examples, *shape of the output], as the chip has it.
            progress: called with steps that are done, of how many.
        """
        outputs, skipped = self._called(TRAIN, inputs, wanted, progress)
        assert self._state is not None
        loss = losses(self._learning, outputs, wanted).mean()
        return Lesson(outputs, float(loss), skipped, float(self._state[STATE][0]))

    def learned(self) -> MicroNetwork:
        """The network with what it learned."""
        state = self._state
        return self._network if state is None else learned(
            self._network, self._learning.trained, state
        )  # fmt: skip

    def counts(self, example: np.ndarray, wanted: np.ndarray) -> FunctionCounts:
        """Instructions and cycles of a training step, which changes nothing here."""
        return total(self._emulated.counts(self._arrays(example, wanted), TRAIN))

    def used(self, example: np.ndarray, wanted: np.ndarray) -> Used:
        """Memory that a training step takes, by painting it before."""
        return self._emulated.used(self._arrays(example, wanted), TRAIN)

    def _arrays(self, example: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
        pairs = ((self._given, example), (self._wanted, wanted))
        return {one.name: array.astype(one.dtype).reshape(one.shape) for one, array in pairs}

    def _called(
        self,
        function: str,
        inputs: np.ndarray,
        wanted: np.ndarray,
        progress: Progress | None = None,
    ) -> tuple[np.ndarray, int]:
        """Outputs of all examples, and how many steps were skipped."""
        if len(inputs) != len(wanted):
            raise ValueError(f"{len(inputs)} examples, and what is wanted of {len(wanted)}")
        outputs = []
        before = 0 if self._state is None else skipped_of(self._state[STATE])
        for part in self._parts(len(inputs)):
            runs = [self._arrays(inputs[i], wanted[i]) for i in part]
            found, self._state = self._emulated.run_on(runs, [function] * len(runs), self._state)
            outputs += [one[self._made.name] for one in found]
            if progress is not None:
                progress(len(outputs), len(inputs))
        after = before if self._state is None else skipped_of(self._state[STATE])
        return np.array(outputs), after - before

    def _parts(self, count: int) -> Iterator[Sequence[int]]:
        ports = (self._given, self._wanted, self._made)
        step = max(1, min(_STEPS, _IMAGE // sum(one.n_bytes + 16 for one in ports)))
        for first in range(0, count, step):
            yield range(first, min(first + step, count))


def losses(learning: Learning, outputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each example, in float64; probabilities are taken as the least that halves hold, at least.

    Args:
        outputs, wanted: [examples, ...].
    """
    made, right = (x.reshape(len(x), -1).astype(np.float64) for x in (outputs, wanted))
    if learning.loss == "cross entropy":
        least = float(np.finfo(np.float16).smallest_subnormal)
        found: np.ndarray = -(right * np.log(np.maximum(made, least))).sum(1)
    else:
        found = ((made - right) ** 2).mean(1) / 2
    return found
