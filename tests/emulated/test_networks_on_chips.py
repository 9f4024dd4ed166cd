"""Whole networks on emulated microcontrollers, bit for bit what numpy says they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of, save
from tflite_networks import residual

from headrace.cli import main
from headrace.cli_learning import taken
from headrace.errors import KernelError
from headrace.micro.arithmetic import computed
from headrace.micro.choice import plan_within
from headrace.micro.emulate import Emulated, total
from headrace.micro.jobs import ByRows
from headrace.micro.kernels.table import kernel_table
from headrace.micro.network import View
from headrace.micro.packing import ALIGNED
from headrace.micro.plan import MicroPlan, plan_network
from headrace.micro.ports import from_chip, to_chip
from headrace.micro.program import RUN
from headrace.micro.reading import read_network
from headrace.micro.stack import stack_bytes
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import microcontrollers

CHIPS = microcontrollers()


def needed(machine: str) -> None:
    if reason := why_not(machine):
        pytest.skip(reason)


def written(dtype: str, folder: Path) -> tuple[Path, np.ndarray]:
    (file, x, y), array = residual(dtype)
    return file.write(folder / "x.tflite", [x], [y]), array


def is_as_planned(used: int, plan: MicroPlan) -> bool:
    """Whether the last byte that was written to is the last one of the plan, or of its vector."""
    return plan.arena_bytes - ALIGNED <= used <= plan.arena_bytes


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_chip_gives_what_numpy_does(dtype: str, chip: str, tmp_path: Path) -> None:
    target = CHIPS[chip]
    needed(target.machines[0])
    path, array = written(dtype, tmp_path)
    network = read_network(path)
    runs = [to_chip(network, {"image": one}) for one in (array, -array)]
    plan = plan_network(network, target)
    program = Emulated(plan.program, tmp_path)
    for given, found in zip(runs, program.run(runs), strict=True):
        expected = computed(network, target, given)
        for name, value in found.items():
            assert value.tobytes() == expected[name].tobytes()
            assert np.ptp(value.astype(np.float64)) > 0
    used = program.used(runs[0])
    assert is_as_planned(used.arena_bytes, plan)
    # The bound of the stack holds, and is not far from what is taken.
    bound = stack_bytes(plan.program)
    assert used.stack_bytes <= bound <= used.stack_bytes + 256
    counts = program.counts(runs[0])
    whole = total(counts)
    assert counts[RUN].instructions < 0.05 * whole.instructions
    assert whole.instructions <= whole.cycles < 4 * whole.instructions
    (scores,) = from_chip(network, found).values()
    assert scores.shape == (1, 12)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_give_the_same_in_less_memory(dtype: str, tmp_path: Path) -> None:
    target = CHIPS["cortex-m55"]
    needed(target.machines[0])
    path, array = written(dtype, tmp_path)
    network = read_network(path)
    given = to_chip(network, {"image": array})
    whole = plan_network(network, target)
    (expected,) = Emulated(whole.program, tmp_path).run([given])
    for ways in ((ByRows(0, 5, 1),), (ByRows(0, 1, 2), ByRows(1, 4, 3), ByRows(4, 5, 1))):
        plan = plan_network(network, target, ways)
        assert len(plan.calls) > len(whole.calls)
        program = Emulated(plan.program, tmp_path)
        (found,) = program.run([given])
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in expected.items()
        }
        # What some rows take for themselves is less than what the most of them do.
        assert 0.9 * plan.arena_bytes < program.used(given).arena_bytes <= plan.arena_bytes
    if dtype == "float32":
        room = int(0.7 * whole.arena_bytes) + stack_bytes(whole.program)
        rows = plan_within(network, target, room)
        assert rows.by_rows and rows.arena_bytes + stack_bytes(rows.program) <= room
        program = Emulated(rows.program, tmp_path)
        used = program.used(given)
        assert used.arena_bytes + used.stack_bytes <= room


def test_inputs_have_to_fit(tmp_path: Path) -> None:
    target = CHIPS["cortex-m55"]
    needed(target.machines[0])
    path, array = written("float32", tmp_path)
    network = read_network(path)
    with pytest.raises(ValueError, match="there is no input 'other'"):
        to_chip(network, {"other": array})
    with pytest.raises(ValueError, match="the input 'image' is missing"):
        to_chip(network, {})
    with pytest.raises(ValueError, match=r"image is \[20, 12, 3\], and \[1, 20, 12, 3\]"):
        to_chip(network, {"image": array[0]})
    with pytest.raises(ValueError, match="image is int8, and float32 is wanted"):
        to_chip(network, {"image": array.astype(np.int8)})
    program = Emulated(plan_network(network, target).program, tmp_path)
    name = network.inputs[0].value.name
    with pytest.raises(ValueError, match="float16"):
        program.run([{name: array[0]}])


def test_the_command_line(tmp_path: Path, capsys: Any) -> None:
    needed(CHIPS["cortex-m55"].machines[0])
    path, array = written("int8", tmp_path)
    np.save(tmp_path / "x.npy", array)
    to = ["--target", "cortex-m55"]
    assert main(["plan", str(path), *to, "--sram", "64KiB", "--flash", "1MiB"]) == 0
    said = capsys.readouterr().out
    assert "arena" in said and "instructions" in said and "Depthwise" in said
    given = ["--input", f"image={tmp_path / 'x.npy'}", "-o", str(tmp_path / "out")]
    assert main(["run", str(path), *to, "--emulate", *given]) == 0
    network = read_network(path)
    chip = to_chip(network, {"image": array})
    expected = from_chip(network, computed(network, CHIPS["cortex-m55"], chip))
    found = np.load(tmp_path / "out" / "scores.npy")
    assert found.tobytes() == expected["scores"].tobytes()
    assert main(["targets", "export", str(path), *to, "-o", str(tmp_path / "firmware")]) == 0
    names = {one.name for one in (tmp_path / "firmware").iterdir()}
    assert names == {"network.o", "support.o", "network.h", "network.elf"}
    capsys.readouterr()
    for arguments, words in (
        (["plan", str(path), *to, "--sram", "1KiB"], "does not fit in 1,024 bytes of SRAM"),
        (["plan", str(path), *to, "--rate", "1"], "--rate is for learning: add --train"),
        (["plan", str(path), *to, "--flash", "1KiB"], "of flash on cortex-m55"),
        (["plan", str(path), *to, "--whole-stack"], "takes no --whole-stack"),
        (["run", str(path), *to, "--emulate", "--top-k", "3"], "takes no --top-k"),
        (["bench", str(path), *to, "--predictor", "none"], "takes no --predictor"),
        (["plan", str(path), *to, "--threads", "2"], "takes no --threads"),
        (["plan", str(path), *to, "--threads", "0"], "takes no --threads"),
        (["plan", str(path), "--sram", "1MB"], "--sram is for microcontrollers"),
        (["run", str(path), *to, *given], "add --emulate"),
        (["bench", str(path), *to, "--threads", "2"], "takes no --threads"),
        (["targets", "test", *to, "--report"], "--report is for CPUs"),
        (["targets", "test", *to, "--kernel", "gemv"], "unknown kernel 'gemv'"),
        (["targets", "build", *to, "-o", "x"], "cortex-m55 is a microcontroller"),
        (["plan", str(path), *to, "--train", "99"], "5 have weights"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_are_counted_one_by_one(dtype: str, tmp_path: Path, capsys: Any) -> None:
    needed(CHIPS["cortex-m55"].machines[0])
    path, _ = written(dtype, tmp_path)
    to = [str(path), "--target", "cortex-m55", "--json"]
    assert main(["bench", *to]) == 0
    found = json.loads(capsys.readouterr().out)
    network = read_network(path)
    assert len(found["layers"]) == sum(not isinstance(one, View) for one in network.layers)
    assert sum(row["multiply_adds"] for row in found["layers"]) == network.macs
    # The function that calls layers is counted with each of them.
    assert (
        abs(sum(row["instructions"] for row in found["layers"]) / found["instructions"] - 1) < 0.02
    )
    assert main(["inspect", *to]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["layers"]
    assert len(rows) == len(network.layers)
    assert ("weights" in rows[0]["quantisation"]) == (dtype == "int8")
    chips = {row["chip"]: row for row in found["chips"]}
    assert set(chips) == set(CHIPS)
    plan = plan_network(network, CHIPS["cortex-m55"])
    assert chips["cortex-m55"]["arena_bytes"] == plan.arena_bytes
    assert not any(row["why_not"] for row in chips.values())


def test_kernels_are_proven_by_the_command_line(capsys: Any) -> None:
    needed(CHIPS["cortex-m55"].machines[0])
    assert main(["targets", "list", "--json"]) == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    for name, chip in CHIPS.items():
        assert rows[name]["kernels"] == len(kernel_table()) and rows[name]["provable_on"]
        assert rows[name]["needs"].split() == sorted(chip.needs)
    proven = ["targets", "test", "--target", "cortex-m55", "--json", "--kernel"]
    assert main([*proven, "add_i8"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["kernels"]
    assert found["result"] == "equal" and found["how"] == "bit for bit"


def test_learning_by_the_command_line(tmp_path: Path, capsys: Any) -> None:
    needed(CHIPS["cortex-m55"].machines[0])
    path, array = written("float32", tmp_path)
    np.save(tmp_path / "x.npy", np.concatenate([array, -array]))
    np.save(tmp_path / "labels.npy", np.array([3, 5]))
    command = [str(path), "--target", "cortex-m55"]
    given = ["--emulate", "--train", "1", "--input", str(tmp_path / "x.npy")]
    label = ["--label", str(tmp_path / "labels.npy")]
    more = ["--epochs", "6", "--rate", "0.05", "--loss-scale", "32768", "-o", str(tmp_path / "w")]
    assert main(["run", *command, *given, *label, *more, "--json"]) == 0
    said, noted = capsys.readouterr()
    found = json.loads(said)
    rows = found["epochs"]
    assert rows[0]["loss"] > 1.5 * rows[-1]["loss"] and rows[-1]["right"].endswith("%")
    skipped = sum(row["skipped_steps"] for row in rows)
    assert rows[-1]["loss_scale"] == 32768 / 2**skipped
    assert (f"{skipped} steps changed no weights" in noted) == (skipped > 0)
    assert found["arena_used_bytes"] + found["stack_used_bytes"] <= found["sram_bytes"]
    arrays = {one.name: np.load(one) for one in (tmp_path / "w").iterdir()}
    assert len(arrays) == 2 and {one.dtype.name for one in arrays.values()} == {"float32"}
    np.save(tmp_path / "bad.npy", np.array([3, 12]))
    for arguments, words in (
        ([*given], "add --label FILE.npy"),
        ([*given, "--label", str(tmp_path / "bad.npy")], "12 outputs"),
        ([*given, *label, "--rate", "0"], "a rate of 0.0"),
        ([*given, *label, "--good-steps", "0"], "0 good steps"),
        ([*given, *label, "--epochs", "0"], "epochs"),
        ([*given, *label, "--rate", "1e30", "-o", str(tmp_path / "none")], "not finite"),
        ([*given[:-1], f"other={given[-1]}", *label], "there is no input 'other'"),
        ([*given[:-1], str(tmp_path / "labels.npy"), *label], "are wanted"),
    ):
        assert main(["run", *command, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    still = {"train": "1", "momentum": 0.0}  # which equals False
    assert taken(dict(still)) == still


def test_learning_of_images_by_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """What is wanted of each pixel: outputs in the file's order, or classes."""
    needed(CHIPS["cortex-m55"].machines[0])
    rng = np.random.default_rng(1)
    x, classes = rng.standard_normal((2, 4, 3, 5)), rng.integers(0, 3, (2, 3, 5))
    weights = rng.standard_normal((3, 4, 1, 1)).astype(np.float32) / 2
    layer = helper.make_node("Conv", ["x", "w"], ["c"])
    softmax = helper.make_node("Softmax", ["c"], ["p"], axis=1)
    inputs, constants = {"x": (FLOAT, [1, 4, 3, 5])}, {"w": weights}
    save(model_of([layer, softmax], inputs, ["p"], constants), tmp_path / "x.onnx")
    np.save(tmp_path / "x.npy", x)
    made = np.exp(np.einsum("oc,ncij->noij", weights[..., 0, 0], x))
    made /= made.sum(1, keepdims=True)
    loss = -np.log(np.take_along_axis(made, classes[:, None], 1)).sum() / 2
    command = ["run", str(tmp_path / "x.onnx"), "--target", "cortex-m55", "--emulate"]
    command += ["--input", str(tmp_path / "x.npy"), "--label", str(tmp_path / "y.npy")]
    for wanted in (classes, np.eye(3)[classes].transpose(0, 3, 1, 2)):
        np.save(tmp_path / "y.npy", wanted)
        assert main([*command, "--train", "1", "--rate", "1e-6", "--json"]) == 0
        (epoch,) = json.loads(capsys.readouterr().out)["epochs"]
        assert abs(epoch["loss"] / loss - 1) < 0.005  # numbers are halves
        if wanted is classes:
            assert epoch["right"] == f"{(made.argmax(1) == classes).mean():.1%}"
    np.save(tmp_path / "y.npy", np.array([0, 1]))
    assert main([*command, "--train", "1"]) == 2
    assert "a class of each pixel is wanted, or 45 numbers" in capsys.readouterr().err
    two = helper.make_node("Add", ["c", "z"], ["y"])
    inputs["z"] = FLOAT, [1, 3, 3, 5]
    save(model_of([layer, two], inputs, ["y"], constants), tmp_path / "x.onnx")
    assert main([*command, "--train", "1"]) == 2
    assert "x has inputs x, z: networks of one input are trained" in capsys.readouterr().err


def test_a_chip_that_nothing_emulates_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    path, _ = written("float32", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=r"cannot be emulated: qemu-system-arm is not installed"):
        Emulated(plan_network(read_network(path), CHIPS["cortex-m55"]).program, tmp_path)
