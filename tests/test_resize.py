"""Resize on kernels of ours: which pixels it takes, against onnxruntime and exact numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of
from test_native_operators import RNG, X, check, expected, node, region

from headrace.networks.network import network_of

MODES = [
    ("nearest", where, {"nearest_mode": how})
    for where in ("asymmetric", "half_pixel", "align_corners", "half_pixel_symmetric")
    for how in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
]
MODES += [
    ("linear", where, {})
    for where in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel")
]


@pytest.mark.parametrize(("mode", "where", "more"), MODES)
@pytest.mark.parametrize("scales", [(2, 2), (1.5, 0.7)])
def test_resize(mode: str, where: str, more: dict[str, Any], scales: Any) -> None:
    made = node(
        "Resize", "x", mode=mode, coordinate_transformation_mode=where, **more,
    )  # fmt: skip
    made.input.extend(["", "scales"])
    check([made], X, constants={"scales": np.array([1, 1, *scales], np.float32)})


@pytest.mark.parametrize("opset", [7, 9, 10, 13, 19])
@pytest.mark.parametrize("by", [(1.4, 1.9), (1.3, 2.1)])
def test_sizes_are_products_in_float32(opset: int, by: tuple[float, float]) -> None:
    """Inference of shapes multiplies in float64, and rounds down: of 30 x 1.4 it made 41."""
    scales = np.array([1, 1, *by], np.float32)
    given = "x scales" if opset in (9, 10) else "x roi scales"
    made = node("Resize" if opset > 9 else "Upsample", "x" if opset == 7 else given, mode="nearest")
    if opset == 7:
        made.attribute.append(helper.make_attribute("scales", scales.tolist()))
    constants = {"scales": scales, "roi": np.zeros(0, np.float32)}
    check([made], {"x": (FLOAT, [1, 3, 30, 20])}, constants=constants, opset=opset)


def test_resize_to_a_size() -> None:
    made = node("Resize", "x", mode="linear")
    made.input.extend(["", "", "sizes"])
    check([made], X, constants={"sizes": np.array([2, 20, 14, 11], np.int64)})


def _pixels(size: int, count: int, **of: Any) -> tuple[list[int], list[int]]:
    """Which pixels a row of `count` has, of one of `size`: here, and of onnxruntime."""
    made = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest", **of)
    sizes = {"sizes": np.array([1, 1, 1, count])}
    model = model_of([made], {"x": (FLOAT, [1, 1, 1, size])}, ["y"], sizes)
    x = np.arange(size, dtype=np.float32).reshape(1, 1, 1, size)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"].ravel()
        assert region(network, {"x": x}).operations
    return found.astype(int).tolist(), expected(model, {"x": x})[0].ravel().astype(int).tolist()


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("where", ["asymmetric", "half_pixel", "pytorch_half_pixel"])
def test_the_middle_of_two_pixels_is_there_in_spite_of_rounding(where: str, up: bool) -> None:
    """In float32 some come out a little beside it; of pixels above 16 onnxruntime's do, too."""
    for size, count in ((7, 2), (7, 4), (7, 8), (14, 19), (16, 6), (15, 5)):
        begin = 0 if where == "asymmetric" else Fraction(1, 2)
        at = [(i + begin) * Fraction(size, count) - begin for i in range(count)]
        half = Fraction(1, 2)
        right = [math.floor(one + half) if up else math.ceil(one - half) for one in at]
        found, _ = _pixels(
            size, count, coordinate_transformation_mode=where,
            nearest_mode="round_prefer_ceil" if up else "round_prefer_floor",
        )  # fmt: skip
        assert found == np.clip(right, 0, size - 1).tolist()


def test_symmetric_pixels_of_onnxruntime() -> None:
    for size, count in ((3, 11), (3, 13), (19, 15)):
        for how in ("floor", "ceil"):
            found, right = _pixels(
                size, count, nearest_mode=how,
                coordinate_transformation_mode="half_pixel_symmetric",
            )  # fmt: skip
            assert found == right


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(2, 2), (1.6, 0.7), (0.4, 2.9), (1.19, 1.15)])
def test_resize_of_operator_set_10(mode: str, scales: Any) -> None:
    """It has no attributes of where: what later ones have by default is something else."""
    made = node("Resize", "x scales", mode=mode)
    check([made], X, constants={"scales": np.array([1, 1, *scales], np.float32)}, opset=10)


@pytest.mark.parametrize(
    ("axes", "scales"), [([3, 2], [2.7, 1.3]), ([2], [2.43]), ([-1], [0.6]), ([-1, 2], [0.8, 1.9])]
)
def test_resize_of_some_axes(axes: list[int], scales: list[float]) -> None:
    made = node("Resize", "x", mode="linear", axes=axes)
    made.input.extend(["", "scales"])
    check([made], X, constants={"scales": np.array(scales, np.float32)})


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_resize_that_keeps_the_ratio(policy: str) -> None:
    """Of onnxruntime: its scales are not those of the sizes."""
    made = node("Resize", "x", mode="linear", axes=[2, 3], keep_aspect_ratio_policy=policy)
    made.input.extend(["", "", "sizes"])
    _same_as_onnxruntime(made, {"sizes": np.array([13, 12], np.int64)})


def test_resize_to_the_size_that_it_has() -> None:
    made = node("Resize", "x", mode="linear")
    made.input.extend(["", "scales"])
    _same_as_onnxruntime(made, {"scales": np.array([1, 1, 1.1, 1.05], np.float32)})


def _same_as_onnxruntime(made: Any, constants: dict[str, np.ndarray]) -> None:
    model = model_of([made], X, ["y"], constants)
    x = RNG.standard_normal((2, 20, 7, 9)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
    np.testing.assert_allclose(found, expected(model, {"x": x})[0], rtol=0, atol=1e-5)
