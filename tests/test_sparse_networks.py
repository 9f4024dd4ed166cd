"""Sparse products in networks, and `headrace compress --sparsity` of ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import FLOAT, model_of, save

from headrace.cli import main
from headrace.errors import HeadraceError, UnsupportedError
from headrace.kernels.sparse_product import ROWS, kept_blocks, kernel_of, sparse_weights
from headrace.networks.compression.compress import compress_network
from headrace.networks.compression.pruning import staying
from headrace.networks.compression.sparse_layers import sparse_layers
from headrace.networks.measure import assumed_types, describe
from headrace.networks.native import NativeRegion
from headrace.networks.network import Network, load_network, network_of
from headrace.networks.sparse_choice import kept_of, rows_that_pay

SIZE = (9, 11)


def inverted_residuals(rng: np.random.Generator, weights: Any) -> Any:
    """1x1, depthwise, 1x1 and a sum, twice, between a stem and a classifier."""
    constants: dict[str, np.ndarray] = {"zero": np.array(0, "f4"), "six": np.array(6, "f4")}
    nodes: list[Any] = []

    def conv(x: str, y: str, w: np.ndarray, **attributes: Any) -> str:
        constants[f"{y}_w"] = w.astype(np.float32)
        constants[f"{y}_b"] = (rng.standard_normal(len(w)) * 0.1).astype(np.float32)
        nodes.append(helper.make_node("Conv", [x, f"{y}_w", f"{y}_b"], [y], y, **attributes))
        return y

    def clip(x: str) -> str:
        nodes.append(helper.make_node("Clip", [x, "zero", "six"], [f"{x}_6"]))
        return f"{x}_6"

    x = conv("x", "stem", rng.standard_normal((32, 3, 3, 3)) * 0.3, pads=[1, 1, 1, 1])
    for i in range(2):
        wide = conv(x, f"up{i}", weights(160, 32)[:, :, None, None] * 0.3)
        deep = rng.standard_normal((160, 1, 3, 3)) * 0.3
        mixed = conv(clip(wide), f"deep{i}", deep, group=160, pads=[1, 1, 1, 1])
        back = conv(clip(mixed), f"down{i}", weights(32, 160)[:, :, None, None] * 0.15)
        nodes.append(helper.make_node("Add", [back, x], [f"sum{i}"]))
        x = f"sum{i}"
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    constants["fc_w"] = weights(20, 32)
    nodes.append(helper.make_node("Gemm", ["flat", "fc_w"], ["y"], "fc", transB=1))
    return model_of(nodes, {"x": (FLOAT, ["images", 3, *SIZE])}, ["y", x], constants, opset=17)


def reference(model: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """What onnxruntime computes."""
    raw = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


def kernels(network: Network, x: np.ndarray) -> list[str]:
    (region,) = [run for run in network.plan({"x": x}).runs if isinstance(run, NativeRegion)]
    return [one.kernel for one in region.operations]


@pytest.mark.parametrize("rows", ROWS)
def test_sparse_weights_give_what_onnxruntime_gives_on_any_number_of_threads(rows: int) -> None:
    rng = np.random.default_rng(rows)
    model = inverted_residuals(rng, lambda *shape: sparse_weights(rng, shape, rows, 0.2))
    x = rng.standard_normal((2, 3, *SIZE)).astype(np.float32)
    expected, found = reference(model, x), []
    for threads in (1, 2, 3):
        with network_of(model, threads=threads) as network:
            found.append(network({"x": x}))
            assert kernels(network, x).count(kernel_of(rows)) == 4
    for name, value in expected.items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-4, atol=1e-4)
        assert len({one[name].tobytes() for one in found}) == 1


def test_a_matrix_of_an_encoder_is_sparse() -> None:
    rng = np.random.default_rng(3)
    w = sparse_weights(rng, (96, 64), 4, 0.2).T.copy()
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    model = model_of(nodes, {"x": (FLOAT, [1, 50, 64])}, ["y"], {"w": w})
    x = rng.standard_normal((1, 50, 64)).astype(np.float32)
    with network_of(model, threads=2) as network:
        assert kernel_of(4) in kernels(network, x)
        np.testing.assert_allclose(
            network({"x": x})["y"], reference(model, x)["y"], rtol=1e-4, atol=1e-4
        )


def test_the_kernel_is_chosen_by_what_is_zero() -> None:
    rng = np.random.default_rng(4)

    def chosen(rows: int, density: float, pixels: int = 196) -> int | None:
        kept = kept_of(sparse_weights(rng, (480, 80), rows, density))
        return rows_that_pay(kept, pixels, 80, 480)

    assert chosen(1, 1.0) is None  # nothing is zero
    assert chosen(1, 0.6) is None  # too little
    assert chosen(1, 0.2) == 1
    assert chosen(4, 0.6) == 4
    assert chosen(16, 0.6) == 16
    assert chosen(16, 0.95) is None
    assert chosen(1, 0.1, pixels=1) is None


def test_inspect_says_which_layers_are_sparse() -> None:
    rng = np.random.default_rng(5)
    model = inverted_residuals(rng, lambda *shape: sparse_weights(rng, shape, 4, 0.2))
    with network_of(model, threads=1) as network:
        rows = describe(network, assumed_types(network, {}))["sparse"]
    assert [row["layer"] for row in rows] == [
        f"Conv {n}{i}" for i in (0, 1) for n in ("up", "down")
    ]
    assert all(row["blocks"] == "4x1" and 0.7 < row["zeros"] < 0.9 for row in rows)


def test_blocks_with_the_least_go() -> None:
    score = np.arange(24, dtype=np.float32).reshape(6, 4)
    # Sums of the first block are 24, 28, 32, 36; of the two rows that are left 36, 38, 40, 42.
    stays = staying(score, 4, 0.5)
    assert not stays[:4].any() and stays[4:].all()
    stays = staying(score, 4, 0.25)
    assert stays.tolist() == [[False, False, True, True]] * 4 + [[True] * 4] * 2
    assert staying(score, 1, 0.25).sum() == 18
    assert not staying(score, 1, 0.25).ravel()[:6].any()


def samples(rng: np.random.Generator, folder: Path, n: int) -> np.ndarray:
    """Inputs whose channels and pixels go together, in a file each."""
    folder.mkdir()
    base = rng.standard_normal((n, 1, *SIZE)) + rng.standard_normal((n, 3, 1, 1))
    x = (base + 0.3 * rng.standard_normal((n, 3, *SIZE))).astype(np.float32)
    for i in range(n):
        np.save(folder / f"{i:03}.npy", x[i : i + 1])
    return x


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "group"])
def test_compressed_files_have_zeros_and_calibration_makes_up_for_them(
    tmp_path: Path, pattern: str
) -> None:
    rng = np.random.default_rng(6)
    model = inverted_residuals(rng, lambda *shape: rng.standard_normal(shape).astype(np.float32))
    src, folder = save(model, tmp_path / "a.onnx"), tmp_path / "inputs"
    samples(rng, folder, 12)
    x = samples(rng, tmp_path / "others", 4)
    wanted, off = reference(model, x), {}
    for name, inputs in (("plain", None), ("calibrated", folder)):
        dst = tmp_path / f"{name}.onnx"
        done = compress_network(src, dst, sparsity=0.6, pattern=pattern, calibrate=inputs)
        assert done.sparse_layers == 4 and abs(done.sparsity - 0.6) < 0.01
        written = onnx.load(dst)
        onnx.checker.check_model(written)
        rows = {"1x1": 1, "4x1": 4, "group": 16}[pattern]
        for layer in sparse_layers(written):
            if layer.ends:
                assert layer.matrix().all()
            else:
                assert abs(kept_blocks(layer.matrix(), rows).mean() - 0.4) < 0.01
        found = reference(str(dst), x)
        off[name] = float(np.square(found["sum1"] - wanted["sum1"]).mean())
        with loaded(dst) as network:
            np.testing.assert_allclose(network({"x": x})["y"], found["y"], rtol=1e-3, atol=1e-4)
    assert off["calibrated"] < 0.6 * off["plain"], off


def loaded(path: Path) -> Network:
    return load_network(path, threads=2)


def test_a_network_of_tokens_is_calibrated(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"]),
        helper.make_node("MatMul", ["e", "up"], ["a"]),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "down"], ["d"]),
        helper.make_node("Add", ["d", "e"], ["y"]),
    ]
    constants = {
        "table": normal(50, 8) @ normal(8, 32), "up": normal(32, 64), "bias": normal(64),
        "down": normal(64, 32),
    }  # fmt: skip
    model = model_of(nodes, {"x": (onnx.TensorProto.INT64, ["n", "t"])}, ["y"], constants)
    src, off = save(model, tmp_path / "a.onnx"), []
    np.save(tmp_path / "ids.npy", rng.integers(0, 50, (20, 7)))
    x = rng.integers(0, 50, (4, 9))
    wanted = reference(model, x)["y"]
    for inputs in (None, tmp_path / "ids.npy"):
        done = compress_network(
            src, tmp_path / "b.onnx", sparsity=0.5, calibrate=inputs, force=True
        )
        assert done.sparse_layers == 2
        off.append(float(np.square(reference(str(done.path), x)["y"] - wanted).mean()))
    assert off[1] < 0.5 * off[0], off
    np.save(tmp_path / "ids.npy", np.zeros((2, 7), np.float32))
    with pytest.raises(HeadraceError, match="float32 numbers for input x"):
        compress_network(src, tmp_path / "c.onnx", sparsity=0.5, calibrate=tmp_path / "ids.npy")


def test_the_last_layer_is_pruned_when_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    model = inverted_residuals(rng, lambda *shape: rng.standard_normal(shape).astype(np.float32))
    src, dst = save(model, tmp_path / "a.onnx"), tmp_path / "b.onnx"
    assert main(["compress", str(src), str(dst), "--sparsity", "0.5", "--ends", "sparse"]) == 0
    zeros = {
        layer.node.name or layer.node.op_type: float((layer.matrix() == 0).mean())
        for layer in sparse_layers(onnx.load(dst))
    }
    assert len(zeros) == 5 and all(abs(share - 0.5) < 0.01 for share in zeros.values()), zeros


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = np.ones((20, 3, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    src = save(model_of([node], {"x": (FLOAT, [1, 3, 5, 5])}, ["y"], {"w": w}), tmp_path / "a.onnx")
    dst = tmp_path / "b.onnx"
    with pytest.raises(UnsupportedError, match="no 1x1 convolutions or matrices"):
        compress_network(src, dst, sparsity=0.5)
    for given, said in (
        ({}, "nothing to do"),
        ({"sparsity": 1.5}, "share of weights"),
        ({"sparsity": 0.5, "pattern": "2x2"}, "one of 1x1, 4x1, group"),
        ({"pattern": "4x1", "format": "int8", "calibrate": tmp_path}, "--sparsity"),
    ):
        with pytest.raises(HeadraceError, match=said):
            compress_network(src, dst, **given)
    assert not dst.exists()
    assert main(["compress", "no-such-model.gguf", str(dst), "--pattern", "4x1"]) == 2
    assert "--pattern is for ONNX files" in capsys.readouterr().err


def test_layers_that_share_weights_stay(tmp_path: Path) -> None:
    w = np.random.default_rng(8).standard_normal((32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [4, 32])}, ["y"], {"w": w})
    assert sparse_layers(model) == []
    assert numpy_helper.to_array(model.graph.initializer[0]).all()


@pytest.mark.parametrize("way", [{"sparsity": 0.5, "ends": True}, {"format": "i4_g32"}])
def test_products_that_share_a_bias(way: dict[str, Any], tmp_path: Path) -> None:
    """Each gets the one that makes up for its own weights: as if they were two all along."""
    rng = np.random.default_rng(8)
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w1", "b1"], ["y"]),
    ]
    bias = rng.standard_normal(64).astype(np.float32)
    constants = {f"w{i}": rng.standard_normal((64, 64)).astype(np.float32) / 8 for i in (0, 1)}
    np.save(tmp_path / "x.npy", rng.standard_normal((40, 64)).astype(np.float32))
    x, found = rng.standard_normal((5, 64)).astype(np.float32), []
    for share in (False, True):
        last = helper.make_node("Gemm", ["b", "w1", "b0" if share else "b1"], ["y"])
        biases = {"b0": bias} if share else {"b0": bias, "b1": bias}
        model = model_of([*nodes[:2], last], {"x": (FLOAT, ["n", 64])}, ["y"], constants | biases)
        done = compress_network(
            save(model, tmp_path / "a.onnx"), tmp_path / f"{share}.onnx",
            calibrate=tmp_path / "x.npy", **way,
        )  # fmt: skip
        found.append(reference(str(done.path), x)["y"])
    np.testing.assert_array_equal(*found)
