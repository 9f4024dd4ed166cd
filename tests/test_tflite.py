"""Networks of TFLite files: what they give, beside float64 and beside the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_tflite
from tflite_files import RELU, TfliteFile
from tflite_networks import CASES, Made, made, residual

import headrace
from headrace.cli import main
from headrace.errors import UnsupportedError

GOLDENS = Path(__file__).parent / "data" / "tflite_goldens.npz"


def outcome(path: Path, x: np.ndarray, threads: int = 1) -> np.ndarray:
    with headrace.load(path, threads=threads) as network:
        assert network.inputs[0].shape == x.shape
        (found,) = network({network.inputs[0].name: x}).values()
        return np.asarray(found)


def written(of: Made, folder: Path) -> Path:
    file, x, y = of
    return file.write(folder / "x.tflite", [x], [y])


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("case", CASES)
def test_an_operator_gives_what_its_definition_does(case: str, dtype: str, tmp_path: Path) -> None:
    of, x = made(case, dtype)
    found = outcome(written(of, tmp_path), x)
    values, exact = reference_tflite.run(of[0], {of[1]: x})
    assert found.dtype == values[of[2]].dtype and found.shape == values[of[2]].shape
    if dtype == "float32":
        np.testing.assert_allclose(found, exact[of[2]], rtol=0, atol=2e-5)
    else:
        assert len(np.unique(found)) > 4
        # The nearest code: of several operators, that of the last may be one away.
        most = 0.502 if len(of[0].operators) == 1 else 1.5
        assert np.abs(found - exact[of[2]]).max() <= most


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("classes", [2, 12])
def test_a_network_gives_what_numpy_gives(dtype: str, classes: int, tmp_path: Path) -> None:
    of, x = residual(dtype, classes)
    path = written(of, tmp_path)
    found = outcome(path, x)
    values, _ = reference_tflite.run(of[0], {of[1]: x})
    most = 1e-6 if dtype == "float32" else 1
    assert np.ptp(found) > (0.005 if dtype == "float32" else 4)
    assert np.abs(found.astype(np.float64) - values[of[2]]).max() <= most
    np.testing.assert_array_equal(found, outcome(path, x, 2))


def test_integers_run_on_kernels_of_ours(tmp_path: Path) -> None:
    of, x = residual()
    with headrace.load(written(of, tmp_path), threads=1) as network:
        assert [port.text for port in network.inputs] == ["INT8 [1, 20, 12, 3]"]
        assert [port.name for port in network.outputs] == ["scores"]
        ours = [n.op for r in network.plan({"image": x}).regions if r.ours for n in r.nodes]
    assert ours.count("QLinearConv") == 4 and {"QLinearAdd", "QGemm"} <= set(ours)


def test_outputs_are_those_of_the_interpreter(tmp_path: Path) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
    for dtype in ("int8", "float32"):
        of, x = residual(dtype)
        path = written(of, tmp_path)
        theirs = interpreter(model_path=str(path), num_threads=1)
        theirs.allocate_tensors()
        theirs.set_tensor(theirs.get_input_details()[0]["index"], x)
        theirs.invoke()
        expected = theirs.get_tensor(theirs.get_output_details()[0]["index"])
        most = 1 if dtype == "int8" else 1e-6
        assert np.abs(outcome(path, x) - expected.astype(np.float64)).max() <= most


def test_outputs_are_those_that_the_interpreter_gave(tmp_path: Path) -> None:
    """`python tests/data/make_tflite_goldens.py` wrote them."""
    with np.load(GOLDENS) as goldens:
        for dtype in ("int8", "uint8"):
            path = tmp_path / f"{dtype}.tflite"
            path.write_bytes(goldens[f"{dtype}_file"].tobytes())
            inputs, outputs = goldens[f"{dtype}_inputs"], goldens[f"{dtype}_outputs"]
            with headrace.load(path, threads=1) as network:
                for x, y in zip(inputs, outputs, strict=True):
                    found = network({"image": x})["scores"]
                    assert np.abs(found.astype(int) - y).max() <= 1


def test_weights_of_8_bits_beside_floats(tmp_path: Path) -> None:
    """Hybrid models; values stay float32, where TFLite rounds them to bytes."""
    file, random = TfliteFile(), np.random.default_rng(0)
    x = file.tensor((1, 6, 7, 16))
    w = file.constant(random.integers(-127, 128, (16, 3, 3, 16)).astype(np.int8),
                      scale=random.uniform(0.001, 0.002, 16), axis=0)  # fmt: skip
    bias = file.constant(random.normal(size=16).astype(np.float32))
    y = file.tensor((1, 6, 7, 16))
    file.operator("CONV_2D", [x, w, bias], [y], b0=0, i1=1, i2=1, b3=RELU, i4=1, i5=1)
    given = random.normal(size=(1, 6, 7, 16)).astype(np.float32)
    path = file.write(tmp_path / "x.tflite", [x], [y])
    _, exact = reference_tflite.run(file, {x: given})
    np.testing.assert_allclose(outcome(path, given), exact[y], rtol=0, atol=1e-5)


def test_weights_of_16_bits(tmp_path: Path) -> None:
    file, random = TfliteFile(), np.random.default_rng(0)
    x, y = file.tensor((2, 40)), file.tensor((2, 24))
    half = random.normal(size=(24, 40)).astype(np.float16)
    w = file.operator("DEQUANTIZE", [file.constant(half)], [file.tensor((24, 40))])
    file.operator("FULLY_CONNECTED", [x, w], [y], b0=0)
    given = random.normal(size=(2, 40)).astype(np.float32)
    found = outcome(file.write(tmp_path / "x.tflite", [x], [y]), given)
    np.testing.assert_allclose(found, given @ half.T.astype(np.float32), rtol=0, atol=2e-5)


def test_floats_around_integers(tmp_path: Path) -> None:
    of, codes = residual()
    file, x, y = of
    real, scores = file.tensor((1, 20, 12, 3), name="real"), file.tensor((1, 12), name="out")
    file.operators.insert(0, {"name": "QUANTIZE", "inputs": [real], "outputs": [x], "options": {}})
    file.operator("DEQUANTIZE", [y], [scores])
    path = file.write(tmp_path / "x.tflite", [real], [scores])
    given = ((codes - np.float32(-7)) * np.float32(0.02)).astype(np.float32)
    with headrace.load(path, threads=1) as network:
        found = network({"real": given})["out"]
    values, _ = reference_tflite.run(file, {real: given})
    assert np.abs(found - values[scores]).max() <= 1.001 / 256


def test_slices(tmp_path: Path) -> None:
    file = TfliteFile()
    x, y = file.tensor((1, 6, 7, 5)), file.tensor((6, 3, 2))
    settings = [file.constant(np.array(v, np.int32))
                for v in ([0, 0, 1, 3], [1, 6, 7, 5], [1, 1, 2, 1])]  # fmt: skip
    file.operator("STRIDED_SLICE", [x, *settings], [y], i0=2, i1=8, i4=1)
    given = np.random.default_rng(0).normal(size=(1, 6, 7, 5)).astype(np.float32)
    found = outcome(file.write(tmp_path / "x.tflite", [x], [y]), given)
    np.testing.assert_array_equal(found, given[0, :, 1:7:2, 3:])


@pytest.mark.parametrize("name", ["UNIDIRECTIONAL_SEQUENCE_LSTM", "Mine"])
def test_other_operators_are_named(name: str, tmp_path: Path) -> None:
    file = TfliteFile()
    x, y = file.tensor((1, 4)), file.tensor((1, 4))
    file.operator(name, [x], [y])
    with pytest.raises(UnsupportedError, match=rf"x\.tflite.*operator 0 .*{name}"):
        headrace.load(file.write(tmp_path / "x.tflite", [x], [y]))


def test_commands_take_them(tmp_path: Path, capsys: Any) -> None:
    of, x = residual()
    path = str(written(of, tmp_path))
    np.save(tmp_path / "image.npy", x)
    shown = {}
    for name, more in (
        ("inspect", []), ("plan", []), ("bench", ["--runs", "2"]),
        ("run", ["--input", f"image={tmp_path / 'image.npy'}", "-o", str(tmp_path / "out")]),
    ):  # fmt: skip
        assert (
            main([name, path, "--threads", "1", *more] if name != "inspect" else [name, path]) == 0
        )
        shown[name] = capsys.readouterr().out
    assert "QLinearConv" in shown["inspect"] or "Conv" in shown["inspect"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "scores.npy"), outcome(Path(path), x))


def test_they_stream_in_little_memory(tmp_path: Path) -> None:
    """Weights are read from the file, and those that are turned are packed as ONNX's are."""
    file, random = TfliteFile(), np.random.default_rng(0)
    x, y = file.tensor((1, 512), name="x"), file.tensor((1, 512), name="y")
    value = x
    for i in range(8):
        w = file.constant(random.normal(size=(512, 512)).astype(np.float32) / 23)
        made = y if i == 7 else file.tensor((1, 512))
        value = file.operator("FULLY_CONNECTED", [value, w], [made], b0=0)
    path = file.write(tmp_path / "x.tflite", [x], [y])
    given = random.normal(size=(1, 512)).astype(np.float32)
    whole = outcome(path, given)
    with headrace.load(path, threads=1, memory="7.5MB") as network:
        assert network.plan({"x": given}).memory.streamed_bytes > 0
        np.testing.assert_array_equal(network({"x": given})["y"], whole)
