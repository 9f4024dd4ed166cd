"""Files that others' quantisers and ours write: all of them on kernels of ours, as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_classifiers import CLASSIFIERS, WAYS, Classifier, exact, samples_of
from onnx_encoders import encoder, tokens
from onnx_models import FLOAT, model_of, save
from test_quantised_networks import Qdq

from headrace.networks.compression.compress import compress_network
from headrace.networks.measure import regions
from headrace.networks.network import load_network

SHAPE = 1, 3, 32, 24


def detector() -> Any:
    """What detectors have between convolutions: parts, joined values, sizes, pools, gates."""
    of = Classifier(*SHAPE)

    def silu() -> str:
        x = of.last
        return of.then("Sigmoid").of("Mul", x, of.last).last

    of.conv(32, 3, strides=[2, 2])
    silu()
    of.then("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv(40, 32)
    silu()
    of.nodes[-1].output[0] = "whole"
    of.of("Split", "whole", axis=1)
    of.nodes[-1].output[:] = ["first", "second"]
    of.last = "first"
    of.conv(20, 20)
    summed = of.of("Add", silu(), "first").last
    of.of("Concat", "first", "second", summed, axis=1).conv(48, 60, 1)
    leaky = of.then("LeakyRelu", alpha=0.1).last
    of.conv(48, 48, group=4, strides=[2, 2])  # integers have no kernel of groups
    of.then("Resize", "", of.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    of.of("Concat", of.last, leaky, axis=1).conv(24, 96, 1).then("Tanh")
    of.then("MaxPool", kernel_shape=[5, 5], pads=[2] * 4).conv(3, 24, 1)  # nor of so few outputs
    return of.model()


@pytest.mark.parametrize("way", ["compressed", "signed", "signed by channel", "unsigned"])
def test_a_detector(way: str, tmp_path: Path) -> None:
    model = detector()
    path = WAYS[way](save(model, tmp_path / "m.onnx"), samples_of(model, 6, 1))
    (x,) = samples_of(model, 1, 2)
    results = []
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 3}, {"memory": 2 << 20}):
        with load_network(path, **options) as network:
            results.append(network({"x": x})["y"])
            assert [on for on, _ in network.plan({"x": x}).where()] == ["headrace"]
            kernels = [
                one.kernel for run in network.plan({"x": x}).natives for one in run.operations
            ]
    assert kernels.count("convolution_u8") >= 4
    assert all(np.array_equal(one, results[0]) for one in results)
    wanted = exact(path, x)
    # A value between two bytes may become the other, and what follows from that.
    off = np.abs(results[0] - wanted)
    assert off.max() <= 0.06 * np.abs(wanted).max() and off.mean() <= 0.004 * np.abs(wanted).max()


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name != "rows"])
@pytest.mark.parametrize("way", ["signed", "unsigned"])
def test_a_classifier(name: str, way: str, tmp_path: Path) -> None:
    model = CLASSIFIERS[name]()
    path = WAYS[way](save(model, tmp_path / "m.onnx"), samples_of(model, 6, 1))
    for x in samples_of(model, 3, 2):
        with load_network(path, threads=2) as network:
            found = network({"x": x})["y"]
            where = [on for on, _ in network.plan({"x": x}).where()]
        assert where == ["headrace"]
        np.testing.assert_allclose(found, exact(path, x), atol=0.02)


@pytest.mark.parametrize("spelling", ["new", "old", "sdpa"])
def test_an_encoder_of_ours(spelling: str, tmp_path: Path) -> None:
    """Rows are bytes in front of products only: masks and sums stay what they are."""
    path, to = tmp_path / "m.onnx", tmp_path / "y.onnx"
    rng, calibrating = np.random.default_rng(3), tmp_path / "inputs"
    save(encoder(rng, spelling, heads=2, width=64), path)
    calibrating.mkdir()
    for i in range(6):
        np.savez(calibrating / f"{i}.npz", **tokens(rng, 2, 16))
    compress_network(path, to, format="int8", calibrate=calibrating)
    inputs = tokens(rng, 3, 13)
    floats, given = (onnxruntime.InferenceSession(one).run(None, inputs)[0] for one in (path, to))
    results = []
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 2, "memory": 4 << 20}):
        with load_network(to, **options) as network:
            results.append(network(inputs)["y"])
            plan = network.plan(inputs)
    assert all(np.array_equal(one, results[0]) for one in results)
    products = 39 * 2 * 6 * 64 * 64  # of rows with weights
    assert [row["macs"] >= products for row in regions(plan)] == [True]
    assert [on for on, _ in plan.where()] == ["headrace"]
    size = float(np.sqrt((floats**2).mean()))
    assert np.sqrt(((results[0] - given) ** 2).mean()) < 0.004 * size
    assert np.sqrt(((results[0] - floats) ** 2).mean()) < 0.03 * size


def test_products_of_batches_of_rows(tmp_path: Path) -> None:
    """MatMul of three dimensions, to bytes and to numbers, is exact but for the last rounding."""
    rng = np.random.default_rng(5)
    q = Qdq(rng)
    q.pair("x", 0.02, 128)
    q.add("MatMul", ["x_d", q.weights("a_w", (48, 40), 1)], "a")
    q.pair("a", 0.05, 120)
    q.add("MatMul", ["a_d", q.weights("y_w", (40, 3), 1)], "y")
    model = q.model([2, 7, 48], ["y"])
    x = rng.standard_normal((2, 7, 48)).astype(np.float32)
    with load_network(save(model, tmp_path / "m.onnx"), threads=2) as network:
        found = network({"x": x})["y"]
        kernels = [one.kernel for run in network.plan({"x": x}).natives for one in run.operations]
        assert kernels == ["images_quantise", "convolution_u8", "convolution_u8"]
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
    steps = q.constants["y_w_s"].max() * 127 * 0.05  # of one byte of the first product
    assert np.abs(found - wanted).max() <= steps
    assert (np.abs(found - wanted) > 1e-5).mean() < 0.05


@pytest.mark.parametrize(
    ("kind", "zero"),
    [(np.uint8, 128), (np.uint8, 117), (np.int8, 0), (np.int8, 9), (np.int8, None)],
)
def test_dynamic_products_of_all_weights(kind: Any, zero: int | None, tmp_path: Path) -> None:
    """Also of those that bytes hold only with their zero point: what exceeds them comes apart."""
    rng = np.random.default_rng(7)
    info = np.iinfo(kind)
    codes = np.clip(rng.normal(zero or 0, 30, (96, 40)), info.min, info.max).astype(kind)
    codes[5, :9], codes[6, 4:] = max(info.min, (zero or 0) - 140), min(info.max, (zero or 0) + 140)
    constants = {
        "w": codes, "s": rng.uniform(0.5, 1, 40).astype(np.float32) / 99,
        "b": rng.standard_normal(40).astype(np.float32),
    }  # fmt: skip
    inputs = ["x", "w", "s", "", "b"]
    if zero is not None:
        constants["z"], inputs[3] = np.full(40, zero, kind), "z"
    node = helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")
    model = model_of([node], {"x": (FLOAT, [1, 33, 96])}, ["y"], constants, opset=17)
    path, x = save(model, tmp_path / "m.onnx"), rng.standard_normal((1, 33, 96)).astype(np.float32)
    results = []
    for options in ({"threads": 1}, {"threads": 2}, {"memory": 2 << 20}):
        with load_network(path, **options) as network:
            results.append(network({"x": x})["y"])
            assert [on for on, _ in network.plan({"x": x}).where()] == ["headrace"]
    assert all(np.array_equal(one, results[0]) for one in results)
    (wanted,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(results[0], wanted, rtol=1e-5, atol=1e-5)
