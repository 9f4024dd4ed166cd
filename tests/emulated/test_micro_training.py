"""Training steps on emulated chips: bit for bit what numpy says, and gradients beside float64's."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_micro_half import FUNCTIONS, NETWORKS, Layers, plain, windows_seen

from headrace.errors import BudgetError, UnsupportedError
from headrace.micro.arithmetic import computed
from headrace.micro.autotune import Costs, argument_block, tuned_step
from headrace.micro.emulate import Emulated
from headrace.micro.half import machine
from headrace.micro.half.convolution import bias_of, weights_of
from headrace.micro.half.machine import LINES_OF
from headrace.micro.half.windows import Tile
from headrace.micro.kernels import matmul
from headrace.micro.kernels.learning import skipped_of
from headrace.micro.kernels.table import kernel_table
from headrace.micro.learner import Learner
from headrace.micro.learning import (
    Learning,
    Trained,
    last_layers,
    layers_named,
    what_is_trained,
    with_weights,
)
from headrace.micro.lowered import At, Step
from headrace.micro.network import (
    Convolution,
    Depthwise,
    MicroNetwork,
    Pool,
    Softmax,
    Value,
    Windows,
)
from headrace.micro.program import TRAIN, Program
from headrace.micro.stack import stack_bytes
from headrace.micro.training import TrainingStep, training_step
from headrace.micro.training_plan import TrainingPlan, plan_training
from headrace.micro.training_state import STATE, gradient_of, learned
from headrace.micro.tuned import tuned_plan
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import count_instructions, plugin
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import Target, microcontrollers

TARGETS = microcontrollers()


def small_pools() -> MicroNetwork:
    """Depthwise layers, strides in each way, and both pools."""
    of = Layers(12, 7, 3).convolution(8, Windows((4, 3), (2, 2), (1, 1)), 1, bounds=(0.0, 6.0))
    of.depthwise(Windows((3, 3), pads=(1, 1)), 1, bounds=(0.0, np.inf))
    of.convolution(11, Windows()).pool("most", Windows((2, 2), (1, 1), (1, 0)), 1)
    of.depthwise(Windows((3, 2), (2, 1), (1, 0)), 1).pool("mean", Windows((2, 1), (2, 1)))
    return of.activation("identity", bounds=(-1.0, 1.0)).convolution(4, Windows((2, 4))).network()


# The first step overflows, and the second does not.
FIRST_SCALES = {"residual": 2.0**13, "pools": 2.0**15}
NETS = {"residual": NETWORKS["residual"], "pools": small_pools}


def everything(network: MicroNetwork) -> dict[str, Trained]:
    return {layer.name: Trained() for layer in with_weights(network)}


def memory_of(step: TrainingStep, x: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """Memory of a training step in numpy, its input and what is wanted in it."""
    memory = {name: np.zeros(n + 16, np.uint8) for name, n in step.values.items()}
    for arrays in (step.constants, step.state):
        for name, array in arrays.items():
            data = np.frombuffer(array.tobytes() + bytes(64), np.uint8)
            memory[name] = data.copy()
    put_inputs(memory, step, x, wanted)
    return memory


def put_inputs(
    memory: dict[str, np.ndarray], step: TrainingStep, x: np.ndarray, wanted: np.ndarray
) -> None:
    for name, array in zip(step.given, (x, wanted), strict=True):
        data = np.frombuffer(array.tobytes(), np.uint8)
        memory[name][: data.size] = data


def inputs_of(network: MicroNetwork, dtype: Any, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(network.inputs[0].value.shape).astype(dtype)
    wanted = np.zeros(network.layers[-1].makes.elements, dtype)
    wanted[rng.integers(wanted.size)] = 1
    return x, wanted


def numbers_in(memory: dict[str, np.ndarray], name: str, like: np.ndarray) -> np.ndarray:
    return memory[name][: like.nbytes].view(like.dtype).reshape(like.shape)


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


def _scattered(layer: Any, seen: np.ndarray) -> np.ndarray:
    """Gradients of pixels from those of [rows, columns, lines, taps, channels] of windows."""
    of, found = layer.windows, np.zeros(layer.reads[0].image)
    for i, j, line, tap in np.ndindex(seen.shape[:4]):
        row = i * of.strides[0] - of.pads[0] + line * of.dilations[0]
        column = j * of.strides[1] - of.pads[1] + tap * of.dilations[1]
        if 0 <= row < found.shape[0] and 0 <= column < found.shape[1]:
            found[row, column] += seen[i, j, line, tap]
    return found


def _pool_backward(layer: Pool, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    seen = windows_seen(layer, x, np.nan)
    there = ~np.isnan(seen)
    if layer.kind == "mean":
        given = there / there.sum((2, 3), keepdims=True)
    else:
        flat = np.where(there, seen, -np.inf).reshape(*seen.shape[:2], -1, seen.shape[4])
        first = flat.argmax(2)[:, :, None] == np.arange(flat.shape[2])[:, None]
        given = first.reshape(seen.shape)
    return _scattered(layer, given * dy[:, :, None, None])


def exact_gradients(network: MicroNetwork, x: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Gradients of cross entropy in float64, by the chain rule."""
    values = {"x": x.astype(np.float64)}
    layers = list(network.layers)
    if not isinstance(layers[-1], Softmax):
        logits = layers[-1].makes
        layers.append(Softmax("p", (logits,), Value("p", logits.shape, None)))
    for layer in layers:
        made = FUNCTIONS[type(layer)](layer, *(values[v.name] for v in layer.reads))
        values[layer.makes.name] = made.reshape(layer.makes.shape)
    last = layers.pop()
    error = values[last.makes.name] - wanted.reshape(last.makes.shape)
    errors = {last.reads[0].name: error}
    found: dict[str, Any] = {}
    for layer in reversed(layers):
        y, dy = values[layer.makes.name], errors[layer.makes.name]
        if hasattr(layer, "bounds"):
            dy = dy * ((layer.bounds[0] < y) & (y < layer.bounds[1]))
        dy, given = dy.reshape(layer.makes.image), values[layer.reads[0].name]
        into = [dy] * len(layer.reads)
        if isinstance(layer, Convolution):
            seen = windows_seen(layer, given)
            gradient = np.einsum("ijltc,ijm->mltc", seen, dy)
            found[weights_of(layer)] = gradient.reshape(len(gradient), -1).T
            into = [_scattered(layer, np.einsum("mltc,ijm->ijltc", layer.weights, dy))]
        elif isinstance(layer, Depthwise):
            seen = windows_seen(layer, given)
            found[weights_of(layer)] = np.einsum("ijltc,ijc->ltc", seen, dy)
            into = [_scattered(layer, np.einsum("ltc,ijc->ijltc", layer.weights, dy))]
        elif isinstance(layer, Pool):
            into = [_pool_backward(layer, given, dy)]
        if isinstance(layer, Convolution | Depthwise):
            found[bias_of(layer)] = dy.sum((0, 1))
        for value, one in zip(layer.reads, into, strict=True):
            errors[value.name] = errors.get(value.name, 0.0) + one.reshape(value.shape)
    return found


