"""Products of rows by 8-bit integers, dense and sparse: files that we write, and their kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_encoders import encoder, tokens
from onnx_models import FLOAT, model_of, save
from test_native_networks import native, reference

import headrace.networks.operators.sparse_dynamic
from headrace.cli import main
from headrace.errors import HeadraceError, UnsupportedError
from headrace.kernels.sparse_product import kept_blocks
from headrace.kernels.sparse_product_u8 import NAME, ROWS, fours_of, sparse_codes
from headrace.networks.compression.compress import compress_network
from headrace.networks.compression.sparse_layers import sparse_layers
from headrace.networks.measure import assumed_types, describe
from headrace.networks.network import load_network, network_of
from headrace.networks.sparse_choice import int8_pays

LAYERS = 2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = encoder(np.random.default_rng(1), "new", layers=LAYERS, heads=4, width=64)
    return save(model, tmp_path / "floats.onnx")


def kernels(network: Any, inputs: Any) -> list[str]:
    (region,) = native(network, inputs)
    return [one.kernel for one in region.operations]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    # Where a sum rounds otherwise, a code may be the next one: some hundredths, in a few places.
    assert float(np.sqrt(((found - expected) ** 2).mean())) < 0.01
    assert float(np.abs(found - expected).max()) < 0.2


def test_an_encoder_of_integers(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "int8.onnx"
    assert main(["compress", str(source), str(path), "--format", "int8-dynamic"]) == 0
    assert f"{6 * LAYERS} nodes of integers" in capsys.readouterr().err
    assert path.stat().st_size < 0.5 * source.stat().st_size
    inputs = tokens(np.random.default_rng(2), 2, 20)
    floats = reference(onnx.load(source), inputs)["y"]
    expected = reference(onnx.load(path), inputs)["y"]
    assert 0 < float(np.abs(expected - floats).mean()) < 0.05
    with load_network(path, threads=2) as network:
        # Queries, keys and values are one product.
        assert kernels(network, inputs).count("convolution_u8") == 4 * LAYERS
        close(network(inputs)["y"], expected)


def test_a_sparse_encoder_of_integers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    np.savez(tmp_path / "ids.npz", **tokens(rng, 70, 8))  # type: ignore[arg-type]
    done = compress_network(
        source, tmp_path / "sparse.onnx", format="int8-dynamic", sparsity=0.8, pattern="4x1",
        calibrate=tmp_path,
    )  # fmt: skip
    path = done.path
    assert done.samples == 70  # of images fewer are looked at
    # These matrices are too small for it to be faster.
    choice = headrace.networks.operators.sparse_dynamic
    monkeypatch.setattr(choice, "int8_pays", lambda *sizes: True)
    inputs, found = tokens(rng, 3, 30), []
    for threads in (1, 2, 3):
        with load_network(path, threads=threads) as network:
            found.append(network(inputs)["y"])
            assert kernels(network, inputs).count(NAME) == 4 * LAYERS
            rows = describe(network, assumed_types(network, {"batch": 3, "tokens": 30}))["sparse"]
    assert len(rows) == 4 * LAYERS
    assert all(row["blocks"] == "4x1" and 0.75 < row["zeros"] < 0.9 for row in rows)
    close(found[0], reference(onnx.load(path), inputs)["y"])
    # Sums of integers are exact: a dense kernel gives the same bits.
    monkeypatch.setattr(choice, "int8_pays", lambda *sizes: False)
    with load_network(path, threads=2) as network:
        found.append(network(inputs)["y"])
        assert NAME not in kernels(network, inputs)
    assert len({one.tobytes() for one in found}) == 1


def test_zeros_of_others_are_left_out_where_that_is_faster() -> None:
    rng = np.random.default_rng(4)

    def pays(density: float, rows: int, matrices: bool = False) -> bool:
        fours = int(fours_of(kept_blocks(sparse_codes(rng, (384, 384), density), ROWS)).sum())
        return int8_pays(fours, rows, 384, 384, matrices)

    assert pays(0.2, 128) and pays(0.5, 128) and pays(0.2, 64) and pays(0.2, 128, True)
    assert not pays(1.0, 128) and not pays(0.2, 4) and not pays(0.5, 128, True)


def test_gemm_and_what_is_no_product_of_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    constants = {
        "w": rng.standard_normal((40, 70)).astype(np.float32),
        "b": rng.standard_normal(40).astype(np.float32),
        "v": rng.standard_normal((5, 9)).astype(np.float32),
    }
    constants["w"][7] = 0  # an output without weights
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"], transB=1),
        helper.make_node("MatMul", ["v", "x"], ["c"]),  # the constant is on the other side
        helper.make_node("Gemm", ["c", "w"], ["y"], transB=1),
    ]
    model = model_of(nodes, {"x": (FLOAT, [9, 70])}, ["a", "y"], constants)
    src, x = save(model, tmp_path / "a.onnx"), rng.standard_normal((9, 70)).astype(np.float32)
    done = compress_network(src, tmp_path / "b.onnx", format="int8-dynamic")
    assert done.integer_nodes == {"Gemm": 2}
    written = onnx.load(done.path)
    expected = reference(written, {"x": x})
    np.testing.assert_allclose(expected["a"], reference(model, {"x": x})["a"], atol=0.6)
    np.testing.assert_array_equal(expected["a"][:, 7], np.broadcast_to(constants["b"][7], 9))
    with network_of(written, threads=1) as network:
        for name, value in network({"x": x}).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-3)
    with pytest.raises(HeadraceError, match="looks at no inputs"):
        compress_network(src, done.path, format="int8-dynamic", calibrate=tmp_path, force=True)
    only = model_of([nodes[1]], {"x": (FLOAT, [9, 70])}, ["c"], {"v": constants["v"]})
    src = save(only, tmp_path / "c.onnx")
    with pytest.raises(UnsupportedError, match="no matrices of float32"):
        compress_network(src, tmp_path / "d.onnx", format="int8-dynamic")


def test_what_is_added_to_all_rows_keeps_their_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    constants = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("w", (64, 32)), ("b", (32,)), ("v", (32, 32)), ("c", (32,)))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["b", "a"], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["p"]),
        helper.make_node("Add", ["p", "c"], ["q"]),
        helper.make_node("Relu", ["p"], ["y"]),  # so c is not added to all that is read
        helper.make_node("Mul", ["q", "y"], ["z"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, ["n", 64])}, ["z"], constants)
    assert [None if one.bias is None else one.bias.name for one in sparse_layers(model)] == [
        "b", None,
    ]  # fmt: skip
    src = save(model, tmp_path / "a.onnx")
    x = (rng.standard_normal((200, 64)) + 2).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    done = compress_network(
        src, tmp_path / "b.onnx", sparsity=0.6, pattern="4x1", calibrate=tmp_path / "x.npy"
    )
    held = onnx.load(done.path).graph.initializer
    written = {one.name: numpy_helper.to_array(one) for one in held}
    before = (x @ constants["w"] + constants["b"]).mean(0)
    after = (x[:64] @ written["w"] + written["b"]).mean(0)
    wanted = (x[:64] @ constants["w"] + constants["b"]).mean(0)
    assert np.abs(after - wanted).max() < 1e-3 < np.abs(before).max()


@pytest.mark.parametrize("width", [6, 17, 36, 48])
@pytest.mark.parametrize("before", ["Add", "Split"])
def test_ranges_are_those_of_the_channels_alone(before: str, width: int) -> None:
    """A row's last vector has more behind the channels: a constant, or what was there before."""
    rng = np.random.default_rng(9)
    makers = {
        "Add": [helper.make_node("Add", ["x", "seven"], ["z"])],
        "Split": [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Split", ["r", "parts"], ["first", "z"], axis=2),
        ],
    }
    nodes = [
        *makers[before],
        helper.make_node("DynamicQuantizeLinear", ["z"], ["q", "s", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["m"]),
        helper.make_node("Mul", ["f", "m"], ["y"]),
    ]
    constants = {
        "w": rng.integers(-127, 128, (width, 16)).astype(np.int8),
        "ws": np.full(16, 0.01, np.float32),
        "seven": np.float32(7),
        "parts": np.array([16, width], np.int64),
    }
    read = {name for node in nodes for name in node.input}
    constants = {name: value for name, value in constants.items() if name in read}
    shape = [3, 14, width + 16 * (before == "Split")]
    model = model_of(nodes, {"x": (FLOAT, shape)}, ["y"], constants)
    x = rng.standard_normal(shape).astype(np.float32) - 5 * (before == "Add")
    expected = reference(model, {"x": x})["y"]
    with network_of(model, threads=1) as network:
        assert "dynamic_rows" in kernels(network, {"x": x})
        found = network({"x": x})["y"]
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)
