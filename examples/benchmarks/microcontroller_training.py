"""Instructions of training steps in half precision and in float32, on emulated chips.

    python examples/benchmarks/microcontroller_training.py [--target cortex-m55] [--tune] [FILE ...]

Without files: a convolution of 3x3 pixels, 16 channels to 16 of 32x32, forwards and backwards
(gradients of weights, of the bias and of what it reads, and updates with momentum). Files are ONNX
or TFLite; all of their weights are trained. `--tune` takes tiles and blocks within 64 KB by counted
instructions, in half precision only, as ResNet8's gradients of biases take more in float32.
Everything is counted in QEMU, and does not depend on this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from headrace.micro.autotune import FAST_BYTES, tuned_step
from headrace.micro.emulate import Emulated, total
from headrace.micro.half.machine import macs_of, touched_bytes
from headrace.micro.kernels.numbers import KINDS
from headrace.micro.learning import Learning, Trained, with_weights
from headrace.micro.network import Convolution, MicroNetwork, Port, Value, Windows
from headrace.micro.program import TRAIN
from headrace.micro.reading import read_network
from headrace.micro.training import TrainingStep, training_step
from headrace.micro.training_plan import plan_training
from headrace.targets.target import Target, microcontrollers


def convolutions() -> MicroNetwork:
    """Two of them, as the first one of a network has no gradient of what it reads."""
    values = [Value(name, (32, 32, 16), None) for name in ("x", "y", "z")]
    rng, layers = np.random.default_rng(0), []
    for read, made in pairwise(values):
        weights = rng.standard_normal((16, 3, 3, 16)).astype(np.float32) / 12
        windows = Windows((3, 3), pads=(1, 1))
        bias = np.zeros(16, np.float32)
        layers.append(Convolution(made.name, (read,), made, weights, bias, None, windows))
    ports = [Port(value.name, (1, *value.shape), value) for value in (values[0], values[-1])]
    return MicroNetwork("two convolutions", tuple(layers), (ports[0],), (ports[1],))


def counted(network: MicroNetwork, step: TrainingStep, target: Target) -> tuple[int, int]:
    """Instructions of a step, and bytes of SRAM that it takes."""
    program, rng = plan_training(network, target, step).program, np.random.default_rng(0)
    arrays = {one.name: rng.random(one.shape).astype(one.dtype) for one in program.inputs}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        counts = Emulated(program, folder).counts(arrays, TRAIN)
    return total(counts).instructions, program.arena_bytes


def progress(done: int, of: int, what: str) -> None:
    """On a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        print(f"\r{what}: {done} of {of}", end=end, file=sys.stderr, flush=True)


def main() -> None:
    """Print a line for each network and kind of number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--target", choices=microcontrollers(), default="cortex-m55")
    parser.add_argument("--tune", action="store_true")
    given = parser.parse_args()
    target = microcontrollers()[given.target]
    networks = [read_network(path) for path in given.files] or [convolutions()]
    print("network, numbers: multiply-adds, instructions, of each; SRAM, most that a call touches")
    for network in networks:
        trained = {layer.name: Trained() for layer in with_weights(network)}
        loss = "squares" if network.name == "two convolutions" else "cross entropy"
        how, totals = Learning(trained, 0.01, 0.9, loss, scale=1024.0, at_once=True), []
        for kind in ("half",) if given.tune else KINDS:
            step = training_step(network, target, how, kind=kind)
            if given.tune:
                step = tuned_step(network, target, how, kind=kind, progress=progress)
            instructions, sram = counted(network, step, target)
            macs, touched = sum(map(macs_of, step.steps)), max(map(touched_bytes, step.steps))
            totals.append(instructions)
            print(
                f"{network.name}, {kind}: {macs:,}, {instructions:,}, "
                f"{macs / instructions:.2f}; {sram:,}, {touched:,}",
                flush=True,
            )
            if given.tune and touched > FAST_BYTES:
                raise SystemExit(f"a call touches {touched} bytes")
        if not given.tune:
            print(f"{network.name}: {totals[1] / totals[0]:.2f} times fewer in half precision")


if __name__ == "__main__":
    main()