def rounded(network: MicroNetwork) -> MicroNetwork:
    """With weights that halves hold, which cannot be told from those of a file."""

    def of(layer: Any) -> Any:
        if not isinstance(layer, Convolution | Depthwise):
            return layer
        exact = {name: getattr(layer, name).astype(np.float16) for name in ("weights", "bias")}
        return replace(layer, **{name: one.astype(np.float64) for name, one in exact.items()})

    return replace(network, layers=tuple(of(layer) for layer in network.layers))


def gradients_of(
    network: MicroNetwork, target: Target, kind: Any, x: np.ndarray, wanted: np.ndarray
) -> dict[str, np.ndarray]:
    """Gradients of everything that is trained, as numpy says that a chip computes them."""
    how = Learning(everything(network), 1.0, scale=256.0, good_steps=1000)
    step = training_step(network, target, how, kind=kind)
    memory = memory_of(step, x, wanted)
    machine.run(step.steps[: step.phases.index("update")], target, memory)
    scale = numbers_in(memory, STATE, step.state[STATE])[0]
    return {
        name: numbers_in(memory, gradient_of(name), array).astype(np.float64) / scale
        for name, array in step.state.items()
        if name != STATE and not name.endswith(", rest")
    }


@pytest.mark.parametrize("which", NETS)
@pytest.mark.parametrize(
    ("target_name", "kind", "most"),
    [("cortex-m4f", "half", 1e-2), ("cortex-m55", "half", 1e-2), ("cortex-m4f", "single", 1e-5)],
)
def test_gradients_beside_float64(target_name: str, kind: Any, most: float, which: str) -> None:
    network, target = rounded(NETS[which]()), TARGETS[target_name]
    x, wanted = inputs_of(network, np.float16 if kind == "half" else np.float32)
    exact = exact_gradients(network, x, wanted)
    found = gradients_of(network, target, kind, x, wanted)
    assert set(found) == set(exact)
    for name, gradient in exact.items():
        error = np.linalg.norm(found[name] - gradient.reshape(found[name].shape))
        assert error < most * np.linalg.norm(gradient), name


