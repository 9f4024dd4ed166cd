"""A float32 model with QuantizeLinear and DequantizeLinear around what integers can compute.

Activations are uint8 with one scale and zero point, weights int8 with a scale for each channel and
no zero point (-127..127), biases int32 in units of the products. Bounds (Relu, Clip) whose ends are
those of the bytes go. The last product and what MatMul makes stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.networks.compression.names import NewNames, reads
from headrace.networks.graph import node_of

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
PRODUCTS = ("Conv", "Gemm", "MatMul")
_BOUNDS = ("Relu", "Clip")
_MOST_INT32 = 2**31 - 1
_LEAST_SCALE = 1e-30

Range = tuple[float, float]


@dataclass
class Chosen:
    """What of a model is to be quantised.

    Attributes:
        nodes: that integers compute, by index.
        values: activations that become bytes.
        bounds: Relu and Clip that stand between a node of those and its bytes: the value that
            the node makes to the nodes, in order.
        shared: values that must have the same scale as another, and which.
    """

    nodes: list[int] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    bounds: dict[str, list[int]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)


class Quantiser:
    """Writes quantised models.

    Args:
        model: in float32, weights inside.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {one.name: one for one in model.graph.initializer}
        self.outputs = {one.name for one in model.graph.output}
        self._users: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node_of(node).reads:
                self._users.setdefault(name, []).append(i)
        self.chosen = self._choose()
        # What corrects the biases of products (`bias_correction`), by the name of what they make.
        self.corrections: dict[str, np.ndarray] = {}

    # ---- what to quantise ------------------------------------------------------------------------

    def _choose(self) -> Chosen:
        chosen = Chosen()
        values: dict[str, None] = {}
        for i, node in enumerate(self.nodes):
            if node.domain not in ("", "ai.onnx") or not self._fits(node, values):
                continue
            chosen.nodes.append(i)
            y, bounds = self._behind(node.output[0])
            for name in self._activations(node):
                values[name] = None
            if not self._stays_float(node, y, bounds):
                values[y] = None
            if node.op_type in VIEWS:
                chosen.shared[y] = node.input[0]
        chosen.values = list(values)
        for i in chosen.nodes:
            y, bounds = self._behind(self.nodes[i].output[0])
            if bounds and y in values:  # what MatMul makes is bytes where another product reads it
                chosen.bounds[self.nodes[i].output[0]] = bounds
        return chosen

    def _fits(self, node: Any, values: Mapping[str, None]) -> bool:
        if node.op_type in PRODUCTS:
            return self._is_product(node)
        if node.op_type == "Add":
            # What is float32 anyhow (rows of encoders, masks) would lose, and gain nothing.
            return all(name in values for name in node.input)
        if node.op_type in VIEWS:
            return node.input[0] in values and node.output[0] not in self.outputs
        return bool(node.op_type == "GlobalAveragePool")

    def _stays_float(self, node: Any, y: str, bounds: list[int]) -> bool:
        """Whether a product's sums are numbers as they are: the last ones, and those of MatMul.

        What encoders add to these, and what follows, is float32: bytes would be a detour.
        """
        if node.op_type == "MatMul":
            return True
        return y in self.outputs and node.op_type == "Gemm" and not bounds

    def _is_product(self, node: Any) -> bool:
        weight = self.constants.get(node.input[1])
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT or 0 in weight.dims:
            return False
        if node.input[0] in self.constants:
            return False
        if len(node.input) > 2 and node.input[2] and not self._is_bias(node.input[2]):
            return False
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        plain = all(given.get(k, v) == v for k, v in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))
        return plain and (node.op_type == "Conv" or len(weight.dims) == 2)

    def _is_bias(self, name: str) -> bool:
        """Whether what a product adds is a constant that all rows have in common."""
        held = self.constants.get(name)
        return held is not None and all(n == 1 for n in held.dims[:-1])

    def _activations(self, node: Any) -> list[str]:
        return list(node.input[:2]) if node.op_type == "Add" else [node.input[0]]

    def _behind(self, name: str) -> tuple[str, list[int]]:
        """The value behind the bounds of a value that nobody else reads, and these."""
        found: list[int] = []
        while name not in self.outputs and len(self._users.get(name, ())) == 1:
            i = self._users[name][0]
            node = self.nodes[i]
            limits = [one for one in node.input[1:] if one]
            constant = all(one in self.constants for one in limits)
            if node.op_type not in _BOUNDS or node.domain or not constant:
                break
            found.append(i)
            name = node.output[0]
        return name, found

    def products(self) -> dict[str, Any]:
        """Nodes that have weights, by the name of what they make."""
        nodes = (self.nodes[i] for i in self.chosen.nodes)
        return {node.output[0]: node for node in nodes if node.op_type in PRODUCTS}

    # ---- the quantised model ---------------------------------------------------------------------

    def write(self, ranges: Mapping[str, Range]) -> tuple[Any, dict[str, str]]:
        """The quantised model, and the names there of what nodes make, by those that they had.

        Args:
            ranges: of the values of `chosen`.
        """
        writing = _Writing(self, ranges)
        return writing.model, writing.made


