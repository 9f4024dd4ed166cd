"""`headrace compress x.onnx --format i4_g32` and the like: MatMulNBits out of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import FLOAT, model_of

import headrace
from headrace.cli import main
from headrace.errors import HeadraceError, UnsupportedError
from headrace.networks.compression.compress import compress_network
from headrace.networks.compression.four_bits import FORMATS
from headrace.sparse.n_bits import WEIGHTS
from headrace.sparse.n_bits_fit import grid

RNG = np.random.default_rng(5)


def chain(inputs: int = 96) -> Any:
    """x [batch, inputs] through a MatMul, Relu, and a Gemm with a bias."""
    rng = np.random.default_rng(6)
    constants = {
        "w": rng.standard_normal((inputs, 64)).astype(np.float32),
        "v": rng.standard_normal((40, 64)).astype(np.float32) + np.float32(0.5),
        "b": rng.standard_normal(40).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "b"], ["y"], name="last", transB=1),
    ]
    return model_of(nodes, {"x": (FLOAT, ["batch", inputs])}, ["y"], constants)


def weights(model: Any) -> dict[str, np.ndarray]:
    """What a file's products multiply by, [outputs, inputs], as ONNX Runtime says it."""
    held = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        of = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        packed = held[node.input[1]]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(of["N"], -1, of["block_size"])
        zeros = np.full(codes.shape[:2], 8)
        if len(node.input) > 3 and node.input[3]:
            pairs = held[node.input[3]].reshape(of["N"], -1)
            zeros = np.stack([pairs & 15, pairs >> 4], -1).reshape(of["N"], -1)
            zeros = zeros[:, : codes.shape[1]]
        steps = codes.astype(np.int64) - zeros[..., None]
        values = steps * held[node.input[2]].reshape(of["N"], -1, 1)
        found[node.name] = values.reshape(of["N"], -1)[:, : of["K"]]
    return found


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_grid_says_what_blocks_decode_to() -> None:
    x = RNG.standard_normal((5, 256)).astype(np.float32)
    x[0, :32], x[1, 32:64] = 0, np.abs(x[1, 32:64]) + 3
    for group in WEIGHTS:
        for symmetric in (False, True):
            of = grid(group, symmetric)
            raw = of.round(x, of.fit(x, None))
            scale, offset = of.scales(raw)
            assert offset is not None
            steps = np.abs(scale).repeat(group, 1)  # ranges may be cut, at both ends
            error = np.abs(WEIGHTS[group].decode(raw) - x)
            assert (error[2:] <= 2.5 * steps[2:]).all() and not error[0, :32].any()
            if symmetric:
                np.testing.assert_allclose(offset, scale * -8, rtol=1e-6)
            # What range alone gives is never better.
            plain = WEIGHTS[group].decode(WEIGHTS[group].encode(x))
            if not symmetric:
                assert np.square(error).sum() <= np.square(plain - x).sum()


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_runs_everywhere_and_is_close(format: str, tmp_path: Path) -> None:
    group, symmetric = FORMATS[format]
    inputs = 256 if group == 128 else 96  # of 64: the last group is padded
    source = tmp_path / "x.onnx"
    onnx.save(chain(inputs), source)
    done = compress_network(source, tmp_path / "y.onnx", format=format)
    assert done.four_bits == 2
    written = onnx.load(tmp_path / "y.onnx")
    found = weights(written)
    given = {one.name: numpy_helper.to_array(one) for one in chain(inputs).graph.initializer}
    assert off(found["first"], given["w"].T) < (0.12 if symmetric else 0.1)
    assert off(found["last"], given["v"]) < 0.13
    x = RNG.standard_normal((3, inputs)).astype(np.float32)
    exact = np.maximum(x @ found["first"].T, 0) @ found["last"].T + given["b"]
    session = onnxruntime.InferenceSession(tmp_path / "y.onnx")
    assert off(session.run(None, {"x": x})[0], exact) < 0.02  # activations are bytes
    with headrace.load(tmp_path / "y.onnx", threads=1) as network:
        assert off(network({"x": x})["y"], exact) < 0.02


def test_inputs_make_it_better(tmp_path: Path) -> None:
    """GPTQ, on inputs that go together and a few that are large."""
    rng = np.random.default_rng(7)
    source = tmp_path / "x.onnx"
    onnx.save(chain(), source)
    mix = rng.standard_normal((96, 96)) * np.where(np.arange(96) % 17, 1, 12)

    def some(n: int) -> np.ndarray:
        return (rng.standard_normal((n, 96)) @ mix).astype(np.float32)

    (tmp_path / "in").mkdir()
    for i in range(4):
        np.save(tmp_path / "in" / f"{i}.npy", some(96))
    x = some(200)
    expected = onnxruntime.InferenceSession(source).run(None, {"x": x})[0]
    errors = []
    for calibrate in (None, tmp_path / "in"):
        target = tmp_path / f"{calibrate is None}.onnx"
        compress_network(source, target, format="i4_g32", calibrate=calibrate)
        errors.append(off(onnxruntime.InferenceSession(target).run(None, {"x": x})[0], expected))
    assert errors[1] < 0.8 * errors[0]


def test_what_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "x.onnx"
    onnx.save(chain(), source)
    with pytest.raises(HeadraceError, match="--format i4_g32 and --sparsity do not go together"):
        compress_network(source, tmp_path / "y.onnx", format="i4_g32", sparsity=0.5)
    with pytest.raises(UnsupportedError, match="i4a_g64"):
        compress_network(source, tmp_path / "y.onnx", format="i4_g16")
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [1, 4])}, ["y"])
    onnx.save(relu, source)
    with pytest.raises(UnsupportedError, match="has no matrices of float32"):
        compress_network(source, tmp_path / "y.onnx", format="i4_g32")
    assert not (tmp_path / "y.onnx").exists()


def test_weights_that_are_given_out_stay(tmp_path: Path) -> None:
    model = chain()
    model.graph.output.append(onnx.ValueInfoProto(name="w"))
    model.graph.output[-1].CopyFrom(helper.make_tensor_value_info("w", FLOAT, [96, 64]))
    onnx.save(model, tmp_path / "x.onnx")
    assert (
        compress_network(tmp_path / "x.onnx", tmp_path / "y.onnx", format="i4_g32").four_bits == 1
    )
    onnxruntime.InferenceSession(tmp_path / "y.onnx")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.onnx", tmp_path / "y.onnx"
    onnx.save(chain(), source)
    np.save(tmp_path / "in.npy", RNG.standard_normal((2, 96)).astype(np.float32))
    more = ["--evaluate", str(tmp_path / "in.npy")]
    assert main(["compress", str(source), str(target), "--format", "i4a_g32", *more]) == 0
    said = capsys.readouterr()
    assert "weights of 2 products have 4 bits" in said.err and "relative error" in said.out
