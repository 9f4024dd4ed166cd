"""LSTM and GRU of ONNX files on kernels of ours, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of, save

import headrace
from headrace.errors import UnsupportedError
from headrace.networks.native import NativeRegion
from headrace.networks.network import network_of

STEPS, SEQUENCES, READ, HIDDEN = 7, 5, 24, 32


def layer(
    op: str, direction: str = "forward", n: int = HIDDEN, given: str = "B h c", **more: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """A model of one layer whose states are squeezed (or turned), and inputs."""
    rng = np.random.default_rng(3)
    gates, directions = {"LSTM": 4, "GRU": 3}[op], 2 if direction == "bidirectional" else 1
    constants = {
        "W": rng.standard_normal((directions, gates * n, READ)).astype(np.float32) / 4,
        "R": rng.standard_normal((directions, gates * n, n)).astype(np.float32) / 6,
        "B": rng.standard_normal((directions, 2 * gates * n)).astype(np.float32),
        "axes": np.array([1]),
        "joined": np.array([0, 0, -1]),
    }
    state = (directions, SEQUENCES, n)
    x = {"x": rng.standard_normal((STEPS, SEQUENCES, READ)).astype(np.float32)}
    names = ["x", "W", "R", "B" if "B" in given else "", ""]
    for name in "hc" if op == "LSTM" else "h":
        names.append(name if name in given else "")
        if name in given:
            x[name] = rng.standard_normal(state).astype(np.float32)
    outputs = ["Y", "Yh", "Yc"][: 3 if op == "LSTM" else 2]
    if op == "GRU":
        more = {"linear_before_reset": 1, **more}
    nodes = [
        helper.make_node(op, names, outputs, hidden_size=n, direction=direction, **more),
        helper.make_node("Squeeze", ["Y", "axes"], ["y"])
        if directions == 1
        else helper.make_node("Transpose", ["Y"], ["turned"], perm=[0, 2, 1, 3]),
    ]
    if directions == 2:
        nodes.append(helper.make_node("Reshape", ["turned", "joined"], ["y"]))
    types = {name: (FLOAT, list(a.shape)) for name, a in x.items()}
    return model_of(nodes, types, ["y", *outputs[1:]], constants), x


def natives(network: Any, x: dict[str, np.ndarray]) -> list[str]:
    return [
        one.kernel
        for run in network.plan(x).runs
        if isinstance(run, NativeRegion)
        for one in run.operations
    ]


def check(model: Any, x: dict[str, np.ndarray], kernel: str | None) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = dict(zip([o.name for o in session.get_outputs()], session.run(None, x), strict=True))
    kept = {name: a.copy() for name, a in x.items()}
    before: dict[str, np.ndarray] | None = None
    for threads in (1, 2):
        with network_of(model, threads=threads) as network:
            for _ in range(2):  # states begin anew
                found = network(x)
                for name, value in expected.items():
                    np.testing.assert_allclose(found[name], value, atol=2e-5)
                    np.testing.assert_array_equal(found[name], (before or found)[name])
                before = {name: np.array(a) for name, a in found.items()}
            assert kernel is None or kernel in natives(network, x)
            assert kernel is not None or not any(
                one.startswith(("lstm", "gru")) for one in natives(network, x)
            )
    for name, a in kept.items():
        np.testing.assert_array_equal(x[name], a)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_layers_equal_onnxruntime(op: str, direction: str) -> None:
    check(*layer(op, direction), f"{op.lower()}_f32")


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("given", ["", "B", "B h"])
def test_gru_that_resets_before_its_product(direction: str, given: str) -> None:
    more = {"linear_before_reset": 0, "n": 20 if given else HIDDEN}
    check(*layer("GRU", direction, given=given, **more), "gru_reset_first_f32")


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("given", ["", "B", "h", "h c"])
def test_what_is_left_out_is_zero(op: str, given: str) -> None:
    check(*layer(op, n=20, given=given), f"{op.lower()}_f32")


def test_states_that_are_constant(tmp_path: Path) -> None:
    model, x = layer("LSTM", n=20)
    for name in "hc":
        model.graph.initializer.append(onnx_tensor(x.pop(name), name))
        kept = [one for one in model.graph.input if one.name != name]
        del model.graph.input[:]
        model.graph.input.extend(kept)
    check(model, x, "lstm_f32")
    with headrace.load(save(model, tmp_path / "x.onnx"), threads=1) as network:
        assert network(x)["y"].shape == (STEPS, SEQUENCES, 20)


def onnx_tensor(array: np.ndarray, name: str) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(array, name)


@pytest.mark.parametrize(
    ("op", "more"),
    [
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}),
        ("LSTM", {"clip": 0.5}),
        ("LSTM", {"input_forget": 1}),
        ("GRU", {"clip": 0.5}),
    ],
)
def test_the_host_computes_other_kinds(op: str, more: dict[str, Any]) -> None:
    check(*layer(op, **more), None)


@pytest.mark.parametrize(
    "more",
    [{"clip": 1.0}, {"input_forget": 1}, {"activations": ["Relu", "Tanh", "Tanh"]}, {"lens": 1}],
    ids=str,
)
def test_what_the_reference_leaves_out_is_refused(more: dict[str, Any]) -> None:
    """Layers that onnxruntime does not have, as their batches come first, it had without these."""
    lens = more.pop("lens", None)
    model, x = layer("LSTM", given="B", layout=1, **more)
    if lens:
        model.graph.node[0].input[4] = "lens"
        model.graph.initializer.append(onnx_tensor(np.full(STEPS, 2, np.int32), "lens"))
    with network_of(model, threads=1) as network, pytest.raises(UnsupportedError, match="leaves"):
        network(x)


def test_cells_behind_no_steps_are_refused() -> None:
    """onnxruntime gives them as memory happens to be."""
    model, x = layer("LSTM")
    x["x"] = x["x"][:0]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    with network_of(model, threads=1) as network, pytest.raises(UnsupportedError, match="no steps"):
        network(x)


def test_all_steps_are_an_output_as_they_are() -> None:
    """Of four dimensions, which others take as images."""
    model, x = layer("LSTM", "bidirectional", n=20)
    del model.graph.node[1:]
    model.graph.output[0].name = "Y"
    check(model, x, "lstm_f32")


@pytest.mark.parametrize("op", ["Tanh", "Sigmoid", "LSTM", "GRU"])
def test_what_is_no_number_stays_so(op: str) -> None:
    # `exp` bounds its input: a NaN became a 1, and all that came behind it looked right.
    rng = np.random.default_rng(8)
    x = rng.normal(size=(4, 2, 16)).astype(np.float32)
    x[1, 0, 3] = np.nan
    gates = {"LSTM": 20, "GRU": 15}.get(op)
    constants = {}
    if gates is not None:
        shapes = {"w": (1, gates, 16), "r": (1, gates, 5)}
        constants = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node(op, ["a", *constants], ["y"], **({"hidden_size": 5} if gates else {})),
    ]
    model = model_of(nodes, {"x": (FLOAT, [4, 2, 16])}, ["y"], constants)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (wanted,) = session.run(None, {"x": x})
    with network_of(model) as network:
        found = network({"x": x})["y"]
        assert natives(network, {"x": x})
    assert np.isnan(wanted).any()
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