class _Writing:
    def __init__(self, quantiser: Quantiser, ranges: Mapping[str, Range]) -> None:
        self.of = quantiser
        self.model = onnx.ModelProto()
        self.model.CopyFrom(quantiser.model)
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        chosen = quantiser.chosen
        self.made: dict[str, str] = {}  # names of what nodes make, by those that they had
        self._integers = set(chosen.nodes)
        self._names = NewNames(quantiser.model)
        self._dequantized: dict[str, str] = {}  # what is read in place of values
        self._ends: dict[str, str] = {}  # of values that stood in front of bounds which go
        self.scales = {name: _steps(ranges[self._source(name)]) for name in chosen.values}
        gone = self._unneeded_bounds()
        for name in [one.name for one in graph.input if one.name in self.scales]:
            self._pair(name, name)
        for i, node in enumerate(quantiser.nodes):
            if i not in gone:
                self._node(i, node)
        used = reads(self.model)
        kept = [one for name, one in quantiser.constants.items() if used[name]]
        graph.initializer.extend(kept)
        self._tidy()

    def _node(self, index: int, node: Any) -> None:
        """A node as it was, but for what it reads and makes, and what stands around it."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for k, name in enumerate(made.input):
            if name in self.scales and name not in self.of.outputs:
                made.input[k] = self._dequantized[name]
        if index in self._integers and node.op_type in PRODUCTS:
            self._weights(made, node)
        nodes = self.model.graph.node
        place = len(nodes)
        nodes.append(made)
        for k, name in enumerate(node.output):
            end = self.made[name] = self._ends.get(name, name)
            if end in self.of.outputs and end in self.scales:
                self.made[name] = self._names.like(f"{end}_float")
                self._pair(self.made[name], end, end)  # the output itself is what is dequantised
            elif end in self.scales:
                self._pair(end, end)
            nodes[place].output[k] = self.made[name]

    def _source(self, name: str) -> str:
        shared = self.of.chosen.shared
        while name in shared:
            name = shared[name]
        return name

    def _tidy(self) -> None:
        """Initialisers by name, so that the file is the same every time; operator sets in use."""
        graph = self.model.graph
        domains = {node.domain for node in graph.node} | {""}
        used = [one for one in self.model.opset_import if one.domain in domains]
        del self.model.opset_import[:]
        self.model.opset_import.extend(used)
        ordered = sorted(graph.initializer, key=lambda one: str(one.name))
        del graph.initializer[:]
        graph.initializer.extend(ordered)

    def _unneeded_bounds(self) -> set[int]:
        """Bounds that bytes have by themselves."""
        found: set[int] = set()
        for name, bounds in self.of.chosen.bounds.items():
            end = self.of.nodes[bounds[-1]].output[0]
            scale, zero = self.scales[end]
            ends = [self._limits(self.of.nodes[i]) for i in bounds]
            low = np.rint(np.float32(max(e[0] for e in ends)) / scale) + zero
            high = np.rint(np.float32(min(e[1] for e in ends)) / scale) + zero
            if low <= 0 and high >= 255:
                found.update(bounds)
                self._ends[name] = end
        return found

    def _limits(self, node: Any) -> Range:
        if node.op_type == "Relu":
            return 0.0, np.inf
        found = [-np.inf, np.inf]
        for k, name in enumerate(node.input[1:]):
            if name:
                found[k] = float(numpy_helper.to_array(self.of.constants[name]).reshape(-1)[0])
        return found[0], found[1]

    def _constant(self, name: str, value: np.ndarray) -> str:
        name = self._names.like(name)
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _pair(self, source: str, name: str, end: str = "") -> None:
        """QuantizeLinear and DequantizeLinear of a value."""
        scale, zero = self.scales[name]
        given = [
            self._constant(f"{name}_scale", np.array(scale, np.float32)),
            self._constant(f"{name}_zero_point", np.array(zero, np.uint8)),
        ]
        middle = self._names.like(f"{name}_quantized")
        end = self._dequantized[name] = end or self._names.like(f"{name}_dequantized")
        self.model.graph.node.extend(
            (
                helper.make_node("QuantizeLinear", [source, *given], [middle], f"{name}_quantize"),
                helper.make_node("DequantizeLinear", [middle, *given], [end], f"{name}_dequantize"),
            )
        )

    def _weights(self, made: Any, node: Any) -> None:
        w = numpy_helper.to_array(self.of.constants[node.input[1]]).astype(np.float64)
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        axis = 0 if node.op_type == "Conv" or given.get("transB", 0) else 1
        x_scale = np.float64(self.scales[node.input[0]][0])
        bias = None
        if len(node.input) > 2 and node.input[2]:
            bias = numpy_helper.to_array(self.of.constants[node.input[2]]).astype(np.float64)
            bias = np.broadcast_to(bias.reshape(-1), w.shape[axis])
        correction = self.of.corrections.get(node.output[0])
        if correction is not None:
            bias = correction + (0 if bias is None else bias)
        rows = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
        scale = np.abs(rows).max(1, initial=0) / 127
        if bias is not None:
            scale = np.maximum(scale, np.abs(bias) / (x_scale * (_MOST_INT32 // 2)))
        scale = np.maximum(scale, _LEAST_SCALE).astype(np.float32)
        shape = [1] * w.ndim
        shape[axis] = -1
        codes = np.clip(np.rint(w / scale.astype(np.float64).reshape(shape)), -127, 127)
        name = node.output[0]
        weight = [
            self._constant(f"{name}_weight", codes.astype(np.int8)),
            self._constant(f"{name}_weight_scale", scale),
            self._constant(f"{name}_weight_zero_point", np.zeros(len(scale), np.int8)),
        ]
        nodes = self.model.graph.node
        made.input[1] = self._names.like(f"{name}_weight_dequantized")
        nodes.append(
            helper.make_node(
                "DequantizeLinear", weight, [made.input[1]], f"{name}_weight_dequantize", axis=axis
            )
        )
        if bias is None or node.op_type == "MatMul":
            return
        # The product of both scales as float32, as readers of such files compute it.
        unit = np.float32(x_scale) * scale
        whole = np.rint(bias / unit.astype(np.float64)).astype(np.int32)
        terms = [
            self._constant(f"{name}_bias", whole),
            self._constant(f"{name}_bias_scale", unit),
            self._constant(f"{name}_bias_zero_point", np.zeros(len(unit), np.int32)),
        ]
        end = self._names.like(f"{name}_bias_dequantized")
        if len(made.input) > 2:
            made.input[2] = end
        else:
            made.input.append(end)
        nodes.append(
            helper.make_node("DequantizeLinear", terms, [end], f"{name}_bias_dequantize", axis=0)
        )


def _steps(ends: Range) -> tuple[np.float32, int]:
    """Scale and zero point of a range, of which zero is one value."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = np.float32(max((high - low) / 255, _LEAST_SCALE))
    return scale, int(np.clip(np.rint(-low / np.float64(scale)), 0, 255))
