"""BERT's architecture (Devlin et al. 2018, arXiv:1810.04805) as an ONNX graph.

The graph is the one that PyTorch's exporter gives: any batch and number of tokens, and
`last_hidden_state` comes out. Weights stay where they are, in safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.folder import Folder
from headrace.loaders.huggingface.config import Config
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.onnx_model import OnnxModel
from headrace.loaders.safetensors import read_parts

OPSET = 17
CONFIG, MAX_CONFIG_BYTES = "config.json", 1 << 20
MOST = 1 << 20  # of any size of config.json
ELEMENTS = {
    "F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16,
    "f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
}  # fmt: skip
_GELUS = {"gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def read_bert(folder: Folder) -> OnnxModel:
    """The network of a directory with config.json and safetensors files.

    Raises:
        UnsupportedError: another architecture than BERT's, or a variant of it.
        ModelNotFoundError: a file is missing.
        ModelFileError: a file is corrupt or hostile, or tensors have other shapes than config.json
            says.
    """
    config = Config(folder.json(CONFIG, MAX_CONFIG_BYTES), folder.path / CONFIG)
    sizes = _sizes(config)
    tensors = {info.name: info for part in read_parts(folder) for info in part.tensors}
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""
    builder = _Builder(folder, tensors, prefix)
    proto = _graph(builder, sizes)
    return OnnxModel(folder.path, proto, builder.weights, builder.inline, proto.ByteSize())


def _sizes(config: Config) -> dict[str, Any]:
    kind = config.get("model_type", str)
    if kind != "bert":
        raise UnsupportedError(
            f"{config.path}: of encoders in safetensors files BERT's are read, and this is "
            f"{kind[:40]!r}; export it as ONNX, and name that file"
        )
    if config.get("position_embedding_type", str, "absolute") != "absolute":
        raise UnsupportedError(
            f"{config.path}: only absolute positions are read; export it as ONNX"
        )
    act = config.get("hidden_act", str, "gelu")
    if act not in _GELUS:
        raise UnsupportedError(
            f"{config.path}: 'hidden_act' is {act[:40]!r}; read are {', '.join(_GELUS)}"
        )
    names = (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
        "max_position_embeddings", "vocab_size", "type_vocab_size",
    )  # fmt: skip
    found: dict[str, Any] = {name: config.get(name, int, low=1, high=MOST) for name in names}
    if found["hidden_size"] % found["num_attention_heads"]:
        raise config.bad("num_attention_heads", "does not divide 'hidden_size'")
    found["layer_norm_eps"] = config.get("layer_norm_eps", float, 1e-12)
    found["gelu"] = _GELUS[act]
    return found


class _Builder:
    """Nodes, with names made as they come, and the weights that they read."""

    def __init__(self, folder: Folder, tensors: Mapping[str, TensorInfo], prefix: str) -> None:
        self._folder, self._tensors, self._prefix = folder, tensors, prefix
        self.nodes: list[Any] = []
        self.weights: dict[str, tuple[TensorInfo, int]] = {}
        self.inline: dict[str, Any] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, value: Any) -> str:
        """A small constant."""
        array = np.asarray(value)
        name = f"constant_{array.dtype}_{array.tolist()}"
        self.inline[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, *shape: int) -> str:
        """A tensor of the files as float32; it must have this shape."""
        full = self._prefix + name
        info = self._tensors.get(full)
        if info is None:
            raise ModelFileError(
                "there is no such tensor; download the whole model again",
                path=self._folder.path, tensor=full,
            )  # fmt: skip
        if info.shape != shape:
            raise ModelFileError(
                f"it has the shape {list(info.shape)}, and config.json says {list(shape)}",
                path=info.path, tensor=full,
            )  # fmt: skip
        if info.type not in ELEMENTS:
            raise UnsupportedError(
                f"{info.path}: {full} is {info.type}; of encoders F32, F16 and BF16 are read"
            )
        self.weights[full] = info, ELEMENTS[info.type]
        if ELEMENTS[info.type] == TensorProto.FLOAT:
            return full
        return self.add("Cast", full, to=TensorProto.FLOAT)


def _linear(b: _Builder, name: str, x: str, read: int, made: int) -> str:
    w = b.add("Transpose", b.weight(f"{name}.weight", made, read), perm=[1, 0])
    return b.add("Add", b.weight(f"{name}.bias", made), b.add("MatMul", x, w))


def _norm(b: _Builder, name: str, x: str, width: int, epsilon: float) -> str:
    scale, bias = (b.weight(f"{name}.{part}", width) for part in ("weight", "bias"))
    return b.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def _embedded(b: _Builder, sizes: Mapping[str, Any]) -> str:
    width, positions = sizes["hidden_size"], sizes["max_position_embeddings"]
    shape = b.add("Shape", "input_ids")
    one = b.constant(np.array([1]))
    length = b.add("Slice", shape, one, b.constant(np.array([2])))
    words = b.weight("embeddings.word_embeddings.weight", sizes["vocab_size"], width)
    kinds = b.weight("embeddings.token_type_embeddings.weight", sizes["type_vocab_size"], width)
    places = b.weight("embeddings.position_embeddings.weight", positions, width)
    x = b.add("Add", b.add("Gather", words, "input_ids"), b.add("Gather", kinds, "token_type_ids"))
    return b.add("Add", x, b.add("Slice", places, b.constant(np.array([0])), length))


def _layer(b: _Builder, name: str, x: str, mask: str, sizes: Mapping[str, Any]) -> str:
    width, heads, inner = (
        sizes[one] for one in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    epsilon, head = sizes["layer_norm_eps"], width // heads
    apart, together = (
        b.constant(np.array(shape)) for shape in ([0, 0, heads, head], [0, 0, width])
    )
    q, k, v = (
        b.add("Reshape", _linear(b, f"{name}.attention.self.{part}", x, width, width), apart)
        for part in ("query", "key", "value")
    )
    q, v = (b.add("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, v))
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 2, 3, 1]))
    scores = b.add("Add", b.add("Div", scores, b.constant(np.float32(np.sqrt(head)))), mask)
    mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
    mixed = b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), together)
    mixed = _linear(b, f"{name}.attention.output.dense", mixed, width, width)
    x = _norm(b, f"{name}.attention.output.LayerNorm", b.add("Add", mixed, x), width, epsilon)
    wide = _linear(b, f"{name}.intermediate.dense", x, width, inner)
    back = _linear(b, f"{name}.output.dense", _gelu(b, wide, sizes["gelu"]), inner, width)
    return _norm(b, f"{name}.output.LayerNorm", b.add("Add", back, x), width, epsilon)


def _gelu(b: _Builder, x: str, form: str) -> str:
    if form == "tanh":
        cube = b.add("Mul", b.add("Mul", x, x), x)
        inner = b.add("Add", x, b.add("Mul", cube, b.constant(np.float32(0.044715))))
        inner = b.add("Mul", inner, b.constant(np.float32(np.sqrt(2 / np.pi))))
        error = b.add("Tanh", inner)
    else:
        error = b.add("Erf", b.add("Div", x, b.constant(np.float32(np.sqrt(2.0)))))
    more = b.add("Add", error, b.constant(np.float32(1.0)))
    return b.add("Mul", b.add("Mul", x, more), b.constant(np.float32(0.5)))


def _graph(b: _Builder, sizes: Mapping[str, Any]) -> Any:
    x = _embedded(b, sizes)
    x = _norm(b, "embeddings.LayerNorm", x, sizes["hidden_size"], sizes["layer_norm_eps"])
    wide = b.add("Unsqueeze", "attention_mask", b.constant(np.array([1])))
    wide = b.add("Unsqueeze", wide, b.constant(np.array([2])))
    there = b.add("Cast", wide, to=TensorProto.FLOAT)
    absent = b.add("Sub", b.constant(np.float32(1.0)), there)
    mask = b.add("Mul", absent, b.constant(np.float32(np.finfo(np.float32).min)))
    for i in range(sizes["num_hidden_layers"]):
        x = _layer(b, f"encoder.layer.{i}", x, mask, sizes)
    b.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"]))
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"]) for n in names
    ]
    output = helper.make_tensor_value_info(
        "last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", sizes["hidden_size"]]
    )
    graph = helper.make_graph(b.nodes, "bert", inputs, [output])
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="pytorch")


def with_weights(model: OnnxModel) -> Any:
    """The whole ModelProto, for files that stand for themselves."""
    from headrace.loaders.reader import TensorReader

    reader = TensorReader()
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    turned = {}
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in model.weights:
            turned[node.input[0]] = node
    for name in (*model.weights, *model.inline):
        tensor = model.constant(name, reader)
        if name in turned and tensor.data_type == TensorProto.FLOAT:
            # As exporters have it: optimisers look for weights, not for what is made of them.
            array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor = numpy_helper.from_array(array, turned[name].output[0])
            proto.graph.node.remove(turned[name])
        proto.graph.initializer.append(tensor)
    reader.close()
    onnx.checker.check_model(proto)
    return proto
