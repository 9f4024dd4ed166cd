"""Sizes that convolutions and pools have as attributes, checked before anybody counts with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headrace.errors import ModelFileError

# By operator, which input has the weights; None: none.
_WEIGHTS: Mapping[str, int | None] = {
    "Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3, "MaxPool": None,
    "AveragePool": None, "LpPool": None,
}  # fmt: skip
_FROM_ONE = ("strides", "dilations", "kernel_shape")  # each of these is at least 1
_PADS = (b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID")


def check_windows(
    path: Path | None, node: Any, shape_of: Callable[[str], tuple[int, ...] | None]
) -> None:
    """That a node's windows have sizes, steps and pads.

    Args:
        path: of the file, for messages.
        node: a NodeProto, of any operator.
        shape_of: the shape of an initialiser; None: it is none.

    Raises:
        ModelFileError: a stride, dilation or size is below 1, a pad below 0, or there are too few
            or too many of them; weights fit neither them nor the groups; pads are of no kind.
    """
    if node.op_type not in _WEIGHTS or node.domain not in ("", "ai.onnx"):
        return
    label = f"node {node.name or node.output[:1]} ({node.op_type})"
    given = {one.name: list(one.ints) for one in node.attribute if one.ints}
    for name, least in (*((name, 1) for name in _FROM_ONE), ("pads", 0)):
        if any(n < least for n in given.get(name, [])):
            raise ModelFileError(
                f"{label} has {name} {given[name]}, and each is at least {least}; export it again",
                path=path,
            )
    pad = next((one.s for one in node.attribute if one.name == "auto_pad"), b"NOTSET")
    if pad not in _PADS:
        raise ModelFileError(
            f"{label} has auto_pad {pad.decode(errors='replace')!r}, which is none of "
            f"{', '.join(one.decode() for one in _PADS)}; export it again",
            path=path,
        )
    ceil = next((one.i for one in node.attribute if one.name == "ceil_mode"), 0)
    if ceil not in (0, 1):
        raise ModelFileError(
            f"{label} has ceil_mode {ceil}, which is 0 or 1; export it again", path=path
        )
    groups = next((one.i for one in node.attribute if one.name == "group"), 1)
    if groups < 1:
        raise ModelFileError(f"{label} has {groups} groups; export it again", path=path)
    at = _WEIGHTS[node.op_type]
    shape = None if at is None or at >= len(node.input) else shape_of(node.input[at])
    axes = len(given["kernel_shape"]) if "kernel_shape" in given else None
    if shape is not None:
        axes = len(shape) - 2
        if given.get("kernel_shape", list(shape[2:])) != list(shape[2:]):
            raise ModelFileError(
                f"{label} has kernel_shape {given['kernel_shape']}, and its weights have the shape "
                f"{list(shape)}; export it again",
                path=path,
            )
        if not shape or shape[0] % groups:
            raise ModelFileError(
                f"{label} has {groups} groups, which its weights of the shape {list(shape)} cannot "
                "be cut into; export it again",
                path=path,
            )
    for name, count in (*((name, 1) for name in _FROM_ONE), ("pads", 2)):
        if axes is not None and name in given and len(given[name]) != count * axes:
            raise ModelFileError(
                f"{label} has {name} {given[name]}, and {count * axes} are wanted; export it again",
                path=path,
            )
