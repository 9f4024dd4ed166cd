"""What onnxruntime takes for the weights of its regions is counted: the number holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx_encoders import Builder
from onnx_models import FLOAT, model_of, save

from headrace.errors import BudgetError
from headrace.networks.network import load_network

LAYERS, WIDTH = 10, 512
FLOAT16 = TensorProto.FLOAT16
MEASURE = """
import gc, json, sys
import numpy as np
import headrace
from headrace.memory import give_back_heap

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

path, budget, x = sys.argv[1], int(sys.argv[2]), np.load(sys.argv[3])
grown = []
for memory in (None, budget, budget):  # libraries are there behind the first
    gc.collect()
    give_back_heap()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    with headrace.load(path, threads=2, memory=memory) as network:
        network({"x": x})
        kinds = [on for on, _ in network.plan({"x": x}).where()]
    del network
    grown.append(status("VmHWM") - before)
print(json.dumps({"grown": grown[1:], "kinds": kinds}))
"""


def _layer(b: Builder, kind: str, x: str) -> str:
    if kind == "Conv":
        made = b.add("Conv", x, b.put(b.rng.standard_normal((64, 64, 9, 9)) / 70), pads=[4] * 4)
    elif kind == "halves":
        w = b.put(b.rng.standard_normal((WIDTH, WIDTH)) / 20, np.float16)
        half = b.add("MatMul", b.add("Cast", x, to=FLOAT16), w)
        made = b.add("Cast", half, to=FLOAT)
    elif kind == "DequantizeLinear":
        codes = b.put(b.rng.integers(-127, 128, (WIDTH, WIDTH)), np.int8)
        made = b.add("MatMul", x, b.add("DequantizeLinear", codes, b.put(0.001)))
    else:
        made = b.add("MatMul", x, b.weights(WIDTH, WIDTH))
    return b.add("CumSum", b.add("Cos", made), b.put(1, np.int64))  # which are onnxruntime's


@pytest.mark.skipif(sys.platform != "linux", reason="what a process takes is read from /proc")
@pytest.mark.parametrize("kind", ["MatMul", "Conv", "halves", "DequantizeLinear"])
def test_the_number_holds_for_the_hosts_weights(kind: str, tmp_path: Path) -> None:
    b = Builder(np.random.default_rng(2))
    x = "x"
    for _ in range(LAYERS):
        x = _layer(b, kind, x)
    b.nodes[-1].output[0] = "y"
    shape = [1, 64, 12, 12] if kind == "Conv" else [3, WIDTH]
    model = model_of(b.nodes, {"x": (FLOAT, shape)}, ["y"], b.constants, opset=17)
    path = save(model, tmp_path / "m.onnx", True)
    given = np.ones(shape, np.float32)
    np.save(tmp_path / "x.npy", given)
    budget = _least(path, {"x": given})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(budget), str(tmp_path / "x.npy")],
        capture_output=True, text=True, env=dict(os.environ), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kinds"] == ["onnxruntime"]
    weights = sum(array.nbytes for array in b.constants.values())
    assert weights < max(found["grown"]) <= budget


def _least(path: Path, inputs: dict[str, Any]) -> int:
    budget = 1
    while True:
        try:
            with load_network(path, threads=2, memory=budget) as network:
                network(inputs)
                return budget
        except BudgetError as error:
            assert error.needed_bytes is not None
            assert error.needed_bytes > budget
            budget = error.needed_bytes
