"""A TFLite file as the network of ONNX operators that the runtime takes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from onnx import helper

from headrace.loaders.onnx_model import OnnxModel
from headrace.loaders.reader import TensorReader
from headrace.loaders.tflite_model import read_tflite
from headrace.loaders.tflite_operators import OPERATORS
from headrace.loaders.tflite_translation import Translation, elem_type
from headrace.loaders.tflite_wire import FlatFile

SUFFIX = ".tflite"
_OPSET, _IR_VERSION = 17, 8


def open_tflite(path: Path) -> OnnxModel:
    """Read and check a TFLite file; weights stay in it.

    Inputs and outputs have the names, types and shapes that they have in the file.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: it is no TFLite file, or damaged.
        UnsupportedError: it has operators, or types, that are not done; it names the first.
    """
    with closing(FlatFile(path)) as file, closing(TensorReader()) as reader:
        model = read_tflite(file)
        unknown = [one for one in model.operators if one.op not in OPERATORS]
        if unknown:
            others = sorted({one.op for one in unknown[1:]} - {unknown[0].op})
            more = f" ({', '.join(others[:8])} neither)" if others else ""
            raise unknown[0].unsupported(
                f"{unknown[0].op} of TFLite files is not done{more}; done are "
                f"{', '.join(sorted(OPERATORS))}. An ONNX file of the network may run"
            )
        of = Translation(model, reader)
        for one in model.operators:
            if len(one.outputs) != 1:
                raise one.bad(f"it has {len(one.outputs)} results")
            OPERATORS[one.op](of, one)
        for index in model.outputs:
            name = model.tensors[index].name
            if (found := of.codes(index)) != name:
                of.node("Identity", [found], name)
    ports = [
        [helper.make_tensor_value_info(t.name, elem_type(t), t.shape)
         for t in (model.tensors[i] for i in indices)]
        for indices in (model.inputs, model.outputs)
    ]  # fmt: skip
    graph = helper.make_graph(of.nodes, path.stem, ports[0], ports[1])
    proto: Any = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    return OnnxModel(path, proto, of.weights, of.inline, proto.ByteSize())
