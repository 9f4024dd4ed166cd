"""What the operators of a TFLite file give, in float64: the definition, without any of our code.

Codes become real numbers, and what an operator gives becomes codes again: `exact` has what it gives
before that, so that a result can be told to be the nearest code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tflite_files import TfliteFile

_BOUNDS = {0: (-np.inf, np.inf), 1: (0.0, np.inf), 2: (-1.0, 1.0), 3: (0.0, 6.0)}


def run(file: TfliteFile, given: dict[int, np.ndarray]) -> tuple[dict[int, Any], dict[int, Any]]:
    """All values as the file has them, and the exact ones, by index."""
    values: dict[int, Any] = {i: t["data"] for i, t in enumerate(file.tensors)} | given
    exact: dict[int, Any] = {}
    for one in file.operators:
        y = one["outputs"][0]
        of = file.tensors[y]
        result = _result(file, one, values)
        least, most = _BOUNDS[_activation(one)]
        result = np.clip(result, least, most).reshape(of["shape"])
        if of["scale"] is None:
            exact[y], values[y] = result, result.astype(of["dtype"])
            continue
        ends = np.iinfo(of["dtype"])
        exact[y] = np.clip(result / np.float32(of["scale"]) + of["zero"], ends.min, ends.max)
        values[y] = np.rint(exact[y]).astype(of["dtype"])
    return values, exact


def _activation(one: dict[str, Any]) -> int:
    at = {"CONV_2D": "b3", "DEPTHWISE_CONV_2D": "b4", "FULLY_CONNECTED": "b0", "ADD": "b0",
          "SUB": "b0", "MUL": "b0", "AVERAGE_POOL_2D": "b5", "MAX_POOL_2D": "b5"}  # fmt: skip
    alone = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}
    return int(alone.get(one["name"], one["options"].get(at.get(one["name"], ""), 0)))


def _real(file: TfliteFile, index: int, values: dict[int, Any]) -> np.ndarray:
    of, found = file.tensors[index], np.float64(values[index])
    if of["scale"] is None:
        return np.asarray(found)
    scales = np.atleast_1d(np.float32(of["scale"])).astype(np.float64)
    shape = [1] * found.ndim
    if scales.size > 1:
        shape[of["axis"]] = -1
    return np.asarray((found - of["zero"]) * scales.reshape(shape))


def _result(file: TfliteFile, one: dict[str, Any], values: dict[int, Any]) -> np.ndarray:
    name, options, inputs = one["name"], one["options"], one["inputs"]
    x = _real(file, inputs[0], values)
    if name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        deep = name == "DEPTHWISE_CONV_2D"
        w = _real(file, inputs[1], values)
        dilations = [options.get(k, 1) for k in (("i6", "i5") if deep else ("i5", "i4"))]
        taps = w.shape[1:3]
        patches = _patches(x, taps, options, dilations, 0.0)
        if deep:
            times = w.shape[3] // x.shape[3]
            return _bias(file, one, values, np.einsum(
                "nyxhwc,hwc->nyxc", np.repeat(patches, times, 5), w[0]))  # fmt: skip
        groups = x.shape[3] // w.shape[3]
        parts = zip(np.split(patches, groups, 5), np.split(w, groups), strict=True)
        found = [np.einsum("nyxhwc,ohwc->nyxo", a, b) for a, b in parts]
        return _bias(file, one, values, np.concatenate(found, 3))
    if name == "FULLY_CONNECTED":
        w = _real(file, inputs[1], values)
        return _bias(file, one, values, x.reshape(-1, w.shape[1]) @ w.T)
    if name in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        patches = _patches(x, (options["i4"], options["i3"]), options, (1, 1), np.nan)
        return np.asarray((np.nanmean if name[0] == "A" else np.nanmax)(patches, (3, 4)))
    if name in ("ADD", "SUB", "MUL"):
        other = _real(file, inputs[1], values)
        return np.asarray({"ADD": x + other, "SUB": x - other, "MUL": x * other}[name])
    if name == "MEAN":
        return np.asarray(x.mean(tuple(values[inputs[1]].tolist())))
    if name == "SOFTMAX":
        e = np.exp((x - x.max(-1, keepdims=True)) * options["f0"])
        return np.asarray(e / e.sum(-1, keepdims=True))
    if name == "PAD":
        return np.pad(x, values[inputs[1]].tolist())
    if name == "CONCATENATION":
        return np.concatenate([_real(file, i, values) for i in inputs], options["i0"])
    if name == "TRANSPOSE":
        return x.transpose(values[inputs[1]].tolist())
    return {"LOGISTIC": lambda v: 1 / (1 + np.exp(-v)), "TANH": np.tanh}.get(name, np.array)(x)


def _bias(
    file: TfliteFile, one: dict[str, Any], values: dict[int, Any], sums: np.ndarray
) -> np.ndarray:
    if len(one["inputs"]) < 3:
        return sums
    x, w, index = one["inputs"]
    bias = np.float64(values[index])
    if values[index].dtype == np.int32:
        factors = np.float32(file.tensors[w]["scale"]).astype(np.float64)
        bias = bias * (np.float64(np.float32(file.tensors[x]["scale"])) * factors)
    return sums + bias


def _patches(
    x: np.ndarray, taps: Any, options: dict[str, int], dilations: Any, outside: float
) -> np.ndarray:
    """[image, row, column, tap down, tap across, channel]."""
    strides, steps = (options["i2"], options["i1"]), []
    pads = [(0, 0)]
    for size, tap, stride, dilation in zip(x.shape[1:3], taps, strides, dilations, strict=True):
        reach = (tap - 1) * dilation + 1
        if options["b0"]:  # VALID
            count, total = (size - reach) // stride + 1, 0
        else:
            count = math.ceil(size / stride)
            total = max(0, (count - 1) * stride + reach - size)
        pads.append((total // 2, total - total // 2))
        steps.append(np.arange(count)[:, None] * stride + np.arange(tap) * dilation)
    wide = np.pad(x, [*pads, (0, 0)], constant_values=outside)
    return wide[:, steps[0]][:, :, :, steps[1]].transpose(0, 1, 3, 2, 4, 5)
