"""`headrace compress x.onnx --format int8`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import FLOAT, linear, model_of, random_network, save

from headrace.cli import main
from headrace.errors import HeadraceError, UnsupportedError
from headrace.networks.compression.compress import compress_network
from headrace.networks.compression.ranges import Histogram
from headrace.networks.network import network_of

SHAPE = (2, 3, 29, 34)


def run(model: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A network in float32, and a folder `inputs` beside it."""
    rng = np.random.default_rng(11)
    path = tmp_path / "float.onnx"
    onnx.save(random_network(rng), path)
    (tmp_path / "inputs").mkdir()
    for i in range(3):
        np.save(tmp_path / "inputs" / f"{i}.npy", rng.standard_normal(SHAPE).astype(np.float32))
    return path


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative error."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_file_runs_everywhere_and_is_close(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    done = compress_network(source, target, format="int8", calibrate=tmp_path / "inputs")
    assert done.integer_nodes == {
        "Conv": 5, "Add": 2, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip
    assert done.samples == 3 and done.size_bytes == target.stat().st_size
    model = onnx.load(target)
    onnx.checker.check_model(model)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert any(np.abs(numpy_helper.to_array(one)).max() == 127 for one in weights)
    x = np.random.default_rng(12).standard_normal(SHAPE).astype(np.float32)
    expected, theirs = run(source, x), run(target, x)
    with network_of(model, threads=2) as network:
        ours = network({"x": x})
        assert [kind for kind, _ in network.plan({"x": x}).where()] == ["headrace"]
    for name, value in expected.items():
        assert off(theirs[name], value) < 0.05
        assert off(ours[name], value) < 0.05


def test_the_same_file_comes_out_again(source: Path, tmp_path: Path) -> None:
    contents = set()
    for i in range(2):
        target = tmp_path / f"{i}.onnx"
        compress_network(source, target, format="int8", calibrate=tmp_path / "inputs")
        contents.add(target.read_bytes())
    assert len(contents) == 1


def test_batch_normalisation_goes_into_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    constants = {
        "w": rng.standard_normal((8, 6, 1, 1)).astype(np.float32),
        **{n: rng.uniform(0.5, 2, 8).astype(np.float32) for n in ("scale", "bias", "mean", "var")},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    onnx.save(model_of(nodes, {"x": (FLOAT, [1, 6, 5, 5])}, ["y"], constants), tmp_path / "a.onnx")
    x = rng.standard_normal((1, 6, 5, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    compress_network(
        tmp_path / "a.onnx", tmp_path / "b.onnx", format="int8", calibrate=tmp_path / "x.npy"
    )
    ops = {node.op_type for node in onnx.load(tmp_path / "b.onnx").graph.node}
    assert ops == {"QuantizeLinear", "DequantizeLinear", "Conv"}  # bytes begin at zero: no Relu
    assert off(run(tmp_path / "b.onnx", x)["y"], run(tmp_path / "a.onnx", x)["y"]) < 0.02


def test_biases_bring_means_back(tmp_path: Path) -> None:
    # Weights far below their channel's largest are rounded to nothing, inputs are all positive.
    w = np.full((4, 40, 1, 1), 0.003, np.float32)
    w[:, 0] = 1
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    onnx.save(model_of([node], {"x": (FLOAT, [1, 40, 6, 6])}, ["y"], {"w": w}), tmp_path / "a.onnx")
    x = np.random.default_rng(14).uniform(0, 1, (4, 40, 6, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)  # four calls
    compress_network(
        tmp_path / "a.onnx", tmp_path / "b.onnx", format="int8", calibrate=tmp_path / "x.npy"
    )
    both = [np.mean([run(tmp_path / f"{name}.onnx", one[None])["y"] for one in x]) for name in "ab"]
    assert abs(both[0] - both[1]) < 5e-4  # of 0.06 that are rounded away


def test_ranges_leave_out_what_is_rare() -> None:
    values = np.random.default_rng(15).standard_normal(1_000_000).astype(np.float32)
    values[0] = 40
    histogram = Histogram(float(values.min()), 40.0)
    histogram.add(values)
    low, high = histogram.range()
    assert -5 < low < -2 and high < 20
    plain = Histogram(0.0, 6.0)
    plain.add(np.random.default_rng(15).uniform(0, 6, 100_000))
    assert plain.range() == (0.0, 6.0)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "has no .npy or .npz files"),
        ({"a.npy": np.zeros((2, 4, 29, 34), np.float32)}, "has the shape [2, 4, 29, 34]"),
        ({"a.npy": np.full(SHAPE, np.nan, np.float32)}, "no numbers"),
        ({"a.npz": {"y": np.zeros(SHAPE, np.float32)}}, "has no array 'x'"),
    ],
)
def test_inputs_that_do_not_fit(arrays: Any, words: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir()
    for name, array in arrays.items():
        if name.endswith("npz"):
            np.savez(folder / name, **array)
        else:
            np.save(folder / name, array)
    with pytest.raises(HeadraceError) as error:
        compress_network(source, tmp_path / "int8.onnx", format="int8", calibrate=folder)
    assert words in str(error.value)
    assert not list(tmp_path.glob("*int8*"))


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    with pytest.raises(UnsupportedError, match="int8"):
        compress_network(source, tmp_path / "a.onnx", format="q4_0", calibrate=inputs)
    with pytest.raises(HeadraceError, match="--calibrate"):
        compress_network(source, tmp_path / "a.onnx", format="int8", calibrate=None)
    with pytest.raises(HeadraceError, match="exists"):
        compress_network(source, source, format="int8", calibrate=inputs)
    node = helper.make_node("Sin", ["x"], ["y"])
    onnx.save(model_of([node], {"x": (FLOAT, [2])}, ["y"]), tmp_path / "sin.onnx")
    np.save(tmp_path / "two.npy", np.zeros(2, np.float32))
    with pytest.raises(UnsupportedError, match="no products"):
        compress_network(
            tmp_path / "sin.onnx", tmp_path / "a.onnx", format="int8",
            calibrate=tmp_path / "two.npy",
        )  # fmt: skip


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(source), str(tmp_path / "int8.onnx"), "--format", "int8"]
    inputs = ["--calibrate", str(tmp_path / "inputs")]
    others = tmp_path / "others.npy"
    np.save(others, np.random.default_rng(16).standard_normal(SHAPE).astype(np.float32))
    assert main([*words, *inputs, "--evaluate", str(others), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["integer_nodes"]["Conv"] == 5 and facts["samples"] == 3
    x = np.load(others)
    both = [run(path, x) for path in (source, tmp_path / "int8.onnx")]
    price = facts["price"]["outputs"]
    assert price.keys() == {"y", "sum"} and "top_1_agreement" not in price["sum"]
    same = (both[0]["y"].argmax(1) == both[1]["y"].argmax(1)).mean()
    assert price["y"]["top_1_agreement"] == same
    # onnxruntime's own run sums in integers.
    assert price["y"]["relative_error"] == pytest.approx(off(both[1]["y"], both[0]["y"]), rel=0.2)
    assert main([*words, *inputs]) == 2
    assert "exists; use --force" in capsys.readouterr().err
    itself = tmp_path / "other_name.onnx"
    itself.hardlink_to(source)
    before = source.read_bytes()
    assert main(["compress", str(source), str(itself), *words[3:], *inputs, "--force"]) == 2
    assert "is a file of the model to be read" in capsys.readouterr().err
    assert source.read_bytes() == itself.read_bytes() == before
    assert main([*words, *inputs, "--force", "--rank", "2"]) == 2
    assert "an ONNX file takes no --rank" in capsys.readouterr().err


def test_products_without_biases(tmp_path: Path) -> None:
    w = np.random.default_rng(2).standard_normal((32, 48)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    onnx.save(model_of(nodes, {"x": (FLOAT, [4, 32])}, ["y"], {"w": w}), tmp_path / "x.onnx")
    x = np.random.default_rng(3).standard_normal((4, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    compress_network(
        tmp_path / "x.onnx", tmp_path / "y.onnx", format="int8", calibrate=tmp_path / "x.npy"
    )
    assert off(run(tmp_path / "y.onnx", x)["y"], x @ w) < 0.03


@pytest.mark.parametrize("format", ["int8", "int8-dynamic"])
def test_weights_that_have_the_names_we_would_give(format: str, tmp_path: Path) -> None:
    """MXNet names what `fc1` makes `fc1` and its weights `fc1_weight`."""
    rng = np.random.default_rng(12)
    names = ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]
    constants = {
        name: (rng.standard_normal((32, 32) if "weight" in name else 32) / 6).astype(np.float32)
        for name in names
    }
    nodes = [
        helper.make_node("Gemm", ["x", *names[:2]], ["fc1"]),
        helper.make_node("Relu", ["fc1"], ["relu1"]),
        helper.make_node("Gemm", ["relu1", *names[2:]], ["fc2"]),
    ]
    source, written = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(model_of(nodes, {"x": (FLOAT, ["n", 32])}, ["fc2"], constants, opset=17), source)
    x = rng.standard_normal((20, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    inputs = {"calibrate": tmp_path / "x.npy"} if format == "int8" else {}
    compress_network(source, written, format=format, **inputs)
    made = [one.name for one in onnx.load(written).graph.initializer]
    assert len(set(made)) == len(made)
    assert off(run(written, x)["fc2"], run(source, x)["fc2"]) < 0.05


def test_files_of_the_source_stay_and_count(tmp_path: Path) -> None:
    model, _ = linear()
    source, data = save(model, tmp_path / "x.onnx"), tmp_path / "weights.onnx"
    whole = source.stat().st_size
    onnx.save(model, source, save_as_external_data=True, location=data.name, size_threshold=0)
    before = data.read_bytes()
    done = compress_network(source, tmp_path / "y.onnx", format="int8-dynamic")
    assert whole <= done.source_bytes == source.stat().st_size + len(before) < whole + 200
    with pytest.raises(HeadraceError, match="is a file of the model to be read"):
        compress_network(source, data, format="int8-dynamic", force=True)
    assert data.read_bytes() == before


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:200], lambda data: data[:60] + b"???" + data[63:], lambda _: b""]
)
def test_damaged_archives_of_inputs(spoil: Any, tmp_path: Path) -> None:
    save(linear()[0], tmp_path / "x.onnx")
    at = tmp_path / "in.npz"
    np.savez_compressed(at, x=np.arange(640, dtype=np.float32).reshape(10, 64))
    at.write_bytes(spoil(at.read_bytes()))
    with pytest.raises(HeadraceError, match=r"in\.npz is no \.npy or \.npz file of numbers"):
        compress_network(tmp_path / "x.onnx", tmp_path / "y.onnx", format="int8", calibrate=at)
