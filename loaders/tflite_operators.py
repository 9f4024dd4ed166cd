"""TFLite's operators in terms of ONNX's: a function for each kind, and the table of them all.

Sizes that a file declares are compared with those that follow from its weights and options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from headrace.loaders.tflite_model import Operator
from headrace.loaders.tflite_schema import ACTIVATIONS, PADDINGS
from headrace.loaders.tflite_translation import (
    BOUNDS,
    TO_FIRST,
    TO_LAST,
    Padded,
    Translation,
    input_of,
)

_NO_PADS = (0, 0, 0, 0)


def _activation(operator: Operator, field: int) -> str:
    found = operator.chosen(field, ACTIVATIONS)
    if found not in ("NONE", "RELU", *BOUNDS):
        raise operator.unsupported(
            f"its activation {found}; NONE, RELU, RELU6 and RELU_N1_TO_1 are"
        )
    return found


def _image(of: Translation, operator: Operator, index: int) -> tuple[int, ...]:
    """The shape of an image."""
    one = of.tensor(index)
    if len(one.shape) != 4:
        raise operator.bad(f"{one.name!r} has the shape {list(one.shape)}, and is to be an image")
    return one.shape


def _windows(
    of: Translation, operator: Operator, x: int, taps: tuple[int, int], fields: tuple[int, ...],
    channels: int, dilations: tuple[int, int] = (1, 1), more: tuple[int, ...] = _NO_PADS,
) -> dict[str, Any]:  # fmt: skip
    """Strides and pads (top, left, bottom, right) of a convolution or pool, as ONNX's attributes.

    Args:
        fields: options: padding, stride of columns, stride of rows.
        channels: that it writes.
        more: pads that a PAD in front of it adds.
    """
    padding = operator.chosen(fields[0], PADDINGS)
    strides = operator.whole(fields[2]), operator.whole(fields[1])
    read, written = _image(of, operator, x), _image(of, operator, operator.outputs[0])
    if min(*strides, *taps, *dilations) < 1 or max(*strides, *taps, *dilations) > 1 << 16:
        raise operator.bad(f"strides {strides}, windows {taps}, dilations {dilations}")
    before, after, sizes = [], [], []
    for i in (0, 1):
        size, reach = read[1 + i] + more[i] + more[2 + i], (taps[i] - 1) * dilations[i] + 1
        count = -(-size // strides[i]) if padding == "SAME" else (size - reach) // strides[i] + 1
        total = max((count - 1) * strides[i] + reach - size, 0) if padding == "SAME" else 0
        before.append(more[i] + total // 2)
        after.append(more[2 + i] + total - total // 2)
        sizes.append(count)
    expected = (read[0], *sizes, channels)
    if written != expected:
        raise operator.bad(
            f"its result has the shape {list(written)}, and {list(expected)} follows from what it "
            "reads"
        )
    return {"strides": list(strides), "pads": [*before, *after]}


def _unpadded(of: Translation, operator: Operator, x: int) -> tuple[int, tuple[int, ...]]:
    """What a convolution reads, and pads of an image that a PAD in front of it makes."""
    padded = of.padded.get(x)
    if padded is None or len(padded.before) != 4 or operator.chosen(0, PADDINGS) != "VALID":
        return x, _NO_PADS
    ends = (padded.before, padded.after)
    if any(one[i] for one in ends for i in (0, 3)):
        return x, _NO_PADS
    return padded.source, tuple(one[i] for one in ends for i in (1, 2))


def _convolution(of: Translation, operator: Operator, depthwise: bool) -> None:
    given, w = input_of(operator, 0), input_of(operator, 1)
    x, more = _unpadded(of, operator, given)
    read, weights = _image(of, operator, x), _image(of, operator, w)
    fields = (5, 6) if depthwise else (4, 5)
    dilations = operator.whole(fields[1], 1), operator.whole(fields[0], 1)
    written = weights[3] if depthwise else weights[0]
    groups = read[3] if depthwise else read[3] // max(1, weights[3])
    fits = weights[0] == 1 if depthwise else groups * weights[3] == read[3]
    if not fits or groups < 1 or written < 1 or written % groups:
        raise operator.bad(f"weights {list(weights)} do not fit to an image {list(read)}")
    taps = weights[1], weights[2]
    windows = _windows(of, operator, x, taps, (0, 1, 2), written, dilations, more)
    perm = (3, 0, 1, 2) if depthwise else TO_FIRST
    inputs = [of.real(x, True), of.weights_of(operator, w, x, weights, perm)]
    _check_bias(of, operator, written)
    of.make(
        operator.outputs[0], "Conv", inputs + of.bias_of(operator, 2, w, x), first=True,
        activation=_activation(operator, 4 if depthwise else 3), group=groups,
        kernel_shape=list(taps), dilations=list(dilations), **windows,
    )  # fmt: skip


def _check_bias(of: Translation, operator: Operator, channels: int) -> None:
    if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
        shape = of.tensor(operator.inputs[2]).shape
        if shape != (channels,):
            raise operator.bad(f"its bias has the shape {list(shape)}, and not {[channels]}")


def _fully_connected(of: Translation, operator: Operator) -> None:
    x, w = input_of(operator, 0), input_of(operator, 1)
    y, weights = operator.outputs[0], of.tensor(w).shape
    if operator.byte(1):
        raise operator.unsupported("its weights are shuffled: convert the model anew")
    read = of.tensor(x).shape
    if len(weights) != 2 or not weights[1] or math.prod(read) % weights[1]:
        raise operator.bad(f"weights {list(weights)} do not fit to {list(read)}")
    rows = math.prod(read) // weights[1]
    if math.prod(of.tensor(y).shape) != rows * weights[0]:
        raise operator.bad(f"its result has the shape {list(of.tensor(y).shape)}")
    _check_bias(of, operator, weights[0])
    activation = _activation(operator, 0)
    image = of.flattened.get(x, x)
    shape = of.tensor(image).shape
    if len(shape) == 4 and shape[0] == rows and shape[1] * shape[2] > 1 and of.has_first(image):
        # All pixels in one window: so nothing has to move to lie as in the file.
        taps = (weights[0], *shape[1:])
        inputs = [of.real(image, True), of.weights_of(operator, w, x, taps, TO_FIRST)]
        inputs += of.bias_of(operator, 2, w, x)
        of.make(y, "Conv", inputs, first=True, activation=activation, kernel_shape=shape[1:3])
        return
    given = of.real(x)
    if read != (rows, weights[1]):
        given = of.reshaped(given, (rows, weights[1]), f"{of.tensor(y).name}/rows")
    inputs = [given, of.weights_of(operator, w, x, weights, (0, 1))]
    inputs += of.bias_of(operator, 2, w, x)
    if len(of.tensor(y).shape) == 2:
        of.make(y, "Gemm", inputs, activation=activation, transB=1)
        return
    raise operator.unsupported(f"a result of {len(of.tensor(y).shape)} dimensions; 2 are done")


def _pool(of: Translation, operator: Operator, op: str) -> None:
    x = input_of(operator, 0)
    read = _image(of, operator, x)
    taps = operator.whole(4), operator.whole(3)
    windows = _windows(of, operator, x, taps, (0, 1, 2), read[3])
    make = partial(
        of.make, operator.outputs[0], inputs=[of.real(x, True)], first=True,
        activation=_activation(operator, 5),
    )  # fmt: skip
    if op == "AveragePool" and taps == read[1:3] and not any(windows["pads"]):
        make(op="GlobalAveragePool")
    else:
        make(op=op, kernel_shape=list(taps), **windows)


def _mean(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    shape = of.tensor(x).shape
    axes = sorted({axis % max(1, len(shape)) for axis in of.settings(operator, 1)})
    keep = bool(operator.byte(0))
    kept = [1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes]
    if tuple(kept) != of.tensor(y).shape:
        raise operator.bad(f"its result has the shape {list(of.tensor(y).shape)}, not {kept}")
    if len(shape) == 4 and axes == [1, 2]:
        # Its codes are rounded otherwise than those of AVERAGE_POOL_2D.
        of.make(y, "ReduceMean", [of.real(x, True)], first=True, axes=[2, 3], keepdims=1)
    else:
        of.make(y, "ReduceMean", [of.real(x)], axes=axes, keepdims=int(keep))


def _elementwise(of: Translation, operator: Operator, op: str) -> None:
    names = [input_of(operator, 0), input_of(operator, 1)]
    y = operator.outputs[0]
    shapes = [of.tensor(i).shape for i in names]
    try:
        made = np.broadcast_shapes(*shapes)
    except ValueError:
        made = None
    if made != of.tensor(y).shape:
        raise operator.bad(f"{shapes[0]} and {shapes[1]} do not give {of.tensor(y).shape}")
    has_options = op in ("Add", "Sub", "Mul", "Div")
    activation = _activation(operator, 0) if has_options else "NONE"
    images = [i for i in names if len(of.tensor(i).shape) == 4 and of.tensor(i).place is None]
    rest = [i for i in names if i not in images]
    first = any(of.has_first(i) for i in images) and all(
        of.tensor(i).place is not None or not of.tensor(i).shape for i in rest
    )
    inputs = [
        of.real(i, first) if i in images else _operand(of, i, y) if first else of.real(i)
        for i in names
    ]
    of.make(y, op, inputs, first=first, activation=activation)


def _operand(of: Translation, index: int, y: int) -> str:
    """A constant as images with channels first take it."""
    shape, found = of.tensor(index).shape, of.real(index)
    if math.prod(shape) == 1:
        return of.reshaped(found, (), of.fresh(f"{of.tensor(y).name}/operand"))
    whole = (1,) * (4 - len(shape)) + shape
    if whole != shape:
        found = of.reshaped(found, whole, of.fresh(f"{of.tensor(y).name}/operand"))
    return of.node("Transpose", [found], of.fresh(f"{of.tensor(y).name}/turned"), perm=TO_FIRST)


def _of_one(of: Translation, operator: Operator, op: str) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    _check_same(of, operator)
    first = of.has_first(x)
    if op == "LeakyRelu":
        of.make(y, op, [of.real(x, first)], first=first, alpha=operator.real(0))
    else:
        of.make(y, op, [of.real(x, first)], first=first)


def _check_same(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    if of.tensor(x).shape != of.tensor(y).shape:
        raise operator.bad(f"it makes {of.tensor(y).shape} of {of.tensor(x).shape}")


def _bounded(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    _check_same(of, operator)
    first = of.has_first(x)
    if operator.op == "RELU":
        of.make(y, "Relu", [of.real(x, first)], first=first)
        return
    name = f"{of.tensor(y).name}/bound"
    ends = [of.constant(name, np.array(one, np.float32)) for one in BOUNDS[operator.op]]
    of.make(y, "Clip", [of.real(x, first), *ends], first=first)


def _softmax(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    _check_same(of, operator)
    first = of.has_first(x)
    given, beta = of.real(x, first), operator.real(0)
    if beta != 1.0:
        factor = of.constant(f"{of.tensor(y).name}/beta", np.array(beta, np.float32))
        given = of.node("Mul", [given, factor], of.fresh(f"{of.tensor(y).name}/scaled"))
    of.make(y, "Softmax", [given], first=first, axis=1 if first else -1)


def _reshape(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    before, after = of.tensor(x).shape, of.tensor(y).shape
    if math.prod(before) != math.prod(after) or of.tensor(x).type != of.tensor(y).type:
        raise operator.bad(f"{list(before)} cannot be taken as {list(after)}")
    image = of.has_first(x) and len(before) == 4
    if image and len(after) == 2 and after[0] == before[0]:
        of.flattened[y] = x
    if image and before[1] * before[2] == 1:
        of.view(y, x, True)
    else:
        of.view(y, x, False)


def _pad(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    shape = of.tensor(x).shape
    pads = of.settings(operator, 1)
    if len(operator.inputs) > 2:
        raise operator.unsupported("it pads with a value of its own; zeros are done")
    if len(pads) != 2 * len(shape) or any(not 0 <= one < 1 << 24 for one in pads):
        raise operator.bad(f"pads {pads[:16]} of {list(shape)}")
    before, after = tuple(pads[::2]), tuple(pads[1::2])
    made = tuple(a + d + b for a, d, b in zip(before, shape, after, strict=True))
    if made != of.tensor(y).shape:
        raise operator.bad(f"its result has the shape {list(of.tensor(y).shape)}, not {list(made)}")
    of.padded[y] = Padded(x, before, after)


def _converted(of: Translation, operator: Operator) -> None:
    """QUANTIZE and DEQUANTIZE."""
    x, y = input_of(operator, 0), operator.outputs[0]
    _check_same(of, operator)
    first = of.has_first(x)
    if of.tensor(y).type == "float32":
        of.rename(y, of.real(x, first), first)
    else:
        of.make(y, "", [of.real(x, first)], first=first)


def _transpose(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    perm, shape = of.settings(operator, 1), of.tensor(x).shape
    if sorted(perm) != list(range(len(shape))):
        raise operator.bad(f"permutation {perm} of {list(shape)}")
    if tuple(shape[i] for i in perm) != of.tensor(y).shape:
        raise operator.bad(f"it makes {of.tensor(y).shape} of {list(shape)} with {perm}")
    if tuple(perm) == TO_LAST:
        of.rename(y, of.codes(x), True)
    elif tuple(perm) == TO_FIRST and of.has_first(x):
        of.rename(y, of.codes(x, True))
    else:
        of.move(y, "Transpose", [of.codes(x)], perm=perm)


def _concatenation(of: Translation, operator: Operator) -> None:
    y = operator.outputs[0]
    made = of.tensor(y)
    rank = len(made.shape)
    if not operator.inputs or not rank:
        raise operator.bad("it has no inputs, or makes a single number")
    axis = operator.whole(0) % rank
    names = [input_of(operator, i) for i in range(len(operator.inputs))]
    shapes = [of.tensor(i).shape for i in names]
    rest = {s[:axis] + s[axis + 1 :] for s in shapes if len(s) == rank}
    total = sum(s[axis] for s in shapes if len(s) == rank)
    expected = (*made.shape[:axis], total, *made.shape[axis + 1 :])
    if any(len(s) != rank for s in shapes) or len(rest) != 1 or expected != made.shape:
        raise operator.bad(f"{shapes[:8]} along {axis} do not give {made.shape}")
    first = rank == 4 and any(of.has_first(i) for i in names)
    at = TO_FIRST.index(axis) if first else axis
    activation = _activation(operator, 1)
    kept = all(of.same_codes(i, y) for i in names)
    if kept and activation == "NONE":
        of.move(y, "Concat", [of.codes(i, first) for i in names], first=first, axis=at)
    else:
        of.make(
            y, "Concat", [of.real(i, first) for i in names], first=first, axis=at,
            activation=activation,
        )  # fmt: skip


def _strided_slice(of: Translation, operator: Operator) -> None:
    x, y = input_of(operator, 0), operator.outputs[0]
    shape = of.tensor(x).shape
    begin, end, strides = (of.settings(operator, i) for i in (1, 2, 3))
    masks = [operator.whole(i) for i in range(5)]
    if masks[2] or masks[3] or operator.byte(5):
        raise operator.unsupported("an ellipsis, new dimensions or ends as offsets; none are done")
    if not len(begin) == len(end) == len(strides) <= len(shape) or any(s < 1 for s in strides):
        raise operator.unsupported("steps back, or other numbers of begins, ends and steps")
    kept, spans = [], []
    for i, size in enumerate(shape):
        span = range(size)
        if i < len(begin):
            single = masks[4] >> i & 1
            first = None if masks[0] >> i & 1 and not single else begin[i]
            last = None if masks[1] >> i & 1 else end[i]
            if single:
                last = None if begin[i] == -1 else begin[i] + 1
            span = range(size)[slice(first, last, 1 if single else strides[i])]
            if single and len(span) != 1:
                raise operator.bad(f"{begin[i]} is outside of dimension {i} of {list(shape)}")
        spans.append(span)
        if not (i < len(begin) and masks[4] >> i & 1):
            kept.append(len(span))
    if tuple(kept) != of.tensor(y).shape:
        raise operator.bad(f"its result has the shape {list(of.tensor(y).shape)}, not {kept}")
    label = of.tensor(y).name
    ends = ([s.start for s in spans], [s.stop for s in spans], list(range(len(shape))),
            [s.step for s in spans])  # fmt: skip
    cuts = [of.constant(f"{label}/slice", np.array(one, np.int64)) for one in ends]
    if len(kept) == len(shape):
        of.move(y, "Slice", [of.codes(x), *cuts])
        return
    whole = of.node("Slice", [of.codes(x), *cuts], of.fresh(f"{label}/whole"))
    of.rename(y, of.reshaped(whole, kept, label))


Adder = Callable[[Translation, Operator], None]

OPERATORS: dict[str, Adder] = {
    "CONV_2D": partial(_convolution, depthwise=False),
    "DEPTHWISE_CONV_2D": partial(_convolution, depthwise=True),
    "FULLY_CONNECTED": _fully_connected,
    "AVERAGE_POOL_2D": partial(_pool, op="AveragePool"),
    "MAX_POOL_2D": partial(_pool, op="MaxPool"),
    "MEAN": _mean,
    **{
        name: partial(_elementwise, op=op)
        for name, op in (("ADD", "Add"), ("SUB", "Sub"), ("MUL", "Mul"), ("DIV", "Div"),
                         ("MAXIMUM", "Max"), ("MINIMUM", "Min"))
    },
    **{
        name: partial(_of_one, op=op)
        for name, op in (("LOGISTIC", "Sigmoid"), ("TANH", "Tanh"), ("HARD_SWISH", "HardSwish"),
                         ("LEAKY_RELU", "LeakyRelu"))
    },
    **dict.fromkeys(("RELU", "RELU6", "RELU_N1_TO_1"), _bounded),
    "SOFTMAX": _softmax,
    **dict.fromkeys(("RESHAPE", "SQUEEZE", "EXPAND_DIMS"), _reshape),
    "PAD": _pad,
    "QUANTIZE": _converted,
    "DEQUANTIZE": _converted,
    "TRANSPOSE": _transpose,
    "CONCATENATION": _concatenation,
    "STRIDED_SLICE": _strided_slice,
}  # fmt: skip
