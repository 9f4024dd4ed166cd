"""Training steps on emulated chips, bit for bit what numpy says; what is trained, and what not."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from test_micro_half import Layers
from training_networks import (
    NETS,
    TARGETS,
    everything,
    inputs_of,
    memory_of,
    numbers_in,
    put_inputs,
)

from headrace.errors import UnsupportedError
from headrace.micro.arithmetic import computed
from headrace.micro.emulate import Emulated
from headrace.micro.half import machine
from headrace.micro.half.convolution import bias_of, weights_of
from headrace.micro.half.windows import Tile
from headrace.micro.kernels.learning import skipped_of
from headrace.micro.learner import Learner
from headrace.micro.learning import (
    Learning,
    Trained,
    last_layers,
    layers_named,
    what_is_trained,
    with_weights,
)
from headrace.micro.network import MicroNetwork, Windows
from headrace.micro.program import TRAIN, Program
from headrace.micro.training import training_step
from headrace.micro.training_plan import TrainingPlan, plan_training
from headrace.micro.training_state import STATE, learned
from headrace.targets.emulation.machines import why_not

# The first step overflows, and the second does not.
FIRST_SCALES = {"residual": 2.0**13, "pools": 2.0**15}


def small_tiles(network: MicroNetwork) -> dict[str, Tile]:
    passes = ("forward", "weight gradient", "input gradient")
    names = [layer.name for layer in with_weights(network)]
    return {f"{name}: {one}": Tile(400, 8) for name in names for one in passes}


@pytest.mark.parametrize(
    ("target_name", "which"),
    [
        *itertools.product(["cortex-m4f", "cortex-m55", "rv32-zfh", "rv32-zvfh"], NETS),
        ("cortex-m3", "pools"),
        pytest.param("cortex-m3", "residual", marks=pytest.mark.slow),
    ],
)
def test_steps_bit_for_bit(target_name: str, which: str) -> None:
    """Steps with momentum; those that overflow are skipped."""
    network, target = NETS[which](), TARGETS[target_name]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    how = Learning(everything(network), 0.05, 0.9, scale=FIRST_SCALES[which], good_steps=1)
    step = training_step(network, target, how, tiles=small_tiles(network))
    program = with_state(plan_training(network, target, step))
    lessons = [inputs_of(network, np.float16, seed) for seed in (1, 0, 2)]
    runs = [dict(zip(step.given, lesson, strict=True)) for lesson in lessons]
    for one in runs:
        one[step.given[1]] = one[step.given[1]].reshape(program.inputs[1].shape)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Emulated(program, folder).run(runs, [TRAIN] * len(runs))
    memory = memory_of(step, *lessons[0])
    before = {name: array.tobytes() for name, array in step.state.items()}
    scales = [how.scale]
    for lesson, found in zip(lessons, outputs, strict=True):
        put_inputs(memory, step, *lesson)
        machine.run(step.steps, target, memory)
        after = {name: found[name].tobytes() for name in step.state}
        for name, array in found.items():
            assert array.tobytes() == memory[name][: array.nbytes].tobytes(), name
        scales.append(float(found[STATE][0]))
        same = all(after[name] == before[name] for name in after if name != STATE)
        assert same == (scales[-1] < scales[-2])
        before = after
    assert scales[1] < scales[0] and max(np.diff(scales)) > 0


def with_state(plan: TrainingPlan) -> Program:
    """A program that gives what stays from step to step, too."""
    return replace(plan.program, outputs=(*plan.program.outputs, *plan.program.state))


def test_backward_ends_at_the_first_layer_that_is_trained() -> None:
    network, target = NETS["residual"](), TARGETS["cortex-m55"]
    last = with_weights(network)[-1]
    how = Learning({last.name: Trained()}, 0.1)
    step = training_step(network, target, how)
    behind = step.phases[step.phases.index("loss") + 1 :]
    assert {phase.split(":")[0] for phase in behind} == {last.name, "check", "update"}
    assert not any("input gradient" in phase for phase in behind)
    only_bias = training_step(network, target, Learning({last.name: Trained(weights=False)}, 0.1))
    assert next(name for name in only_bias.state if name != STATE) == bias_of(last)
    middle = with_weights(network)[2]
    step = training_step(network, target, Learning({middle.name: Trained()}, 0.1))
    assert not any(
        phase.startswith((f"{middle.name}: input", "layer 0: i")) for phase in step.phases
    )
    assert weights_of(last) in step.constants and weights_of(middle) in step.state


@pytest.mark.parametrize(
    ("learning", "message"),
    [
        (Learning({}, 0.1), "nothing is trained"),
        (Learning({"nobody": Trained()}, 0.1), "nobody: there is no layer"),
        (Learning({"layer 0": Trained(False, False)}, 0.1), "layer 0: neither"),
    ],
)
def test_what_cannot_be_trained(learning: Learning, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        training_step(NETS["residual"](), TARGETS["cortex-m55"], learning)


def test_a_layer_without_a_gradient() -> None:
    network = Layers(4, 4, 3).convolution(5, Windows((3, 3))).activation("hard_swish").network()
    with pytest.raises(UnsupportedError, match="layer 1: there is no gradient of Activation"):
        training_step(network, TARGETS["cortex-m55"], Learning({"layer 0": Trained()}, 0.1))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_step_that_overflows_changes_nothing(at_once: bool) -> None:
    """By numpy; at once, what lies behind the layer whose gradient overflows is updated."""
    network, target = NETS["residual"](), TARGETS["cortex-m55"]
    how = Learning(everything(network), 0.05, 0.9, scale=2.0**15, at_once=at_once)
    step = training_step(network, target, how)
    memory = memory_of(step, *inputs_of(network, np.float16))
    before, scale, skipped = step.state, how.scale, 0
    for _ in range(9):
        machine.run(step.steps, target, memory)
        after = {name: numbers_in(memory, name, array).copy() for name, array in before.items()}
        assert all(np.isfinite(array).all() for array in after.values())
        same = all(
            after[name].tobytes() == before[name].tobytes() for name in after if name != STATE
        )
        overflow = skipped_of(after[STATE]) > skipped
        assert after[STATE][0] == (scale / 2 if overflow else scale)
        assert same == overflow or at_once
        before, scale, skipped = after, after[STATE][0], skipped_of(after[STATE])
    assert 0 < skipped < 9


def test_what_a_learner_learned() -> None:
    """On the chip, in two launches, as numpy says; and the network with its new weights."""
    network, target = NETS["residual"](), TARGETS["cortex-m55"]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    last = with_weights(network)[-1]
    how = Learning({last.name: Trained()}, 0.05, 0.9, scale=8.0)
    step = training_step(network, target, how)
    lessons = [inputs_of(network, np.float16, seed) for seed in range(3)]
    inputs, wanted = (np.array(of) for of in zip(*lessons, strict=True))
    with Learner(network, how, plan_training(network, target, step)) as learner:
        first = learner.train(inputs[:2], wanted[:2])
        second = learner.train(inputs[2:], wanted[2:])
        after = learner.run(inputs[:1])
        found = learner.learned()
    memory = memory_of(step, *lessons[0])
    for lesson in lessons:
        put_inputs(memory, step, *lesson)
        machine.run(step.steps, target, memory)
    assert first.skipped == second.skipped == 0 and first.loss > 0
    state = {name: numbers_in(memory, name, array) for name, array in step.state.items()}
    new, old = with_weights(learned(network, how.trained, state))[-1], with_weights(network)[-1]
    assert with_weights(found)[-1].weights.tobytes() == new.weights.tobytes()
    assert with_weights(found)[-1].bias.tobytes() == new.bias.tobytes()
    assert new.weights.shape == old.weights.shape
    assert 0 < np.abs(new.weights - old.weights).max() < 1
    expected = computed(found, target, {"x": inputs[0]})[found.layers[-1].makes.name]
    assert after[0].tobytes() == expected.tobytes() or np.allclose(after[0], expected, atol=1e-2)
    assert len(first.outputs) == 2


def test_layers_by_their_names() -> None:
    network = NETS["residual"]()
    names = [layer.name for layer in with_weights(network)]
    found = layers_named(network, f"{names[0]}:bias,{names[-1]}")
    assert found == {names[0]: Trained(False, True), names[-1]: Trained()}
    assert layers_named(network, f"{names[0]}:bias,{names[0]}:weights") == {names[0]: Trained()}
    assert layers_named(network, "2") == last_layers(network, 2)
    assert what_is_trained(network, found)[0].endswith(":bias")
    for text in what_is_trained(network, {name: Trained() for name in names}):
        assert len(layers_named(network, text)) == 1
    for text in ("nobody", "", f"{names[0]},", "layer", "0", "99"):
        with pytest.raises(ValueError, match=r"with weights|have weights"):
            layers_named(network, text)
    for bad in ({"rate": 0.0}, {"momentum": 1.0}, {"scale": 3.0}, {"good_steps": 0}):
        with pytest.raises(ValueError, match="wanted"):
            Learning(found, **{"rate": 0.1, **bad})
