"""Random graphs of ONNX that are valid: operators of ours in all their forms, and some of the host.

Nodes are proposed one by one; what onnx's own inference of shapes refuses, or what gets too large,
is proposed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference
from onnx_models import FLOAT, model_of

OPSET = 21
MOST_ELEMENTS = 40_000
Proposal = tuple[str, list[str], dict[str, Any]]


class Graph:
    """A graph that grows.

    Attributes:
        rng: decides everything.
        shapes: of float32 values, by name.
        constants: by name.
        nodes: in order.
        inputs: names of what it takes.
        ours: whether kinds of nodes that are the host's are seldom.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[Any] = []
        self.inputs: list[str] = []
        self.ours = self.upto(4) > 0

    def take(self, shape: tuple[int, ...]) -> str:
        """One more input."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(name)
        self.shapes[name] = shape
        return name

    def constant(self, value: Any) -> str:
        """A name for a constant."""
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def floats(self, *shape: int, scale: float = 1.0) -> str:
        """A random constant."""
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def one_of(self, *choices: Any) -> Any:
        """One of them."""
        return choices[int(self.rng.integers(len(choices)))]

    def upto(self, most: int, least: int = 0) -> int:
        """A random number, `most` among them."""
        return int(self.rng.integers(least, most + 1))

    def value(self, *ranks: int) -> str:
        """A value of such a rank, late ones more often.

        Raises:
            ValueError: there is none.
        """
        wanted = ranks or (2, 3, 4)
        names = [name for name, shape in self.shapes.items() if len(shape) in wanted]
        if not names:
            raise ValueError("no value of this rank")
        back = int(self.rng.geometric(0.45))
        return names[max(0, len(names) - back)]

    def add(self, op: str, inputs: list[str], **attributes: Any) -> bool:
        """One more node, if it is valid and small; whether it was."""
        count = attributes.pop("_outputs", 1)
        domain = attributes.pop("_domain", "")
        names = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        node = helper.make_node(op, inputs, names, domain=domain, **attributes)
        if domain:
            shapes: list[tuple[int, ...] | None] = [self.shapes[inputs[0]]]
        else:
            shapes = self._shapes(node)
        if any(s is None or 0 in s or np.prod(s) > MOST_ELEMENTS for s in shapes):
            return False
        self.nodes.append(node)
        self.shapes.update({n: s for n, s in zip(names, shapes, strict=True) if s is not None})
        return True

    def _shapes(self, node: Any) -> list[tuple[int, ...] | None]:
        schema = defs.get_schema(node.op_type, OPSET, "")
        held = {
            n: numpy_helper.from_array(self.constants[n]) for n in node.input if n in self.constants
        }
        types = {
            n: helper.make_tensor_type_proto(held[n].data_type, held[n].dims)
            if n in held
            else helper.make_tensor_type_proto(FLOAT, self.shapes[n])
            for n in node.input
            if n
        }
        try:
            found = shape_inference.infer_node_outputs(
                schema, node, types, held, opset_imports=[helper.make_opsetid("", OPSET)]
            )
        except (onnx.shape_inference.InferenceError, RuntimeError):
            return [None]
        made = []
        for name in node.output:
            of = found[name].tensor_type if name in found else None
            whole = of is not None and of.HasField("shape") and of.elem_type == FLOAT
            dims = [d.dim_value for d in of.shape.dim] if whole and of is not None else None
            made.append(None if dims is None else tuple(dims))
        return made

    def model(self) -> Any:
        """The ModelProto; what nobody reads is given out, and some of the rest."""
        read = {name for node in self.nodes for name in node.input}
        made = [name for node in self.nodes for name in node.output]
        outputs = [n for n in made if n not in read or self.rng.uniform() < 0.05]
        used = {n: c for n, c in self.constants.items() if n in read}
        return model_of(
            self.nodes, {n: (FLOAT, list(self.shapes[n])) for n in self.inputs}, outputs, used,
            opset=OPSET,
        )  # fmt: skip


def _windows(g: Graph, sizes: tuple[int, ...], kernel: list[int], *, dilate: bool = True) -> Any:
    found: dict[str, Any] = {"strides": [g.upto(3, 1) for _ in sizes]}
    if dilate and g.upto(3) == 0:
        found["dilations"] = [g.upto(3, 1) for _ in sizes]
    kind = g.upto(5)
    if kind == 0 and "dilations" not in found:
        fits = all(k >= s for k, s in zip(kernel, found["strides"], strict=True))
        found["auto_pad"] = g.one_of(*(("SAME_UPPER", "SAME_LOWER") if fits else ()), "VALID")
    elif kind <= 3:
        found["pads"] = [g.upto(k - 1) for k in (*kernel, *kernel)]
    if found.get("auto_pad") not in ("SAME_UPPER", "SAME_LOWER"):
        n = len(sizes)
        pads, apart = found.get("pads", [0] * 2 * n), found.get("dilations", [1] * n)
        for i in range(n):
            if sizes[i] + pads[i] + pads[n + i] < apart[i] * (kernel[i] - 1) + 1:
                raise ValueError("the window is larger than the image")
    return found


def _conv(g: Graph) -> Proposal:
    x = g.value(4, 4, 4, 3)
    shape = g.shapes[x]
    sizes, channels = shape[2:], shape[1]
    kernel = [g.one_of(1, 1, 2, 3, 3, 5) for _ in sizes]
    kind, out = g.upto(3), g.one_of(1, 5, 16, 17, 32, 40)
    group = 1
    if kind == 0:
        group, out = channels, channels * g.one_of(1, 1, 1, 2)
    elif kind == 1:
        group = g.one_of(*[n for n in range(1, channels + 1) if channels % n == 0])
        out = group * g.upto(9, 1)
    each = channels // group
    w = g.floats(out, each, *kernel, scale=(each * float(np.prod(kernel))) ** -0.5)
    if g.upto(3) == 0:
        g.constants[w] *= g.rng.uniform(size=g.constants[w].shape) < 0.25
    more = [g.floats(out)] if g.upto(2) else []
    return "Conv", [x, w, *more], {"group": group, **_windows(g, sizes, kernel)}


def _transposed(g: Graph) -> Proposal:
    x = g.value(4)
    channels, out = g.shapes[x][1], g.upto(20, 1)
    kernel = [g.upto(4, 1), g.upto(4, 1)]
    if g.upto(1):
        attributes: dict[str, Any] = {"strides": kernel}
    else:
        strides = [g.upto(3, 1), g.upto(3, 1)]
        attributes = {"strides": strides, "pads": [g.upto(1) for _ in range(4)]}
        if g.upto(2) == 0:
            attributes["output_padding"] = [g.upto(s - 1) for s in strides]
    w = g.floats(channels, out, *kernel, scale=channels**-0.5)
    return "ConvTranspose", [x, w, *([g.floats(out)] if g.upto(1) else [])], attributes


def _pool(g: Graph) -> Proposal:
    x = g.value(4, 4, 3)
    sizes = g.shapes[x][2:]
    kernel = [g.upto(4, 1) for _ in sizes]
    op = g.one_of("MaxPool", "AveragePool")
    found = _windows(g, sizes, kernel) | {"kernel_shape": kernel, "ceil_mode": g.upto(1)}
    if op == "AveragePool":
        found["count_include_pad"] = g.upto(1)
    return op, [x], found


def _mean(g: Graph) -> Proposal:
    return g.one_of("GlobalAveragePool", "GlobalMaxPool"), [g.value(3, 4)], {}


def _single(g: Graph) -> Proposal:
    ops = [
        "Relu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Tanh",
        "Abs",
        "Identity",
        "Gelu",
    ]
    op = g.one_of(*ops, *(() if g.ours else ("Erf", "Neg", "Softplus", "Elu", "Sin", "Mish")))
    attributes = {}
    if op == "LeakyRelu":
        attributes = {"alpha": float(g.rng.uniform(0, 1))}
    if op == "Gelu":
        attributes = {"approximate": g.one_of("none", "tanh")}
    return op, [g.value()], attributes


def _clip(g: Graph) -> Proposal:
    bounds = [g.constant(np.float32(b)) for b in (-g.rng.uniform(0, 2), g.rng.uniform(0, 2))]
    return "Clip", [g.value(), *bounds[: g.upto(2)]], {}


def _two(g: Graph) -> Proposal:
    op = g.one_of("Add", "Sub", "Mul", "Max", "Min", "Add", "Mul")
    x = g.value()
    shape = g.shapes[x]
    kind = g.upto(4)
    if kind == 0:
        same = [n for n, s in g.shapes.items() if len(s) == len(shape)]
        return op, [x, g.one_of(*same)], {}
    if kind == 1:
        return op, [x, g.value()], {}
    wide = tuple(n if g.upto(1) else 1 for n in shape)[g.upto(len(shape)) :]
    if kind == 2 and len(shape) >= 3:
        wide = (shape[1], *([1] * (len(shape) - 2)))
    c = g.floats(*wide)
    return op, g.one_of([x, c], [c, x]), {}


def _div(g: Graph) -> Proposal:
    x = g.value()
    c = g.rng.uniform(0.5, 2, g.shapes[x][-g.upto(2, 1) :]) * g.one_of(1, -1)
    return "Div", [x, g.constant(c.astype(np.float32))], {}


def _norm(g: Graph) -> Proposal:
    kind = g.upto(2)
    x = g.value(4) if kind == 0 else g.value(2, 3, 4)
    if kind == 0:
        n = g.shapes[x][1]
        given = [g.floats(n), g.floats(n), g.floats(n)]
        variance = g.constant(g.rng.uniform(0.5, 2, n).astype(np.float32))
        return "BatchNormalization", [x, *given, variance], {}
    if kind == 1:
        n = g.shapes[x][-1]
        return "LayerNormalization", [x, g.floats(n), *([g.floats(n)] * g.upto(1))], {"axis": -1}
    return "Softmax", [x], {"axis": g.upto(len(g.shapes[x]) - 1)}


def _product(g: Graph) -> Proposal:
    kind = g.upto(3)
    if kind == 0:
        x = g.value(2)
        n, out = g.shapes[x][1], g.upto(40, 1)
        turned = g.upto(1)
        w = g.floats(*((out, n) if turned else (n, out)), scale=n**-0.5)
        bias = [g.floats(*g.one_of((out,), (1, out), (1,), ()))] if g.upto(1) else []
        return "Gemm", [x, w, *bias], {"transB": turned}
    x = g.value(2, 3, 4)
    n = g.shapes[x][-1]
    if kind == 1:
        fits = [k for k, s in g.shapes.items() if len(s) >= 2 and s[-2] == n]
        if fits:
            return "MatMul", [x, g.one_of(*fits)], {}
    return "MatMul", [x, g.floats(n, g.upto(40, 1), scale=n**-0.5)], {}


def _concat(g: Graph) -> Proposal:
    x = g.value(2, 3, 4)
    shape = g.shapes[x]
    axis = 1 if g.ours else g.upto(len(shape) - 1)
    like = [
        k
        for k, s in g.shapes.items()
        if len(s) == len(shape) and s[:axis] == shape[:axis] and s[axis + 1 :] == shape[axis + 1 :]
    ]
    read = [g.one_of(*like) for _ in range(g.upto(3, 1))] + [x]
    if not g.ours and g.upto(1):
        read.insert(g.upto(len(read)), g.floats(*shape[:axis], g.upto(3, 1), *shape[axis + 1 :]))
    return "Concat", read, {"axis": axis}


def _split(g: Graph) -> Proposal:
    x = g.value(2, 3, 4)
    axis = 1 if g.ours else g.upto(len(g.shapes[x]) - 1)
    size = g.shapes[x][axis]
    if size < 2:
        raise ValueError("nothing to split")
    first = g.one_of(*{1, size // 2, min(16, size - 1)})
    parts = g.constant(np.array([first, size - first], np.int64))
    return "Split", [x, parts], {"axis": axis, "_outputs": 2}


def _slice(g: Graph) -> Proposal:
    x = g.value(2, 3, 4)
    shape = g.shapes[x]
    axes = sorted({g.upto(len(shape) - 1) for _ in range(g.upto(2, 1))})
    starts, ends, steps = [], [], []
    for axis in axes:
        step = g.one_of(1, 1, 1, 2, 3, -1, -2)
        a, b = sorted((g.upto(shape[axis] - 1), g.upto(shape[axis])))
        starts.append(a if step > 0 else b)
        ends.append((b + 1 if step > 0 else a - 1) if g.upto(3) else g.one_of(2**62, -(2**62)))
        steps.append(step)
    given = [g.constant(np.array(v, np.int64)) for v in (starts, ends, axes, steps)]
    return "Slice", [x, *given], {}


def _pad(g: Graph) -> Proposal:
    x = g.value(2, 3, 4)
    mode = g.one_of("constant", "reflect", "edge", "wrap")
    pads = []
    for _ in range(2):
        pads += [g.upto(min(2, n - 1)) * g.upto(1) for n in g.shapes[x]]
    more = [g.constant(np.float32(g.rng.normal()))] if mode == "constant" and g.upto(1) else []
    return "Pad", [x, g.constant(np.array(pads, np.int64)), *more], {"mode": mode}


def _resize(g: Graph) -> Proposal:
    x = g.value(4)
    mode = g.one_of("nearest", "linear", "linear", "cubic")
    found: dict[str, Any] = {"mode": mode}
    found["coordinate_transformation_mode"] = g.one_of(
        "half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"
    )
    if mode == "nearest":
        found["nearest_mode"] = g.one_of("floor", "round_prefer_floor", "ceil", "round_prefer_ceil")
    scales = [1.0, 1.0, g.one_of(0.5, 1.0, 1.5, 2.0, 3.0), g.one_of(0.5, 1.0, 2.0, 2.5)]
    if g.upto(1):
        return "Resize", [x, "", g.constant(np.array(scales, np.float32))], found
    sizes = [*g.shapes[x][:2], g.upto(20, 1), g.upto(20, 1)]
    return "Resize", [x, "", "", g.constant(np.array(sizes, np.int64))], found


def _move(g: Graph) -> Proposal:
    x = g.value()
    if g.ours and g.upto(2):
        shape = g.shapes[x]
        if len(shape) == 4 and g.upto(1):
            return "Flatten", [x], {}
        to = {2: [1, *shape], 3: list(shape[1:]), 4: [*shape[:2], -1]}[len(shape)]
        if len(shape) == 3 and shape[0] != 1:
            return "Transpose", [x], {"perm": [0, 2, 1]}
        return "Reshape", [x, g.constant(np.array(to, np.int64))], {}
    shape = g.shapes[x]
    kind = g.upto(4)
    if kind == 0:
        return "Transpose", [x], {"perm": g.rng.permutation(len(shape)).tolist()}
    if kind == 1 and len(shape) > 2:
        at = g.upto(len(shape) - 2)
        joined = [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
        return "Reshape", [x, g.constant(np.array(joined, np.int64))], {}
    if kind == 2:
        return "Unsqueeze", [x, g.constant(np.array([g.upto(len(shape))], np.int64))], {}
    if kind == 3 and 1 in shape and len(shape) > 2:
        return "Squeeze", [x, g.constant(np.array([shape.index(1)], np.int64))], {}
    wide = int(np.prod(shape))
    parts = [n for n in range(1, wide + 1) if wide % n == 0][:40]
    first = g.one_of(*parts)
    rest = wide // first
    second = g.one_of(*[n for n in parts if rest % n == 0])
    to = g.one_of([first, rest], [1, first, rest], [first, second, -1], [1, first, second, -1])
    return "Reshape", [x, g.constant(np.array(to, np.int64))], {}


def _reduce(g: Graph) -> Proposal:
    op = g.one_of("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin", "ReduceMean")
    x = g.value()
    rank = len(g.shapes[x])
    axes = sorted({g.upto(rank - 1) for _ in range(g.upto(2, 1))})
    if rank == 4 and (g.ours or g.upto(1)):
        axes = [2, 3]
    return op, [x, g.constant(np.array(axes, np.int64))], {"keepdims": g.upto(1)}


def _power(g: Graph) -> Proposal:
    return "Pow", [g.value(), g.constant(np.float32(g.one_of(2, 2, 3)))], {}


def _expand(g: Graph) -> Proposal:
    x = g.value()
    to = [g.upto(3, 1) if n == 1 else n for n in g.shapes[x]]
    return "Expand", [x, g.constant(np.array(to, np.int64))], {}


def _gather(g: Graph) -> Proposal:
    x = g.value(2, 3, 4)
    axis = g.upto(len(g.shapes[x]) - 1)
    n = g.shapes[x][axis]
    ids = g.rng.integers(-n, n, g.one_of((), (1,), (3,), (2, 2))).astype(np.int64)
    return "Gather", [x, g.constant(ids)], {"axis": axis}


def _recurrent(g: Graph) -> Proposal:
    x = g.value(3)
    op, hidden = g.one_of("LSTM", "GRU"), g.one_of(3, 16, 20)
    direction = g.one_of("forward", "reverse", "bidirectional")
    ways, gates = 1 + (direction == "bidirectional"), {"LSTM": 4, "GRU": 3}[op]
    n = g.shapes[x][2]
    w = g.floats(ways, gates * hidden, n, scale=n**-0.5)
    r = g.floats(ways, gates * hidden, hidden, scale=hidden**-0.5)
    b = g.floats(ways, 2 * gates * hidden) if g.upto(1) else ""
    attributes = {"direction": direction, "hidden_size": hidden}
    if op == "GRU":
        attributes["linear_before_reset"] = g.upto(1)
    return op, [x, w, r, b], attributes


def _made(g: Graph, op: str, *inputs: str, **attributes: Any) -> str:
    """The value of one more node, on the way to a proposal."""
    if not g.add(op, list(inputs), **attributes):
        raise ValueError(f"{op} is not valid here")
    return str(g.nodes[-1].output[0])


def _whole(g: Graph, *numbers: int) -> str:
    return g.constant(np.array(numbers, np.int64))


def _shuffle(g: Graph) -> Proposal:
    """Dimensions are cut, change places, and are joined again: windows of images, among others."""
    x = g.value(3, 4)
    parts: list[int] = []
    for n in g.shapes[x]:
        cut = g.one_of(*[d for d in range(1, n + 1) if n % d == 0])
        parts += [n] if cut in (1, n) or len(parts) > 5 else [n // cut, cut]
    fixed = g.upto(2) > 0  # channels stay innermost
    perm = g.rng.permutation(len(parts) - fixed).tolist() + [len(parts) - 1] * fixed
    x = _made(g, "Reshape", x, _whole(g, *parts))
    x = _made(g, "Transpose", x, perm=perm)
    sizes = [parts[i] for i in perm]
    while len(sizes) > g.one_of(2, 3, 4):
        at = g.upto(len(sizes) - 2)
        sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
    return "Reshape", [x, _whole(g, *sizes)], {}


def _roll(g: Graph) -> Proposal:
    x = g.value(3, 4)
    axis = g.upto(len(g.shapes[x]) - 1)
    size = g.shapes[x][axis]
    if size < 2:
        raise ValueError("nothing to roll")
    at = g.upto(size - 1, 1)
    ends = [(at, size), (0, at)]
    parts = [_made(g, "Slice", x, *(_whole(g, n) for n in (*of, axis))) for of in ends]
    return "Concat", parts, {"axis": axis}


def _group_norm(g: Graph) -> Proposal:
    x = g.value(3, 4, 4)
    shape = g.shapes[x]
    groups = g.one_of(*[n for n in range(1, shape[1] + 1) if shape[1] % n == 0])
    more = {"epsilon": 0.01}  # less makes differences between libraries too large
    if g.upto(2) == 0:
        return "InstanceNormalization", [x, g.floats(shape[1]), g.floats(shape[1])], more
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    apart = _made(g, "Reshape", x, _whole(g, 0, groups, -1))
    x = _made(g, "InstanceNormalization", apart, g.constant(ones), g.constant(zeros), **more)
    x = _made(g, "Reshape", x, _whole(g, *shape))
    sizes = (shape[1], *[1] * (len(shape) - 2))
    return "Add", [_made(g, "Mul", x, g.floats(*sizes)), g.floats(*sizes)], {}


PROPOSALS: tuple[tuple[int, Callable[[Graph], Proposal]], ...] = (
    (8, _conv), (1, _transposed), (3, _pool), (1, _mean), (5, _single), (2, _clip), (6, _two),
    (1, _div), (4, _norm), (4, _product), (2, _concat), (2, _split), (2, _slice), (2, _pad),
    (2, _resize), (5, _move), (2, _reduce), (2, _shuffle), (1, _roll), (2, _group_norm),
    (1, _power), (1, _expand), (1, _gather),
    (1, _recurrent),
)  # fmt: skip


def random_graph(rng: np.random.Generator) -> Any:
    """A ModelProto of 1 to 20 nodes."""
    g = Graph(rng)
    shapes = [
        (g.one_of(1, 1, 2), g.one_of(1, 3, 16, 20, 32), g.upto(20, 1), g.upto(20, 1)),
        (g.one_of(1, 1, 3), g.upto(20, 1), g.one_of(5, 16, 33, 64)),
        (g.upto(9, 1), g.one_of(1, 8, 16, 50)),
    ]
    g.take(g.one_of(shapes[0], shapes[0], shapes[1], shapes[2]))
    if g.upto(3) == 0:
        g.take(g.one_of(*shapes))
    weights = np.array([weight for weight, _ in PROPOSALS], float)
    # Few kinds in one graph, so that most are all on kernels of ours, or all on the host.
    if g.ours:
        weights[-4:-1] *= 0.1  # Pow, Expand, Gather
    weights[rng.uniform(size=weights.size) < 0.5] *= 0.02
    weights /= weights.sum()
    wanted = g.upto(20, 1)
    for _ in range(6 * wanted):
        if len(g.nodes) == wanted:
            break
        _, propose = PROPOSALS[int(rng.choice(len(PROPOSALS), p=weights))]
        try:
            op, inputs, attributes = propose(g)
        except ValueError:
            continue
        g.add(op, inputs, **attributes)
    return g.model()
