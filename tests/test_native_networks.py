"""Networks on kernels of ours, against onnxruntime; what passes and placement may not change."""

from __future__ import annotations

import gc
import signal
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx_models import FLOAT, model_of, random_network

from headrace.networks.lifetimes import Life, least_bytes, placed
from headrace.networks.native import NativeRegion
from headrace.networks.network import Network, network_of
from headrace.team import Team


def reference(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What onnxruntime computes."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def native(network: Network, inputs: dict[str, Any]) -> list[NativeRegion]:
    return [run for run in network.plan(inputs).runs if isinstance(run, NativeRegion)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_network_gives_what_onnxruntime_gives(threads: int) -> None:
    rng = np.random.default_rng(7)
    model = random_network(rng)
    x = rng.standard_normal((2, 3, 29, 34)).astype(np.float32)
    with network_of(model, threads=threads) as network:
        found = network({"x": x})
        assert [kind for kind, _ in network.plan({"x": x}).where()] == ["headrace"]
        for name, expected in reference(model, {"x": x}).items():
            # Sums of some hundred terms, in another order.
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(8)
    model = random_network(rng)
    x = rng.standard_normal((2, 3, 29, 34)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        with network_of(model, threads=threads) as network:
            results.append(network({"x": x})["y"].tobytes())
    assert len(set(results)) == 1


def test_a_network_may_be_forgotten() -> None:
    rng = np.random.default_rng(8)
    model = random_network(rng)
    x = rng.standard_normal((2, 3, 29, 34)).astype(np.float32)
    before = threading.active_count()
    for _ in range(3):
        network_of(model, threads=2)({"x": x})
        gc.collect()
    assert threading.active_count() == before


def test_a_long_run_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    names = ["x", *(f"y{i}" for i in range(30)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    w = rng.standard_normal((1024, 1024)).astype(np.float32) / 32
    model = model_of(nodes, {"x": (FLOAT, ["n", 1024])}, ["y"], {"w": w})
    cancelled = []
    begin, cancel = Team._lead_aside, Team.cancel

    def interrupted(team: Team) -> None:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        begin(team)

    def seen(team: Team) -> None:
        cancelled.append(team)
        cancel(team)

    x = rng.standard_normal((4096, 1024)).astype(np.float32)
    with network_of(model, threads=2) as network:
        first = network({"x": x[:3]})["y"]
        with monkeypatch.context() as patch:
            patch.setattr(Team, "_lead_aside", interrupted)
            patch.setattr(Team, "cancel", seen)
            with pytest.raises(KeyboardInterrupt):
                network({"x": x})
        assert cancelled, "it ended by itself"
        np.testing.assert_array_equal(network({"x": x[:3]})["y"], first)


def test_bounds_and_sums_go_into_convolutions() -> None:
    model = random_network(np.random.default_rng(9))
    with network_of(model, threads=1) as network:
        (region,) = native(network, {"x": np.zeros((2, 3, 29, 34), np.float32)})
        kernels = [one.kernel for one in region.operations if one.kernel != "images_border"]
    # All Clip and Relu are gone, and the sum of two values; what adds a value to itself is not.
    assert kernels == [
        "convolution_f32", "convolution_f32", "depthwise_f32", "convolution_f32", "convolution_f32",
        "images_add", "images_mean", "images_add", "convolution_f32",
    ]  # fmt: skip
    assert sum(len(one.nodes) for one in region.operations) == len(model.graph.node)


def test_a_value_that_others_want_keeps_its_own_bounds() -> None:
    w = np.ones((2, 2, 1, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Add", ["c", "r"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 2, 1, 3])}, ["y"], {"w": w})
    x = np.array([[-3, 1, -1], [1, 1, 0]], np.float32).reshape(1, 2, 1, 3)
    with network_of(model, threads=1) as network:
        np.testing.assert_array_equal(network({"x": x})["y"], reference(model, {"x": x})["y"])


def test_numbers_that_are_none_stay_none() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    x = np.array([[np.nan, np.inf, -np.inf, -1, 3e38]], np.float32)
    with network_of(model_of([node], {"x": (FLOAT, [1, 5])}, ["y"]), threads=1) as network:
        assert native(network, {"x": x})
        np.testing.assert_array_equal(network({"x": x})["y"], [[np.nan, np.inf, 0, 0, x[0, 4]]])


@pytest.mark.parametrize(
    ("node", "shapes"),
    [
        (("Conv", {}), {"x": [1, 4, 3, 4, 5], "w": [4, 4, 1, 2, 2]}),
        (("ConvTranspose", {"strides": [2, 2]}), {"x": [1, 4, 5, 5], "w": [4, 2, 3, 3]}),
        (("Gemm", {"alpha": 0.5}), {"x": [2, 4], "w": [4, 5]}),
    ],
)
def test_what_our_kernels_do_not_do_the_host_does(node: Any, shapes: Any) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal(shapes["w"]).astype(np.float32)
    x = rng.standard_normal(shapes["x"]).astype(np.float32)
    op, attributes = node
    made = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    model = model_of([made], {"x": (FLOAT, shapes["x"])}, ["y"], {"w": w})
    with network_of(model, threads=1) as network:
        assert [kind for kind, _ in network.plan({"x": x}).where()] == ["onnxruntime"]
        np.testing.assert_array_equal(network({"x": x})["y"], reference(model, {"x": x})["y"])


def test_ours_and_the_hosts_take_turns() -> None:
    w = np.random.default_rng(2).standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Sin", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, ["n", 4, 3, 3])}, ["y"], {"w": w})
    with network_of(model, threads=2) as network:
        for n in (1, 3, 1):
            x = np.random.default_rng(n).standard_normal((n, 4, 3, 3)).astype(np.float32)
            found = network({"x": x})["y"]
            np.testing.assert_allclose(found, reference(model, {"x": x})["y"], atol=1e-6)
            kinds = [kind for kind, _ in network.plan({"x": x}).where()]
            assert kinds == ["headrace", "onnxruntime", "headrace"]


def test_what_the_host_computes_twice_is_there_once() -> None:
    """One node of the file stood beside that which reads the first of two equal values instead."""
    w = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Tanh", ["p"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["q"]),
        helper.make_node("Relu", ["q"], ["r"]),
        helper.make_node("Sin", ["r"], ["a"]),
        helper.make_node("Sin", ["r"], ["b"]),
        helper.make_node("Cos", ["b"], ["c"]),
        helper.make_node("Sum", ["a", "c"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [3, 16])}, ["y"], {"w": w})
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
        assert [on for on, _ in network.plan({"x": x}).where()] == ["headrace", "onnxruntime"]
    np.testing.assert_allclose(found, reference(model, {"x": x})["y"], rtol=1e-5, atol=1e-5)


def test_where_borders_are_many_the_host_does_all() -> None:
    w = np.random.default_rng(2).standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes, last = [], "x"
    for i in range(3):
        nodes.append(helper.make_node("Conv", [last, "w"], [f"a{i}"]))
        nodes.append(helper.make_node("Sin", [f"a{i}"], [f"b{i}"]))
        last = f"b{i}"
    model = model_of(nodes, {"x": (FLOAT, [1, 4, 3, 3])}, [last], {"w": w})
    x = np.ones((1, 4, 3, 3), np.float32)
    with network_of(model, threads=2) as network:
        assert [kind for kind, _ in network.plan({"x": x}).where()] == ["onnxruntime"]


def test_opsets_before_11_have_bounds_as_attributes() -> None:
    node = helper.make_node("Clip", ["x"], ["y"], min=-1.0, max=2.0)
    model = model_of([node], {"x": (FLOAT, [1, 4])}, ["y"], opset=9)
    x = np.array([[-5, -0.5, 1, 7]], np.float32)
    with network_of(model, threads=1) as network:
        np.testing.assert_array_equal(network({"x": x})["y"], [[-1, -0.5, 1, 2]])


@given(st.lists(st.tuples(st.integers(1, 999), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_values_that_meet_do_not_overlap(raw: list[tuple[int, int, int]]) -> None:
    lives = {str(i): Life(n, min(a, b), max(a, b)) for i, (n, a, b) in enumerate(raw)}
    offsets, total = placed(lives)
    assert least_bytes(lives) <= total
    for a, one in lives.items():
        assert offsets[a] % 64 == 0 and offsets[a] + one.n_bytes <= total
        for b, other in lives.items():
            if a != b and one.meets(other):
                apart = offsets[a] >= offsets[b] + other.n_bytes
                assert apart or offsets[b] >= offsets[a] + one.n_bytes


def test_float16_is_not_taken_for_float32() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model = model_of([node], {"x": (onnx.TensorProto.FLOAT16, [1, 4])}, ["y"])
    x = np.array([[-5, -0.5, 1, 7]], np.float16)
    with network_of(model, threads=1) as network:
        assert network({"x": x})["y"].dtype == np.float16
