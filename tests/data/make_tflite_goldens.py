"""What LiteRT's interpreter gives for the networks of `tflite_networks.residual`.

    python tests/data/make_tflite_goldens.py   # needs the package ai-edge-litert

The files, with random weights, their inputs, and what ai-edge-litert 2.3.0 (Apache 2.0) makes of
them with its default kernels go to tflite_goldens.npz. Nothing in it is anybody else's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tflite_networks import residual  # noqa: E402

found = {}
for dtype in ("int8", "uint8"):
    (file, x, y), _ = residual(dtype)
    content = file.bytes([x], [y])
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    ends = np.iinfo(dtype)
    random = np.random.default_rng(9)
    inputs = random.integers(ends.min, ends.max + 1, (8, 1, 20, 12, 3)).astype(dtype)
    outputs = []
    for one in inputs:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], one)
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    found[f"{dtype}_file"] = np.frombuffer(content, np.uint8)
    found[f"{dtype}_inputs"], found[f"{dtype}_outputs"] = inputs, np.array(outputs)
np.savez_compressed(HERE / "tflite_goldens.npz", **found)
