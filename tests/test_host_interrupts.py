"""Ctrl-C ends what onnxruntime computes."""

from __future__ import annotations

import subprocess
import sys

ENDLESS = """
import _thread, threading
import numpy as np
from onnx import TensorProto, helper
from headrace.networks.network import network_of

def value(name, elem_type, shape):
    return helper.make_tensor_value_info(name, elem_type, shape)

go, number = value("go", TensorProto.BOOL, []), value("i", TensorProto.INT64, [])
square, more = value("s", TensorProto.FLOAT, [8, 8]), value("next", TensorProto.FLOAT, [8, 8])
nodes = [helper.make_node("Identity", ["go"], ["on"])]
nodes += [helper.make_node("MatMul", ["s", "s"], ["next"])]
ends = [value("on", TensorProto.BOOL, []), more]
body = helper.make_graph(nodes, "body", [number, go, square], ends)
loop = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
inputs = [value("n", TensorProto.INT64, []), value("x", TensorProto.FLOAT, [8, 8])]
graph = helper.make_graph([loop], "graph", inputs, [value("y", TensorProto.FLOAT, [8, 8])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
x = np.eye(8, dtype=np.float32) * 2
with network_of(model, threads=1) as network:
    for _ in range(2):
        threading.Timer(0.3, _thread.interrupt_main).start()
        try:
            network({"n": np.array(2**40), "x": x})
        except KeyboardInterrupt:
            print("interrupted")
        print(network({"n": np.array(3), "x": x})["y"][0, 0])
"""


def test_what_has_no_end_is_interrupted() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["interrupted", "256.0"] * 2, done.stderr
