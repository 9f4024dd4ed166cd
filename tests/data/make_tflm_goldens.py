"""What TensorFlow Lite Micro gives for the networks of `tflite_micro_networks`.

    python tests/data/make_tflm_goldens.py   # needs the package tflite-micro

Outputs, by case, of tflite-micro 0.dev20261023182759 (Apache 2.0) with its reference kernels go to
tflm_goldens.npz; the files have random weights. Nothing in it is anybody else's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tflite_micro.python.tflite_micro.runtime import Interpreter

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tflite_micro_networks import MICRO, micro_network  # noqa: E402

found = {}
for case in ("residual", *MICRO):
    content, inputs = micro_network(case)
    interpreter = Interpreter.from_bytes(content)
    outputs = []
    for one in inputs:
        interpreter.set_input(one, 0)
        interpreter.invoke()
        outputs.append(interpreter.get_output(0).copy())
    found[case] = np.array(outputs)
np.savez_compressed(HERE / "tflm_goldens.npz", **found)
