"""What a network takes and gives: names, types and shapes, and whether inputs fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from headrace.loaders.onnx_model import type_name
from headrace.networks.graph import TensorType

NO_TENSORS = ("SEQUENCE", "OPTIONAL", "MAP")


@dataclass(frozen=True)
class Port:
    """An input or output of a network.

    Attributes:
        name: of the value.
        kind: ONNX's name of its type: "FLOAT", "INT64", ...; "SEQUENCE", "OPTIONAL" or "MAP" where
            it is no tensor.
        shape: numbers, and names of those that may change (None: any number, without a name); None
            as a whole where even their count is open.
    """

    name: str
    kind: str
    shape: tuple[int | str | None, ...] | None

    @property
    def is_number(self) -> bool:
        """Whether it is a single whole number or bool, of any rank."""
        whole = self.kind == "BOOL" or self.kind.startswith(("INT", "UINT"))
        return whole and self.shape is not None and all(d == 1 for d in self.shape)

    @property
    def text(self) -> str:
        """For people: `FLOAT [batch, 3, 224, 224]`."""
        if self.shape is None:
            return self.kind
        return f"{self.kind} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"


def port_of(info: Any) -> Port:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        name = (kind or "unknown").removesuffix("_type").replace("sparse_", "sparse ").upper()
        return Port(info.name, name, None)
    tensor = info.type.tensor_type
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else (d.dim_param or None)
            for d in tensor.shape.dim
        )
    return Port(info.name, type_name(tensor.elem_type), shape)


@cache
def _elem_type(dtype: np.dtype[Any]) -> int:
    # The library goes through a list of all types, which takes longer than some networks do.
    import onnx

    if dtype.kind in "OUS":
        return int(onnx.TensorProto.STRING)
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    except (KeyError, ValueError):
        raise TypeError(f"numpy's {dtype} is no type of ONNX") from None


def check_names(inputs: object, wanted: Sequence[Port]) -> None:
    """That inputs come by name.

    Raises:
        TypeError: they are an array, a list or anything else.
    """
    if not isinstance(inputs, Mapping):
        name = wanted[0].name if wanted else "NAME"
        takes = ", ".join(f"{port.name}: {port.text}" for port in wanted)
        raise TypeError(
            f"inputs are given by name, as {{{name!r}: array}}, and not as a "
            f"{type(inputs).__name__}; the network takes {takes}"
        )


def check_inputs(
    inputs: Mapping[str, Any], ports: Mapping[str, Port], wanted: Sequence[Port]
) -> None:
    """That inputs are those of a network, all of them, and of its types.

    Args:
        inputs: arrays, or what is no tensor, by name.
        ports: what it may be given.
        wanted: what it must be given, unless that is optional.

    Raises:
        ValueError, TypeError: an input is missing, or of the wrong shape or type.
    """
    for name, value in inputs.items():
        port = ports.get(name)
        if port is None:
            names = ", ".join(p.name for p in wanted)
            raise ValueError(f"there is no input {name!r}; the network takes {names}")
        if port.shape is not None or port.kind not in NO_TENSORS:
            _check_type(port, value)
    missing = [p.name for p in wanted if p.name not in inputs and p.kind != "OPTIONAL"]
    if missing:
        takes = ", ".join(f"{port.name}: {port.text}" for port in wanted)
        raise ValueError(f"no input {', '.join(missing)}; the network takes {takes}")


def _check_type(port: Port, array: np.ndarray) -> None:
    kind = type_name(_elem_type(array.dtype))
    if kind != port.kind:
        raise TypeError(
            f"input {port.name!r} is {kind} (numpy {array.dtype}), and the network takes "
            f"{port.text}; convert it with .astype(...)"
        )
    if port.shape is None:
        return
    fits = len(array.shape) == len(port.shape) and all(
        not isinstance(d, int) or d == n for d, n in zip(port.shape, array.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"input {port.name!r} has the shape {list(array.shape)}, and the network takes "
            f"{port.text}"
        )


def types_key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells types of inputs from others; made for each call."""
    return tuple(sorted((name, *_key(value)) for name, value in inputs.items()))


def _key(value: Any) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        return _elem_type(value.dtype), value.shape
    return (value.elem_type, value.shape) if isinstance(value, TensorType) else ()


def type_of(value: Any) -> TensorType | None:
    """The type of an input; None: it is no tensor."""
    if isinstance(value, TensorType):
        return value
    if not isinstance(value, np.ndarray):
        return None
    return TensorType(_elem_type(value.dtype), value.shape)
