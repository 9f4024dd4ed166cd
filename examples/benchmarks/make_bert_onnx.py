"""Write an encoder of BERT's architecture as ONNX, from its Hugging Face directory.

    python make_bert_onnx.py DIRECTORY OUT.onnx [--optimised ORT.onnx] [--int8 INT8.onnx]

DIRECTORY has config.json and model.safetensors (all-MiniLM-L6-v2, bge-small, ...). The graph is
the one that PyTorch's exporter gives: any batch and number of tokens, `last_hidden_state` comes
out. `--optimised` also writes what onnxruntime's transformer optimiser makes of it (its own fused
operators), `--int8` what its dynamic quantisation makes of that: the best files onnxruntime has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

OPSET = 17


class Builder:
    """Nodes and initialisers, with names made as they come."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._known: dict[str, str] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        """An initialiser."""
        array = np.asarray(value)
        name = name or f"constant_{array.dtype}_{array.tolist()}"
        if name not in self._known:
            self._known[name] = name
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def linear(b: Builder, weights: dict[str, Any], name: str, x: str) -> str:
    """x W^T + bias."""
    w = b.constant(weights[f"{name}.weight"].T, f"{name}.weight")
    product = b.add("MatMul", x, w)
    return b.add("Add", b.constant(weights[f"{name}.bias"], f"{name}.bias"), product)


def norm(b: Builder, weights: dict[str, Any], name: str, x: str, epsilon: float) -> str:
    """LayerNorm of the last dimension."""
    scale = b.constant(weights[f"{name}.weight"], f"{name}.weight")
    bias = b.constant(weights[f"{name}.bias"], f"{name}.bias")
    return b.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def bert(config: dict[str, Any], weights: dict[str, Any]) -> Any:
    """The ModelProto."""
    b = Builder()
    heads, width = config["num_attention_heads"], config["hidden_size"]
    epsilon = config["layer_norm_eps"]
    shape = b.add("Shape", "input_ids")
    length = b.add("Slice", shape, b.constant(np.array([1])), b.constant(np.array([2])))
    both = "embeddings."
    x = b.add("Gather", b.constant(weights[both + "word_embeddings.weight"], "words"), "input_ids")
    kinds = b.constant(weights[both + "token_type_embeddings.weight"], "kinds")
    x = b.add("Add", x, b.add("Gather", kinds, "token_type_ids"))
    ids = np.arange(config["max_position_embeddings"], dtype=np.int64)[None]
    one, zero = b.constant(np.array([1])), b.constant(np.array([0]))
    positions = b.add("Slice", b.constant(ids, "position_ids"), zero, length, one)
    places = b.constant(weights[both + "position_embeddings.weight"], "places")
    x = b.add("Add", x, b.add("Gather", places, positions))
    x = norm(b, weights, "embeddings.LayerNorm", x, epsilon)
    wide = b.add("Unsqueeze", "attention_mask", one)
    wide = b.add("Unsqueeze", wide, b.constant(np.array([2])))
    absent = b.add("Sub", b.constant(np.float32(1.0)), b.add("Cast", wide, to=TensorProto.FLOAT))
    mask = b.add("Mul", absent, b.constant(np.float32(np.finfo(np.float32).min)))
    apart = b.constant(np.array([0, 0, heads, width // heads]))
    together = b.constant(np.array([0, 0, width]))
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        q, k, v = (
            b.add("Reshape", linear(b, weights, f"{layer}attention.self.{part}", x), apart)
            for part in ("query", "key", "value")
        )
        q, v = (b.add("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, v))
        k = b.add("Transpose", k, perm=[0, 2, 3, 1])
        root = b.constant(np.float32(np.sqrt(width // heads)))
        scores = b.add("Add", b.add("Div", b.add("MatMul", q, k), root), mask)
        mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
        mixed = b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), together)
        mixed = linear(b, weights, layer + "attention.output.dense", mixed)
        x = norm(b, weights, layer + "attention.output.LayerNorm", b.add("Add", mixed, x), epsilon)
        inner = linear(b, weights, layer + "intermediate.dense", x)
        error = b.add("Erf", b.add("Div", inner, b.constant(np.float32(np.sqrt(2.0)))))
        more = b.add("Add", error, b.constant(np.float32(1.0)))
        inner = b.add("Mul", b.add("Mul", inner, more), b.constant(np.float32(0.5)))
        inner = linear(b, weights, layer + "output.dense", inner)
        x = norm(b, weights, layer + "output.LayerNorm", b.add("Add", inner, x), epsilon)
    b.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"]))
    sizes = ["batch", "tokens"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, sizes)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*sizes, width])
    graph = helper.make_graph(b.nodes, "bert", inputs, [output], b.initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="pytorch"
    )
    onnx.checker.check_model(model)
    return model


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--optimised", type=Path, help="onnxruntime's own file of it")
    parser.add_argument("--int8", type=Path, help="dynamically quantised by onnxruntime")
    given = parser.parse_args()
    config = json.loads((given.directory / "config.json").read_text())
    onnx.save(bert(config, load_file(given.directory / "model.safetensors")), given.out)
    if given.optimised or given.int8:
        from onnxruntime.transformers import optimizer

        found = optimizer.optimize_model(
            str(given.out), "bert", num_heads=config["num_attention_heads"],
            hidden_size=config["hidden_size"], opt_level=0,
        )  # fmt: skip
        optimised = given.optimised or given.int8
        found.save_model_to_file(str(optimised))
        if given.int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                optimised, given.int8, weight_type=QuantType.QInt8, per_channel=True,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
            )  # fmt: skip


if __name__ == "__main__":
    main()
