"""A microcontroller learns words: the last layer of a keyword spotter, on an emulated Cortex-M55.

    python examples/learn_keywords.py [--epochs 3] [--samples 108] [--tests 60] [--float32]

The layer forgets all that it knew first. Each training step is a recorded word (its features), one
after the other, in half precision; then words are told apart that it has not heard.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace.micro.learner import Learner
from headrace.micro.learning import Learning, last_layers
from headrace.micro.reading import read_network
from headrace.micro.tuned import tuned_plan
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
    how = Learning(trained, rate=0.01, momentum=0.9, scale=128.0)
    plan = tuned_plan(network, microcontrollers()["cortex-m55"], how, kind=kind).plan
    print(f"{plan.program.arena_bytes:,} bytes of SRAM, {plan.state_bytes:,} of them learn")

    with np.load(DATA / "features.npz") as data:
        words, labels = (data["codes"] - data["zero"]) * data["scale"], data["labels"]
    lessons, tests, rng = options.samples, slice(-options.tests, None), np.random.default_rng(0)
    with Learner(network, how, plan) as learner:
        for epoch in range(options.epochs + 1):
            if epoch:
                order = rng.permutation(lessons)
                learner.train(words[order], np.eye(12)[labels[order]])
            right = learner.run(words[tests]).argmax(1) == labels[tests]
            print(f"after {epoch} epochs: {right.mean():.0%} of words right")


if __name__ == "__main__":
    main()
