"""A microcontroller learns words: the last layer of a keyword spotter, on an emulated Cortex-M55.

    python examples/learn_keywords.py [--epochs 3] [--samples 108] [--tests 60] [--float32]

The layer forgets all that it knew first. Each training step is a recorded word (its features), one
after the other, in half precision; then words are told apart that it has not heard.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace.micro.emulate import Emulated
from headrace.micro.program import RUN, TRAIN
from headrace.micro.reading import read_network
from headrace.micro.training import Learning, last_layers, training_step
from headrace.micro.training_plan import plan_training
from headrace.targets.target import microcontrollers

DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "keywords"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=108)
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--float32", action="store_true", help="learn in float32, to compare")
    options = parser.parse_args()
    kind = "single" if options.float32 else "half"

    network = read_network(DATA / "ds_cnn_float32.tflite")
    (name,) = trained = last_layers(network, 1)
    network = replace(network, layers=tuple(
        replace(one, weights=one.weights * 0, bias=one.bias * 0) if one.name == name else one
        for one in network.layers
    ))  # fmt: skip
    chip = microcontrollers()["cortex-m55"]
    how = Learning(trained, rate=0.01, momentum=0.9, scale=128.0)
    plan = plan_training(network, chip, training_step(network, chip, how, kind=kind))
    (words, wanted), (found,) = plan.program.inputs, plan.program.outputs
    print(f"{plan.program.arena_bytes:,} bytes of SRAM, {plan.state_bytes:,} of them learn")

    with np.load(DATA / "features.npz") as data:
        heard = (data["codes"] - data["zero"]) * data["scale"]
        labels = data["labels"]
    one_hot = np.eye(12)
    steps = [
        {
            words.name: heard[i].astype(words.dtype),
            wanted.name: one_hot[labels[i]].astype(wanted.dtype),
        }
        for i in range(len(labels))
    ]
    lessons, tests = range(options.samples), range(len(labels) - options.tests, len(labels))
    rng, order, calls = np.random.default_rng(0), [*tests], [RUN] * len(tests)
    for _ in range(options.epochs):
        order += [*rng.permutation(lessons), *tests]
        calls += [TRAIN] * len(lessons) + [RUN] * len(tests)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Emulated(plan.program, folder).run([steps[i] for i in order], calls)
    right = [out[found.name].argmax() == labels[i] for i, out in zip(order, outputs, strict=True)]
    for epoch in range(options.epochs + 1):
        last = len(tests) + epoch * (len(lessons) + len(tests))
        print(
            f"after {epoch} epochs: {np.mean(right[last - len(tests) : last]):.0%} of words right"
        )


if __name__ == "__main__":
    main()
