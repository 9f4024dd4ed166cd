"""Networks of ONNX files: what they give, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, INT64, linear, model_of, save
from test_recurrent_networks import layer

import headrace
from headrace.cli import main
from headrace.cli_networks import output_paths
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.loaders.onnx_model import open_onnx
from headrace.loaders.reader import TensorReader
from headrace.networks.network import network_of


@pytest.mark.parametrize("external", [False, True])
def test_a_file_gives_what_numpy_gives(tmp_path: Path, external: bool) -> None:
    model, w = linear()
    path = save(model, tmp_path / "linear.onnx", external)
    with headrace.load(path, threads=1) as network:
        assert isinstance(network, headrace.Network)
        assert network.inputs[0].text == "FLOAT [batch, 64]"
        for batch in (1, 3, 1):
            x = np.random.default_rng(batch).normal(size=(batch, 64)).astype(np.float32)
            y = network({"x": x})["y"]
            exact = x.astype(np.float64) @ w + x
            # Each product and sum of 64 is off by at most half a unit in the last place.
            bound = 66 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(x))
            assert (np.abs(y - exact) <= bound).all()


def test_large_weights_are_not_parsed(tmp_path: Path) -> None:
    model, w = linear()
    path = save(model, tmp_path / "linear.onnx")
    found = open_onnx(path)
    assert found.proto.ByteSize() < 1000 and list(found.weights) == ["w"]
    with TensorReader() as reader:
        np.testing.assert_array_equal(found.array("w", reader), w)


def test_typed_fields_are_read_in_place_too(tmp_path: Path) -> None:
    model, w = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend(w.reshape(-1).tolist())
    found = open_onnx(save(model, tmp_path / "linear.onnx"))
    with TensorReader() as reader:
        np.testing.assert_array_equal(found.array("w", reader), w)


def test_shapes_are_computed_ahead() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["new"], axis=0),
        helper.make_node("Reshape", ["x", "new"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([2, -1])}
    model = model_of(nodes, {"x": (FLOAT, ["n", 6])}, ["y"], constants)
    network = network_of(model)
    x = np.arange(18, dtype=np.float32).reshape(3, 6)
    np.testing.assert_array_equal(network({"x": x})["y"], x.reshape(3, 2, 3))
    plan = network.plan({"x": x})
    assert [node.op for node in plan.graph.nodes] == ["Reshape"]
    assert plan.graph.shape("y") == (3, 2, 3)


def test_random_numbers_are_not_constants() -> None:
    node = helper.make_node("RandomNormal", [], ["y"], shape=[4])
    network = network_of(model_of([node], {}, ["y"]))
    assert not np.array_equal(network({})["y"], network({})["y"])


def test_a_graph_inside_reads_values_outside() -> None:
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["t"])], "then", [], [onnx.ValueInfoProto(name="t")]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"])], "else", [], [onnx.ValueInfoProto(name="e")]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    w = np.arange(512, dtype=np.float32)  # large enough to lie outside of the message
    inputs = {"x": (FLOAT, [512]), "c": (onnx.TensorProto.BOOL, [])}
    network = network_of(model_of([node], inputs, ["y"], {"w": w}))
    x = np.ones(512, np.float32)
    np.testing.assert_array_equal(network({"x": x, "c": np.array(True)})["y"], x + w)
    np.testing.assert_array_equal(network({"x": x, "c": np.array(False)})["y"], -x)


def test_outputs_may_be_inputs_and_weights() -> None:
    w = np.arange(3, dtype=np.float32)
    network = network_of(model_of([], {"x": (FLOAT, [2])}, ["x", "w"], {"w": w}))
    x = np.ones(2, np.float32)
    found = network({"x": x})
    np.testing.assert_array_equal(found["w"], w)
    found["x"][0] = 7
    assert x[0] == 1


def test_defaults_may_be_given() -> None:
    w = np.ones((2, 2), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of([node], {"x": (FLOAT, [1, 2]), "w": (FLOAT, [2, 2])}, ["y"], {"w": w})
    network = network_of(model)
    x = np.array([[1, 2]], np.float32)
    np.testing.assert_array_equal(network({"x": x})["y"], [[3, 3]])
    np.testing.assert_array_equal(network({"x": x, "w": 2 * w})["y"], [[6, 6]])
    np.testing.assert_array_equal(network({"x": x})["y"], [[3, 3]])


@pytest.mark.parametrize("kind", [INT64, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16])
@pytest.mark.parametrize("op", ["Gemm", "Add"])
def test_inputs_of_several_types_are_refused(op: str, kind: int) -> None:
    """onnxruntime refuses them, and the reference would give products cut to whole numbers."""
    model = model_of(
        [helper.make_node(op, ["x", "w"], ["y"])], {"x": (kind, [4, 4])}, ["y"],
        {"w": np.full((4, 4), 0.4, np.float32)},
    )  # fmt: skip
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    with network_of(model) as network, pytest.raises(UnsupportedError, match="w of FLOAT, which"):
        network({"x": np.ones((4, 4), dtype)})


def test_what_onnxruntime_refuses_the_reference_computes() -> None:
    network = network_of(
        model_of([helper.make_node("Identity", ["x"], ["y"])], {"x": (onnx.TensorProto.INT4, [3])},
                 ["y"])
    )  # fmt: skip
    dtype = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)
    x = np.array([-8, 0, 7]).astype(dtype)
    np.testing.assert_array_equal(network({"x": x})["y"], x)
    assert [on for on, _ in network.plan({"x": x}).where()] == ["reference"]


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({}, r"no input x; the network takes x: FLOAT \[batch, 64\]"),
        ({"z": 1}, "no input 'z'"),
        ([1, 2], r"by name, as {'x': array}, and not as a list; the network takes x: FLOAT"),
        (np.zeros((1, 64), np.float32), "not as a ndarray"),
        ({"x": np.zeros((1, 64))}, "input 'x' is DOUBLE"),
        ({"x": np.zeros((1, 63), np.float32)}, r"shape \[1, 63\]"),
        ({"x": np.zeros(64, np.float32)}, r"shape \[64\]"),
    ],
)
def test_wrong_inputs_are_refused(inputs: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        network_of(linear()[0])(inputs)


def test_a_closed_network_says_so() -> None:
    network = network_of(linear()[0])
    network.close()
    with pytest.raises(HeadraceError, match="closed"):
        network({"x": np.zeros((1, 64), np.float32)})


def test_operators_that_refuse_their_inputs_are_named() -> None:
    node = helper.make_node("Gather", ["w", "i"], ["y"], name="lookup")
    model = model_of([node], {"i": (INT64, [1])}, ["y"], {"w": np.zeros(3, np.float32)})
    with pytest.raises(HeadraceError, match="Gather lookup"):
        network_of(model)({"i": np.array([99])})


# ---- hostile files ------------------------------------------------------------------------------


def _broken(change: Any) -> Any:
    model, _ = linear()
    change(model)
    return model


def _unknown_domain(model: Any) -> None:
    model.graph.node[0].domain = "evil"
    model.opset_import.add(domain="evil", version=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "circle"),
        (lambda m: m.graph.node.reverse(), "circle, or is not in order"),
        (lambda m: m.graph.initializer.pop(), "'w', which nothing makes"),
        (lambda m: m.graph.output.add(name="nowhere"), "'nowhere' is made by nothing"),
        (lambda m: m.graph.node[1].output.__setitem__(0, "x"), "'x', which is there already"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two initialisers"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 40), "ask for"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -64), "not possible"),
        (lambda m: m.graph.initializer[0].dims.extend([1 << 62] * 4), "more elements"),
        (lambda m: m.graph.initializer[0].dims.extend([1] * 99), "not possible"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "unknown"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", b"12"), "2 bytes"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "operator set is 999"),
        (lambda m: m.ClearField("opset_import"), "no operator set"),
        (lambda m: m.ClearField("graph"), "no graph"),
        (_unknown_domain, "operators of 'evil'"),
    ],
)
def test_broken_models_get_one_error(tmp_path: Path, change: Any, match: str) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(_broken(change).SerializeToString())
    with pytest.raises((ModelFileError, UnsupportedError), match=match) as caught:
        headrace.load(path)
    assert "broken.onnx" in str(caught.value)


@pytest.mark.parametrize("name", [b"MatMul", b"product", b"test"])  # operator, value, graph
def test_text_that_is_none_is_refused(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "text.onnx"
    whole = linear()[0].SerializeToString()
    assert name in whole
    path.write_bytes(whole.replace(name, b"\xaa" + name[1:]))
    with pytest.raises(ModelFileError, match=r"text\.onnx.*no UTF-8"):
        headrace.load(path)


@pytest.mark.parametrize(
    ("op", "inputs"), [("Gather", ["x"]), ("Conv", ["x"]), ("Add", ["x", "w", "x"])]
)
def test_nodes_of_too_few_or_many_inputs_are_refused(op: str, inputs: list[str]) -> None:
    nodes = [helper.make_node(op, inputs, ["a"]), helper.make_node("Add", ["a", "w"], ["y"])]
    constants = {"w": np.ones((1, 4), np.float32)}
    network = network_of(model_of(nodes, {"x": (FLOAT, [1, 4])}, ["y"], constants))
    with pytest.raises(HeadraceError, match=op):
        network({"x": np.zeros((1, 4), np.float32)})


@pytest.mark.parametrize("inputs", [["x", "x", ""], ["x", "", "x"]])
def test_inputs_that_an_operator_needs_are_there(inputs: list[str]) -> None:
    model = model_of([helper.make_node("Mean", inputs, ["y"])], {"x": (FLOAT, [3])}, ["y"])
    with pytest.raises(ModelFileError, match=r"Mean.*lacks its input"):  # onnxruntime crashes
        network_of(model)


def test_shape_conflicts_are_refused() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    w = np.zeros((5, 5), np.float32)
    network = network_of(model_of([node], {"x": (FLOAT, [1, 4])}, ["y"], {"w": w}))
    with pytest.raises(HeadraceError, match="MatMul"):
        network({"x": np.zeros((1, 4), np.float32)})


@pytest.mark.parametrize("n", [0, 1, 7, 100, 5000])
def test_truncated_files_are_refused(tmp_path: Path, n: int) -> None:
    whole = linear()[0].SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[:n])
    with pytest.raises(ModelFileError, match=r"cut\.onnx"):
        headrace.load(path)


def _layers() -> tuple[Any, dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "b"], ["y"]),
    ]
    shapes = {"w": (2, 2, 3, 3), "v": (18, 3), "b": (3,)}
    constants = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    model = model_of(nodes, {"x": (FLOAT, [1, 2, 4, 4])}, ["y"], constants)
    return model, {"x": np.zeros((1, 2, 4, 4), np.float32)}


SMALL = [(linear(8)[0], {"x": np.zeros((1, 8), np.float32)}), _layers(), layer("LSTM", n=4)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_give_an_error_or_a_network(data: st.DataObject) -> None:
    import tempfile

    model, x = data.draw(st.sampled_from(SMALL))
    whole = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.onnx"
        path.write_bytes(whole)
        try:
            with headrace.load(path, threads=1) as network:
                network(x)
        except (HeadraceError, ValueError, TypeError):
            pass


def _place(path: Path, **entries: str) -> None:
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    found = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in found.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"location": "/etc/passwd"}, "not below the model's own directory"),
        ({"location": "../weights.bin"}, "not below the model's own directory"),
        ({"location": "a/../../weights.bin"}, "not below the model's own directory"),
        ({"location": "C:\\weights.bin"}, "not below the model's own directory"),
        ({"location": ""}, "not below the model's own directory"),
        ({"location": "gone.bin"}, "put that file beside"),
        ({"location": "."}, "not below the model's own directory"),
        ({"location": "link.bin"}, "behind the link"),
        ({"location": "hard.bin"}, "2 names"),
        ({"location": "fifo"}, "not a regular file"),
        ({"offset": "8"}, "should be at 8"),
        ({"offset": "-1"}, "not a whole number"),
        ({"offset": "9" * 30}, "not a whole number"),
        ({"length": "12"}, "12 bytes"),
    ],
)
def test_external_data_stays_in_its_folder(
    tmp_path: Path, entries: dict[str, str], match: str
) -> None:
    path = save(linear()[0], tmp_path / "linear.onnx", external=True)
    os.symlink(tmp_path / "weights.bin", tmp_path / "link.bin")
    (tmp_path / "hard.bin").write_bytes((tmp_path / "weights.bin").read_bytes())
    os.link(tmp_path / "hard.bin", tmp_path / "other-name.bin")
    os.mkfifo(tmp_path / "fifo")
    _place(path, **entries)
    with pytest.raises(ModelFileError, match=match) as caught:
        headrace.load(path)
    assert "tensor 'w'" in str(caught.value)


def _with_inner_weights(location: str, w: np.ndarray) -> Any:
    """x times weights of a branch, plus weights of an attribute; both lie in another file."""
    inner, held = (TensorProto(name=n, data_type=FLOAT, dims=[8, 8]) for n in ("w", "c"))
    for tensor in (inner, held):
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("t", "e")]
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"])], "then", [], outputs[:1], [inner]
    )
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["e"])], "else", [], outputs[1:])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["b"], to=TensorProto.BOOL),
        helper.make_node("If", ["b"], ["p"], then_branch=then, else_branch=other),
        helper.make_node("Constant", [], ["c"], value=held),
        helper.make_node("Add", ["p", "c"], ["y"]),
    ]
    return model_of(nodes, {"x": (FLOAT, ["n", 8])}, ["y"])


def test_data_of_branches_and_attributes_is_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for one, content in ((folder, w), (elsewhere, 0 * w)):
        one.mkdir()
        (one / "w.bin").write_bytes(content.tobytes())
    path = folder / "x.onnx"
    path.write_bytes(_with_inner_weights("w.bin", w).SerializeToString())
    monkeypatch.chdir(elsewhere)  # where onnxruntime would look
    x = np.ones((8, 8), np.float32)
    with headrace.load(path) as network:
        np.testing.assert_allclose(network({"x": x})["y"], x @ w + w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "link.bin", "short.bin"])
def test_data_of_branches_and_attributes_stays_in_its_folder(tmp_path: Path, location: str) -> None:
    w = np.zeros((8, 8), np.float32)
    (tmp_path / "w.bin").write_bytes(w.tobytes())
    (tmp_path / "short.bin").write_bytes(w.tobytes()[1:])
    os.symlink(tmp_path / "w.bin", tmp_path / "link.bin")
    path = tmp_path / "x.onnx"
    model = _with_inner_weights(location, w)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=r"directory|link|bytes"):
        headrace.load(path)
    with pytest.raises(ModelFileError, match="in another file"):
        network_of(model)


def test_operators_of_onnxruntime_take_sequences() -> None:
    nodes = [
        helper.make_node("SequenceAt", ["s", "i"], ["a"]),
        helper.make_node("BiasGelu", ["a", "b"], ["y"], domain="com.microsoft"),
    ]
    model = model_of(nodes, {"i": (INT64, [])}, ["y"], {"b": np.ones(4, np.float32)})
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", FLOAT, None))
    given = {"s": [np.zeros((2, 4), np.float32), np.full((3, 4), 30, np.float32)]}
    with network_of(model) as network:
        y = network(given | {"i": np.array(1)})["y"]
        assert np.array_equal(y, np.full((3, 4), 31, np.float32))


def _with_functions(calls: dict[str, list[str]]) -> Any:
    """A call of the first function; of each, the operators that it has in a row."""
    of = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    functions = []
    for name, ops in calls.items():
        values = ["x", *(f"v{i}" for i in range(len(ops) - 1)), "y"]
        nodes = [
            helper.make_node(op, [x], [y], domain="f" if op in calls else "")
            for op, x, y in zip(ops, values, values[1:], strict=False)
        ]
        functions.append(helper.make_function("f", name, ["x"], ["y"], nodes, of))
    first = helper.make_node(next(iter(calls)), ["x"], ["y"], domain="f")
    model = model_of([first], {"x": (FLOAT, ["n", 4])}, ["y"])
    model.opset_import.add(domain="f", version=1)
    model.functions.extend(functions)
    return model


def test_functions_take_the_place_of_their_calls() -> None:
    model = _with_functions({"a": ["b", "Relu", "b"], "b": ["Neg", "Neg", "c"], "c": ["Neg"]})
    x = np.array([[-1, 2, -3, 4]], np.float32)
    with network_of(model) as network:
        assert np.array_equal(network({"x": x})["y"], -np.maximum(-x, 0))


@pytest.mark.parametrize(
    ("calls", "match"),
    [
        ({"a": ["a"]}, "'a' calls itself"),
        ({"a": ["b"], "b": ["c", "Relu"], "c": ["a"]}, "calls itself"),
        ({**{f"f{i}": [f"f{i + 1}"] for i in range(300)}, "f300": ["Relu"]}, "depth exceeds"),
        ({**{f"f{i}": [f"f{i + 1}"] * 10 for i in range(9)}, "f9": ["Relu"]}, "1000000000 nodes"),
        ({**{f"f{i}": [f"f{i + 1}"] * 2 for i in range(14)}, "f14": ["Relu"]}, "16384 nodes"),
    ],
)
def test_functions_that_never_end_are_refused(calls: dict[str, list[str]], match: str) -> None:
    with pytest.raises(ModelFileError, match=match):
        network_of(_with_functions(calls))


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([("Add", "x v", "y"), ("Relu", "y", "v")], "reads 'v', which a later node makes"),
        ([("Add", "x outside", "y")], "reads 'outside', which nothing makes"),
        ([("Relu", "x", "v")], "output 'y' is made by nothing"),
    ],
)
def test_functions_that_are_not_in_order(nodes: list[tuple[str, str, str]], match: str) -> None:
    model = _with_functions({"a": ["Relu"]})
    del model.functions[0].node[:]
    model.functions[0].node.extend(helper.make_node(op, x.split(), [y]) for op, x, y in nodes)
    model.graph.node.insert(0, helper.make_node("Neg", ["x"], ["outside"]))
    with pytest.raises(ModelFileError, match=match):
        network_of(model)


def test_attributes_of_another_type() -> None:
    for op, attributes in (
        ("Softmax", {"axis": 0.5}), ("Upsample", {"mode": [1, 2]}), ("Constant", {"value": 3}),
    ):  # fmt: skip
        odd = helper.make_node(op, ["x"] if op != "Constant" else [], ["y"], **attributes)
        with pytest.raises(ModelFileError, match=rf"{op}\) has .* of the type .*export it again"):
            network_of(model_of([odd], {"x": (FLOAT, [2, 3])}, ["y"], opset=9))


def test_branches_that_are_none() -> None:
    none = helper.make_graph([], "none", [], [])
    branches = helper.make_node("If", ["c"], ["y"], then_branch=none, else_branch=none)
    conditions = (np.array(True), np.array([], bool), np.array([True, False]))
    for condition in conditions:
        model = model_of([branches], {"x": (FLOAT, [2])}, ["y"], {"c": condition})
        with network_of(model) as network, pytest.raises(HeadraceError):
            network({"x": np.ones(2, np.float32)})


def test_a_network_in_memory_has_no_files_beside_it() -> None:
    model, w = linear()
    tensor = numpy_helper.from_array(w, "w")
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    model.graph.initializer[0].CopyFrom(tensor)
    with pytest.raises(ModelFileError, match="in another file"):
        network_of(model)


# ---- the command --------------------------------------------------------------------------------


def test_an_array_that_says_it_is_huge(tmp_path: Path, capsys: Any) -> None:
    path = str(save(linear()[0], tmp_path / "linear.onnx"))
    np.save(tmp_path / "x.npy", np.ones((2, 64), np.float32))
    content = (tmp_path / "x.npy").read_bytes().replace(b"(2, 64)", b"(1" + b"0" * 14 + b", 64)")
    (tmp_path / "x.npy").write_bytes(content)
    assert main(["run", path, "--input", f"x={tmp_path / 'x.npy'}"]) == 2
    assert "is no .npy file of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "bench", "plan", "inspect"])
def test_arrays_of_another_type_are_refused(tmp_path: Path, command: str, capsys: Any) -> None:
    path = str(save(linear()[0], tmp_path / "linear.onnx"))
    for array, said in ((np.ones((2, 64)), "DOUBLE"), (np.ones(64, np.float32), "shape [64]")):
        np.save(tmp_path / "x.npy", array)
        assert main([command, path, "--input", f"x={tmp_path / 'x.npy'}"]) == 2
        found = capsys.readouterr().err
        assert said in found and "unexpected" not in found


def test_the_command_runs_a_network(tmp_path: Path, capsys: Any) -> None:
    path = str(save(linear()[0], tmp_path / "linear.onnx"))
    x = np.ones((2, 64), np.float32)
    np.save(tmp_path / "x.npy", x)
    given = f"x={tmp_path / 'x.npy'}"
    assert main(["run", path, "--input", given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["outputs"][0]
    expected = headrace.load(path)({"x": x})["y"]
    np.testing.assert_allclose(found["values"], expected, rtol=1e-6)
    assert main(["run", path, "--input", given, "-o", str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "y.npy"), expected)
    capsys.readouterr()
    np.save(tmp_path / "other.npy", x.astype(">f4"))
    other = f"x={tmp_path / 'other.npy'}"
    assert main(["run", path, "--input", other, "-o", str(tmp_path / "o")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o" / "y.npy"), expected)
    assert main(["run", path, "--input", given, "--input", given]) == 2
    assert "--input x is given twice" in capsys.readouterr().err
    (tmp_path / "x.npy").rename(tmp_path / "y.npy")
    assert main(["run", path, "--input", f"x={tmp_path / 'y.npy'}", "-o", str(tmp_path)]) == 2
    assert "y.npy is an input, and would be replaced" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), x)
    given = f"x={tmp_path / 'y.npy'}"
    for place in ("other.npy", "other.npy/deeper"):
        assert main(["run", path, "--input", given, "-o", str(tmp_path / place)]) == 2
        assert "other.npy is a file, and outputs go to a folder" in capsys.readouterr().err
    named = output_paths(tmp_path, ["a/b", "output0", ".."], [])
    assert [one.name for one in named.values()] == ["output0_.npy", "output0.npy", "output2.npy"]


def test_the_command_describes_and_measures_a_network(tmp_path: Path, capsys: Any) -> None:
    path = str(save(linear()[0], tmp_path / "linear.onnx"))
    assert main(["inspect", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weights_bytes"] == 64 * 64 * 4
    assert facts["operators"][0] == {"operator": "MatMul", "nodes": 1}
    assert main(["inspect", path, "--input", "batch=5"]) == 0
    shown = capsys.readouterr()
    assert "batch = 5" in shown.out and "were taken as" not in shown.err
    assert main(["inspect", path]) == 0
    assert "were taken as batch = 1; --input DIMENSION=SIZE" in capsys.readouterr().err
    # 2^31 rows: known by its type, and too large to be filled at random.
    large = f"batch={(1 << 31) - 1}"
    assert main(["inspect", path, "--input", large]) == 0
    assert main(["bench", path, "--input", large]) == 2
    assert "random numbers of the shape [2147483647, 64] take 1.65 TB" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", np.ones((2, 64), np.float32))
    both = ["--input", f"x={tmp_path / 'x.npy'}", "--input", "batch=2"]
    assert main(["inspect", path, *both]) == 2
    assert "--input batch: all inputs are files" in capsys.readouterr().err
    assert main(["plan", path, "--input", "batch=3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["assumed"] == ["batch = 3"]
    assert facts["activations_bytes"] == 3 * (3 * 64 * 4)  # x, the product and the sum
    assert main(["bench", path, "--input", "batch=2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["best_s"] <= facts["median_s"]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["run", "M", "hello"], "takes no prompt"),
        (["run", "M"], "give --input x=FILE.npy"),
        (["run", "M", "--input", "x"], "write NAME=FILE.npy"),
        (["run", "M", "--temperature", "1"], "takes no temperature"),
        (["run", "M", "-n", "5"], "takes no max-tokens"),
        (["run", "M", "--stop", "x"], "takes no stop"),
        (["run", "M", "--raw"], "takes no raw"),
        (["run", "M", "--input", "z=x.npy"], "has no input 'z'; it takes x: FLOAT"),
        (["run", "M", "--input", "x=gone.npy"], "no file gone.npy"),
        (["run", "M", "--input", "x=M"], "no .npy file"),
        (["plan", "M", "--input", "b=3"], "no input has a dimension 'b'; there are batch"),
        (["bench", "M", "--input", "batch=many"], "no size"),
        (["plan", "M", "--target", "x86-64-v9"], "unknown target 'x86-64-v9'; targets: "),
        (["plan", "M", "--kernels", "pack"], "takes no kernels"),
        (["plan", "M", "--whole-stack"], "takes no whole-stack"),
        (["bench", "M", "--predictor", "gates"], "takes no predictor"),
        (["plan", "M", "--memory", "1kB"], "the least that works is"),
    ],
)
def test_wrong_commands_say_what_to_do(
    tmp_path: Path, capsys: Any, more: list[str], match: str
) -> None:
    path = str(save(linear()[0], tmp_path / "linear.onnx"))
    assert main([path if word == "M" else word.replace("=M", f"={path}") for word in more]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("op", "given", "match"),
    [
        ("Conv", {"strides": [0, 1]}, "strides .0, 1., and each is at least 1"),
        ("Conv", {"dilations": [1, -1]}, "dilations .1, -1., and each is at least 1"),
        ("ConvTranspose", {"pads": [0, 0, -1, 0]}, "pads .0, 0, -1, 0., and each is at least 0"),
        ("Conv", {"pads": [1, 1]}, "pads .1, 1., and 4 are wanted"),
        ("Conv", {"kernel_shape": [2, 2]}, "its weights have the shape .4, 4, 3, 3."),
        ("Conv", {"group": 0}, "has 0 groups"), ("Conv", {"group": 3}, "cannot be cut into"),
        ("MaxPool", {"kernel_shape": [0, 2]}, "kernel_shape .0, 2., and each is at least 1"),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [1]}, "strides .1., and 2 are wanted"),
    ],
)  # fmt: skip
def test_windows_without_size_or_step(op: str, given: dict[str, Any], match: str) -> None:
    inputs = ["x", "w"] if "Conv" in op else ["x"]
    weights = {"w": np.ones((4, 4, 3, 3), np.float32)} if "Conv" in op else {}
    node = helper.make_node(op, inputs, ["y"], **given)
    with pytest.raises(ModelFileError, match=rf"node .*{op}.* {match}"):
        network_of(model_of([node], {"x": (FLOAT, [1, 4, 8, 8])}, ["y"], weights))


def test_weights_of_other_channels_are_refused() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    model = model_of([node], {"x": (FLOAT, [1, 4, 8, 8])}, ["y"], {"w": np.ones((4, 4, 3, 3), "f")})
    with network_of(model) as network, pytest.raises(HeadraceError, match="Conv y: "):
        network({"x": np.ones((1, 4, 8, 8), np.float32)})