def test_the_chain_rule_is_right() -> None:
    """The gradients above beside differences of the loss."""
    network = rounded(small_pools())
    x, wanted = inputs_of(network, np.float64)
    exact = exact_gradients(network, x, wanted)

    def loss() -> float:
        logits = plain(network, x).reshape(-1)
        return float(np.log(np.exp(logits - logits @ wanted).sum()))

    rng = np.random.default_rng(6)
    for layer in with_weights(network):
        for array, name in ((layer.weights, weights_of(layer)), (layer.bias, bias_of(layer))):
            way = rng.standard_normal(array.shape)
            before, values = array.copy(), []
            for by in (1e-6, -1e-6):
                array[...] = before + by * way
                values.append(loss())
            array[...] = before
            turned = way.reshape(len(way), -1).T if way.ndim == 4 else way
            expected = (exact[name] * turned.reshape(exact[name].shape)).sum()
            assert abs((values[0] - values[1]) / 2e-6 - expected) < 1e-5 * np.linalg.norm(
                exact[name]
            )


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


def test_a_few_lines_tell_what_all_cost() -> None:
    """Counts of whole calls, and those that are made of counts of some lines."""
    network, target = NETS["pools"](), TARGETS["cortex-m55"]
    if (reason := why_not(target.machines[0])) or plugin() is None:
        pytest.skip(reason or "no C compiler to build the counting plugin with")
    step = training_step(network, target, Learning(everything(network), 0.1))
    calls: dict[str, Step] = {}
    for of in ("matmul_half", "depthwise_half", "depthwise_gradient_half", "pad_half", "turn_half"):
        calls[of] = max(
            (one for one in step.steps if one.kernel == of), key=lambda one: one.slots[LINES_OF[of]]
        )
    long = matmul.Product(At("a"), At("b"), At("c"), At("d"), 61, 5, 16, 10, 2, 32, 32)
    calls["rows"] = Step(matmul.NAME, long.slots)
    costs = Costs(target)
    for one in calls.values():
        launch = [(argument_block(one), 1)]
        code = KernelStore(target).objects([kernel_table()[one.kernel]])[one.kernel]
        whole = count_instructions(one.kernel, code, target, target.machines[0], launch)
        assert costs.instructions(one) == whole.instructions, one


def test_tuning_stays_within_fast_memory() -> None:
    of = Layers(8, 8, 16).convolution(64, Windows((3, 3), pads=(1, 1)), 1)
    of.pool("mean", Windows((8, 8))).convolution(4, Windows())
    network, target = of.network(), TARGETS["cortex-m55"]
    if (reason := why_not(target.machines[0])) or plugin() is None:
        pytest.skip(reason or "no C compiler to build the counting plugin with")
    first = with_weights(network)[-1].name
    how = Learning({first: Trained()}, 0.1)
    plain_step, most = training_step(network, target, how), 20_000
    assert max(map(machine.touched_bytes, plain_step.steps)) > most
    tuned, costs = tuned_step(network, target, how, fast_bytes=most), Costs(target)
    assert max(map(machine.touched_bytes, tuned.steps)) <= most

    def total(step: TrainingStep) -> int:
        return sum(costs.instructions(one) for one in step.steps if machine.operands_of(one))

    blocks = {one.kernel for one in tuned.steps if one.kernel.startswith("matmul")}
    assert blocks - {matmul.NAME}
    assert total(tuned) < 1.05 * total(plain_step)
    x, wanted = inputs_of(network, np.float16)
    results = []
    for step in (plain_step, tuned):
        memory = memory_of(step, x, wanted)
        machine.run(step.steps, target, memory)
        results.append({name: memory[name].tobytes() for name in step.state})
    assert results[0] == results[1]
    with pytest.raises(UnsupportedError, match="smallest tile takes"):
        tuned_step(network, target, how, fast_bytes=100)


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


def test_the_tuner_stays_within_sram(tmp_path: Any, monkeypatch: Any) -> None:
    of = Layers(25, 5, 64).depthwise(Windows((3, 3), pads=(1, 1)), 1)
    of.pool("mean", Windows((25, 5))).convolution(4, Windows())
    network, target = of.network(), TARGETS["cortex-m55"]
    if (reason := why_not(target.machines[0])) or plugin() is None:
        pytest.skip(reason or "no C compiler to build the counting plugin with")
    how = Learning(last_layers(network, 1), 0.1, 0.9)
    fastest = tuned_plan(network, target, how).plan
    taken = fastest.program.arena_bytes + stack_bytes(fastest.program)
    with pytest.raises(BudgetError, match="does not learn in") as raised:
        tuned_plan(network, target, how, taken // 2)
    least = raised.value.needed_bytes
    assert taken // 2 < least < taken
    smaller = tuned_plan(network, target, how, least).plan
    assert smaller.program.arena_bytes + stack_bytes(smaller.program) <= least

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr("headrace.micro.tuned.Tuner", never)
    assert tuned_plan(network, target, how, least).plan.program == smaller.program
    monkeypatch.setattr("headrace.micro.tuned.why_not", lambda _: "no emulator")
    found = tuned_plan(network, target, how)
    assert found.not_counted == "no emulator" and found.plan.program.functions


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
