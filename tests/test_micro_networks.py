"""Networks for microcontrollers: what is read of files, and where values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_models import FLOAT, model_of, save
from tflite_networks import made, residual

from headrace.errors import BudgetError, UnsupportedError
from headrace.micro import half
from headrace.micro.arithmetic import computed, numbers_of
from headrace.micro.choice import plan_within
from headrace.micro.jobs import ByRows, bands_of
from headrace.micro.kernels import move
from headrace.micro.learning import Learning, last_layers
from headrace.micro.lowered import At
from headrace.micro.network import (
    Activation,
    Add,
    Codes,
    Concatenation,
    Convolution,
    Depthwise,
    Layer,
    MicroNetwork,
    Multiply,
    Padding,
    Pool,
    Port,
    Softmax,
    Value,
    View,
    Windows,
)
from headrace.micro.packing import ALIGNED, Life, packed
from headrace.micro.plan import plan_network
from headrace.micro.reading import read_network
from headrace.micro.schedule import Schedule
from headrace.micro.stack import stack_bytes
from headrace.micro.training import training_step
from headrace.targets.target import microcontrollers

CHIP = microcontrollers()["cortex-m55"]


def with_batch_norms() -> tuple[Any, np.ndarray]:
    """What PyTorch exports: channels first, batch norms, HardSwish in pieces, a flattened image."""
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {}

    def weights(name: str, *shape: int) -> str:
        constants[name] = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        return name

    def norm(x: str, y: str, channels: int) -> Any:
        names = [weights(f"{y}/{one}", channels) for one in ("scale", "bias", "mean")]
        constants[f"{y}/variance"] = rng.uniform(0.5, 2, channels).astype(np.float32)
        return helper.make_node("BatchNormalization", [x, *names, f"{y}/variance"], [y])

    constants |= {"three": np.float32(3), "low": np.float32(0), "six": np.float32(6)}
    nodes = [
        helper.make_node(
            "Conv", ["x", weights("w0", 8, 3, 3, 3)], ["a"], pads=[1] * 4, strides=[2, 1]
        ),
        norm("a", "b", 8),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node(
            "Conv", ["c", weights("w1", 8, 1, 3, 3)], ["d"], group=8, auto_pad="SAME_UPPER"
        ),
        norm("d", "e", 8),
        helper.make_node("Add", ["e", "three"], ["f"]),
        helper.make_node("Clip", ["f", "low", "six"], ["g"]),
        helper.make_node("Mul", ["e", "g"], ["h"]),
        helper.make_node("Div", ["h", "six"], ["i"]),
        helper.make_node("MaxPool", ["i"], ["j"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["j"], ["k"]),
        helper.make_node(
            "Gemm", ["k", weights("w2", 5, 8 * 2 * 3), weights("b2", 5)], ["l"], transB=1
        ),
        helper.make_node("Softmax", ["l"], ["y"], axis=-1),
    ]
    model = model_of(nodes, {"x": (FLOAT, ["batch", 3, 8, 6])}, ["y"], constants)
    return model, rng.standard_normal((1, 3, 8, 6)).astype(np.float32)


def in_single(network: Any, x: np.ndarray) -> np.ndarray:
    """Its output in float32."""
    found = {network.inputs[0].value.name: x}
    for layer in network.layers:
        given = [found[value.name] for value in layer.reads]
        found[layer.makes.name] = (
            given[0].reshape(layer.makes.shape) if isinstance(layer, View)
            else half.COMPUTED[type(layer)](layer, CHIP, *given, kind="single")
        )  # fmt: skip
    return found[network.outputs[0].value.name]


def test_a_network_of_pytorchs_kind_gives_what_onnxruntime_does(tmp_path: Path) -> None:
    model, x = with_batch_norms()
    network = read_network(save(model, tmp_path / "x.onnx"))
    kinds = [type(layer) for layer in network.layers]
    assert kinds.count(Convolution) == 2 and kinds.count(Depthwise) == 1
    assert Activation in kinds and Pool in kinds and Add not in kinds
    assert network.inputs[0].channels_first and network.inputs[0].shape == (1, 3, 8, 6)
    assert network.inputs[0].value.shape == (8, 6, 3)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (expected,) = session.run(None, {"x": x})
    found = in_single(network, np.ascontiguousarray(x[0].transpose(1, 2, 0)))
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(found, expected[0], atol=1e-5)


def bounds(*pairs: tuple[float, float]) -> list[Any]:
    nodes = []
    for i, (least, most) in enumerate(pairs):
        ends = [f"{end}{i}" for end in ("least", "most")]
        constants = (helper.make_node("Constant", [], [e], value_float=float(v)) for e, v in
                     zip(ends, (least, most), strict=True))  # fmt: skip
        nodes += [*constants, helper.make_node("Clip", [f"c{i}", *ends], [f"c{i + 1}"])]
    return nodes


ENDINGS: dict[str, list[Any]] = {
    "flat relu, gemm": [
        helper.make_node("Flatten", ["c0"], ["f"]),
        helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("Gemm", ["r", "w2"], ["y"]),
    ],
    "bounds below, then above": [
        *bounds((-2, -1), (0, 9)),
        helper.make_node("Identity", ["c2"], ["y"]),
    ],
    "bounds above": [*bounds((0, 0.5), (0.8, 1)), helper.make_node("Identity", ["c2"], ["y"])],
    "names twice": [
        helper.make_node("Conv", ["c0", "w1"], ["d"], name="same", pads=[1] * 4),
        helper.make_node("Conv", ["d", "w3"], ["y"], name="same", pads=[1] * 4),
    ],
}


def ending_in(nodes: list[Any]) -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(4)
    shapes = {"w0": (4, 2, 3, 3), "w1": (4, 4, 3, 3), "w2": (4 * 5 * 6, 3), "w3": (4, 4, 3, 3)}
    constants = {k: (rng.standard_normal(of) * 0.4).astype(np.float32) for k, of in shapes.items()}
    first = helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4)
    model = model_of([first, *nodes], {"x": (FLOAT, [1, 2, 5, 6])}, ["y"], constants)
    return model, rng.standard_normal((1, 2, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_read_as_something_else(ending: str, tmp_path: Path) -> None:
    model, x = ending_in(ENDINGS[ending])
    network = read_network(save(model, tmp_path / "x.onnx"))
    assert len({layer.name for layer in network.layers}) == len(network.layers)
    for node in model.graph.node:
        node.name = ""  # onnxruntime wants them all different
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    found = in_single(network, np.ascontiguousarray(x[0].transpose(1, 2, 0)))
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected[0], atol=2e-5)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("Flatten", {}), ("Softmax", {})], "a softmax of a row"),
        ([("Flatten", {})], "channels first"),
        ([("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]})], "gaps between"),
        ([("Transpose", {"perm": [0, 1, 3, 2]})], "a transposition"),
    ],
)
def test_what_would_be_wrong_is_refused(nodes: Any, words: str, tmp_path: Path) -> None:
    names = ["c0", *(f"n{i}" for i in range(len(nodes) - 1)), "y"]
    made = [
        helper.make_node(op, [names[i]], [names[i + 1]], **attributes)
        for i, (op, attributes) in enumerate(nodes)
    ]
    model, _ = ending_in(made)
    with pytest.raises(UnsupportedError, match=rf"x\.onnx: .*{words}"):
        read_network(save(model, tmp_path / "x.onnx"))


@pytest.mark.parametrize(
    ("nodes", "made", "shape"),
    [
        ([helper.make_node("Mul", ["c0", "k"], ["y"])], 1, (1, 8, 1, 1)),
        (
            [
                helper.make_node("Transpose", ["c0"], ["t"], perm=[0, 2, 3, 1]),
                helper.make_node("Add", ["t", "k"], ["y"]),
            ],
            4,
            (1, 4, 1, 1),
        ),
    ],
    ids=["more channels than there are", "not of channels"],
)
def test_constants_go_only_into_channels_of_their_own(
    nodes: Any, made: int, shape: Any, tmp_path: Path
) -> None:
    """A constant that makes channels out of one, and one of rows that are as many as channels."""
    rng = np.random.default_rng(2)
    constants = {"w0": rng.standard_normal((made, 2, 1, 1)).astype(np.float32),
                 "k": rng.standard_normal(shape).astype(np.float32)}  # fmt: skip
    first = helper.make_node("Conv", ["x", "w0"], ["c0"])
    model = model_of([first, *nodes], {"x": (FLOAT, [1, 2, 4, 4])}, ["y"], constants)
    with pytest.raises(UnsupportedError, match=r"x\.onnx: (Mul|Add) "):
        read_network(save(model, tmp_path / "x.onnx"))


def test_a_softmax_of_all_pixels_is_none_of_channels(tmp_path: Path) -> None:
    """Before operator set 13 a softmax is of all dimensions from its axis on."""
    for size, opset in ((2, 11), (1, 11), (2, 13)):
        nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
        model = model_of(nodes, {"x": (FLOAT, [1, 3, size, size])}, ["y"], opset=opset)
        path = save(model, tmp_path / "x.onnx")
        if (size, opset) == (2, 11):
            with pytest.raises(UnsupportedError, match="a softmax of a row"):
                read_network(path)
        else:
            assert isinstance(read_network(path).layers[-1], Softmax)


def test_a_batch_norm_of_its_input_is_refused(tmp_path: Path) -> None:
    ones = {name: np.ones(3, np.float32) for name in "abcd"}
    node = helper.make_node("BatchNormalization", ["x", *"abcd"], ["y", "m", "v"], training_mode=1)
    model = model_of([node], {"x": (FLOAT, [1, 3, 4, 4])}, ["y"], ones)
    with pytest.raises(UnsupportedError, match="export it for inference"):
        read_network(save(model, tmp_path / "x.onnx"))


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1e6, r"weight or bias is .* hold up to 65504"), (np.nan, r"bias is nan, .* to be finite")],
)
def test_weights_that_halves_do_not_hold(factor: float, words: str, tmp_path: Path) -> None:
    (file, x, y), _ = residual("float32")
    network = read_network(file.write(tmp_path / "x.tflite", [x], [y]))
    first = replace(network.layers[0], weights=network.layers[0].weights * factor)
    large = replace(network, layers=(first, *network.layers[1:]))
    with pytest.raises(UnsupportedError, match=words):
        plan_network(large, CHIP)


def test_only_what_ends_in_one_output_learns(tmp_path: Path) -> None:
    (file, x, y), _ = residual("float32")
    network = read_network(file.write(tmp_path / "x.tflite", [x], [y]))
    twice = replace(network, outputs=(*network.outputs, port("z", network.layers[0].makes)))
    with pytest.raises(UnsupportedError, match="one output"):
        training_step(twice, CHIP, Learning(last_layers(network, 1), 0.1))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_a_tflite_file_says_is_kept(dtype: str, tmp_path: Path) -> None:
    (file, x, y), _ = residual(dtype)
    network = read_network(file.write(tmp_path / "x.tflite", [x], [y]))
    assert network.is_quantised == (dtype == "int8")
    assert [port.shape for port in network.inputs] == [(1, 20, 12, 3)]
    assert not network.inputs[0].channels_first
    convolution = network.layers[0]
    assert isinstance(convolution, Convolution)
    assert convolution.weights.shape == (16, 3, 3, 3) and convolution.bounds == (0, np.inf)
    assert convolution.weights.dtype == dtype and convolution.windows.strides == (2, 2)
    assert network.macs == sum(layer.macs for layer in network.layers) > 50_000


@pytest.mark.parametrize("case", ["pad", "rows"])
def test_what_does_not_run_is_said(case: str, tmp_path: Path) -> None:
    (file, x, y), _ = made(case, "float32")
    with pytest.raises(UnsupportedError, match=r"x\.tflite: .*done|not run on"):
        read_network(file.write(tmp_path / "x.tflite", [x], [y]))


@st.composite
def lives(draw: Any) -> dict[str, tuple[Life, ...]]:
    found = {}
    for i in range(draw(st.integers(1, 9))):
        own = []
        for _ in range(draw(st.integers(1, 2))):
            begin, first = draw(st.integers(0, 40)), draw(st.integers(0, 9))
            end = begin + draw(st.integers(1, 200))
            own.append(Life(begin, end, first, first + draw(st.integers(0, 5))))
        found[f"piece {i}"] = tuple(own)
    return found


@settings(max_examples=60, deadline=None)
@given(lives())
def test_nothing_overlaps(pieces: dict[str, tuple[Life, ...]]) -> None:
    found = packed(pieces)
    taken: dict[tuple[int, int], str] = {}
    for name, own in pieces.items():
        assert found.offsets[name] % ALIGNED == 0
        for life in own:
            for step in range(life.first, life.last + 1):
                for byte in range(life.begin, life.end):
                    at = step, found.offsets[name] + byte
                    assert taken.setdefault(at, name) == name
                    assert at[1] < found.n_bytes
    steps = {step for step, _ in taken}
    assert found.least == max(sum(one == step for one, _ in taken) for step in steps)
    assert packed(pieces) == found


def test_rows_are_made_once_and_read_when_they_are_there(tmp_path: Path) -> None:
    (file, x, y), _ = residual("float32")
    network = read_network(file.write(tmp_path / "x.tflite", [x], [y]))
    layers = network.layers[:5]
    for height in (1, 3):
        bands = bands_of(layers, height)
        for i, layer in enumerate(layers):
            rows = [row for band in bands.made if i in band for row in range(*band[i])]
            needed = layer.makes.image[0] if i == len(layers) - 1 else max(rows) + 1
            assert rows == list(range(needed))


def test_a_budget_is_held_or_refused(tmp_path: Path) -> None:
    (file, x, y), _ = residual("float32")
    network = read_network(file.write(tmp_path / "x.tflite", [x], [y]))
    whole = plan_network(network, CHIP)
    with pytest.raises(BudgetError, match="does not fit in 1,000 bytes") as refused:
        plan_within(network, CHIP, 1000)
    least = refused.value.needed_bytes
    assert least < whole.arena_bytes
    found = plan_within(network, CHIP, least)
    assert found.arena_bytes + stack_bytes(found.program) == least and found.by_rows
    room = whole.arena_bytes + stack_bytes(whole.program)
    assert plan_within(network, CHIP, room).by_rows == ()
    assert plan_network(network, CHIP, found.by_rows).arena_bytes == found.arena_bytes
    with pytest.raises(UnsupportedError, match="cannot run by rows"):
        plan_network(network, CHIP, (ByRows(2, 4, 1),))


def in_memory(
    network: MicroNetwork, ways: Sequence[ByRows], x: np.ndarray
) -> dict[str, np.ndarray]:
    """Outputs, each job computed by numpy where its values lie in one piece of memory."""
    schedule = Schedule(network, CHIP, ways)
    packing = packed(schedule.pieces())
    arena = np.random.default_rng(1).integers(0, 256, packing.n_bytes + 64).astype(np.uint8)

    def view(at: At, n_bytes: int) -> np.ndarray:
        base = schedule.bases[at.name]
        begin = packing.offsets[base.name] + base.offset + at.offset
        assert begin + n_bytes <= packing.n_bytes
        return arena[begin : begin + n_bytes]

    given = network.inputs[0].value
    view(At(given.name), given.elements)[:] = x.reshape(-1).view(np.uint8)
    for job, _ in schedule.jobs:
        if job.layer is None:
            moved = view(job.at[move.FROM], job.moved_bytes).copy()
            view(job.at[move.TO], job.moved_bytes)[:] = moved
            continue
        reads = [
            view(job.at[value.name], value.elements).view(np.int8).reshape(value.shape).copy()
            for value in job.layer.reads
        ]
        made = numbers_of(job.layer).computed[type(job.layer)](job.layer, CHIP, *reads)
        view(job.at[job.layer.makes.name], made.size)[:] = made.reshape(-1).view(np.uint8)
    return {
        p.value.name: view(At(p.value.name), p.value.elements).view(np.int8).reshape(p.value.shape)
        for p in network.outputs
    }


@st.composite
def chains(draw: Any) -> tuple[MicroNetwork, tuple[ByRows, ...]]:
    """Convolutions, pools and sums over earlier values, and some of them by rows."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (draw(st.integers(4, 13)), draw(st.integers(3, 6)), draw(st.integers(1, 3)))
    value = Value("x", shape, Codes(0.05, 3))
    layers: list[Layer] = []
    before = [value]
    for i in range(draw(st.integers(1, 5))):
        kinds = ("convolution", "depthwise", "most", "mean", "add", "multiply", "join", "pad")
        kind = draw(st.sampled_from(kinds))
        taps, strides = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        rows, columns, channels = value.image
        pads = draw(st.integers(0, taps - 1))
        made = [max(1, -(-(size + pads - taps + 1) // strides)) for size in (rows, columns)]
        windows = Windows((taps, taps), (strides, strides), (pads, pads))
        name = f"layer {i}"
        codes = Codes(0.07, -5)
        same = [one for one in before if one.shape == value.shape and one is not value]
        if kind == "add" and same:
            makes = Value(f"v{i}", value.shape, codes)
            layers.append(Add(name, (value, draw(st.sampled_from(same))), makes, (-3.0, np.inf)))
        elif kind == "multiply" and same:
            makes = Value(f"v{i}", value.shape, codes)
            layers.append(Multiply(name, (value, draw(st.sampled_from(same))), makes))
        elif kind == "join":
            axis = draw(st.sampled_from((0, 2)))
            others = [one for one in same if one.codes == value.codes] or [value]
            both = (value, draw(st.sampled_from(others)))
            shape = tuple(n * 2 if j == axis else n for j, n in enumerate(value.shape))
            makes = Value(f"v{i}", shape, value.codes)
            layers.append(Concatenation(name, both, makes, axis))
        elif kind == "pad":
            shape = (rows + 1, columns + 2, channels)
            makes = Value(f"v{i}", shape, value.codes)
            layers.append(Padding(name, (value,), makes, (1, 0), (0, 2)))
        elif kind == "convolution":
            out = draw(st.integers(1, 4))
            makes = Value(f"v{i}", (*made, out), codes)
            w = rng.integers(-127, 128, (out, taps, taps, channels)).astype(np.int8)
            bias = rng.integers(-999, 999, out).astype(np.int32)
            layers.append(
                Convolution(name, (value,), makes, w, bias, np.full(out, 0.01, np.float32), windows)
            )
        elif kind == "depthwise":
            makes = Value(f"v{i}", (*made, channels), codes)
            w = rng.integers(-127, 128, (taps, taps, channels)).astype(np.int8)
            bias = rng.integers(-999, 999, channels).astype(np.int32)
            scales = np.full(channels, 0.01, np.float32)
            layers.append(Depthwise(name, (value,), makes, w, bias, scales, windows))
        else:
            makes = Value(f"v{i}", (*made, channels), value.codes)
            layers.append(
                Pool(name, (value,), makes, "most" if kind == "most" else "mean", windows)
            )
        before.append(value)
        value = layers[-1].makes
    ends = [port("x", before[0]), port("y", value)]
    network = MicroNetwork("chain", tuple(layers), (ends[0],), (ends[1],))
    ways, at = [], 0
    while at < len(layers):
        last = draw(st.integers(at + 1, len(layers)))
        if draw(st.booleans()):
            ways.append(ByRows(at, last, draw(st.integers(1, 3))))
        at = last
    return network, tuple(ways)


def port(name: str, value: Value) -> Port:
    return Port(name, (1, *value.shape), value)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_rows_and_places_change_nothing(made: tuple[MicroNetwork, tuple[ByRows, ...]]) -> None:
    network, ways = made
    x = np.random.default_rng(0).integers(-128, 128, network.inputs[0].value.shape).astype(np.int8)
    expected = computed(network, CHIP, {"x": x})[network.outputs[0].value.name]
    for some in ((), ways):
        try:
            (found,) = in_memory(network, some, x).values()
        except UnsupportedError as error:
            assert some and "cannot run by rows" in str(error)
            continue
        np.testing.assert_array_equal(found, expected)
