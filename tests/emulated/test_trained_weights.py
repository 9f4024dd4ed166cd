"""What networks learned, written to files, and taken back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tflite_networks import residual
from training_networks import NETS, TARGETS, inputs_of, memory_of, numbers_in, put_inputs

from headrace.cli import main
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.micro.half import machine
from headrace.micro.learning import (
    Learning,
    Trained,
    last_layers,
    together,
    what_is_trained,
    with_weights,
)
from headrace.micro.network import Codes, MicroNetwork
from headrace.micro.reading import read_network
from headrace.micro.trained_weights import read_weights, write_weights
from headrace.micro.training import training_step
from headrace.micro.training_state import STATE, learned
from headrace.targets.emulation.machines import why_not

CHIP = TARGETS["cortex-m55"]


def after(network: MicroNetwork, how: Learning, seeds: range) -> dict[str, np.ndarray]:
    """What stays in SRAM behind some training steps, by numpy."""
    step = training_step(network, CHIP, how)
    lessons = [inputs_of(network, np.float16, seed) for seed in seeds]
    memory = memory_of(step, *lessons[0])
    for lesson in lessons:
        put_inputs(memory, step, *lesson)
        machine.run(step.steps, CHIP, memory)
    return {name: numbers_in(memory, name, array) for name, array in step.state.items()}


@pytest.mark.parametrize("which", NETS)
def test_learning_goes_on_bit_for_bit(which: str, tmp_path: Path) -> None:
    """Four steps are two steps, files, and two steps more: halves and their rests come back."""
    network = NETS[which]()
    first, *_, last = with_weights(network)
    how = Learning({first.name: Trained(True, False), last.name: Trained()}, 0.05, scale=8.0)
    half_way = learned(network, how.trained, after(network, how, range(2)))
    written = write_weights(half_way, how.trained, tmp_path / "w")
    assert len(written) == 3 and {np.load(one).dtype.name for one in written} == {"float32"}
    found, trained = read_weights(network, tmp_path / "w")
    assert trained == how.trained
    for one, other in zip(with_weights(found), with_weights(half_way), strict=True):
        for array, of in ((one.weights, other.weights), (one.bias, other.bias)):
            assert array.astype(np.float32).tobytes() == of.astype(np.float32).tobytes()
    at_once, again = after(network, how, range(4)), after(found, how, range(2, 4))
    for name in at_once.keys() - {STATE}:
        assert again[name].tobytes() == at_once[name].tobytes(), name


def test_names_of_files_are_different(tmp_path: Path) -> None:
    """Also of layers whose names are long, differ in upper case, or in what files cannot have."""
    network, names = NETS["residual"](), iter(["a*b", "a?b", "A_B", "x" * 300, "x" * 299 + "y"])
    known = {layer.name for layer in with_weights(network)}
    layers = tuple(
        replace(layer, name=next(names, layer.name)) if layer.name in known else layer
        for layer in network.layers
    )
    network = replace(network, layers=layers)
    trained = {layer.name: Trained() for layer in with_weights(network)}
    written = write_weights(network, trained, tmp_path)
    assert len({one.name.casefold() for one in written}) == 2 * len(trained)
    found, back = read_weights(network, tmp_path)
    assert back == trained
    for one, other in zip(with_weights(found), with_weights(network), strict=True):
        assert np.array_equal(one.weights, other.weights.astype(np.float32))


def _first(folder: Path) -> Path:
    return sorted(folder.glob("*.npy"))[0]


def _cut(folder: Path) -> None:
    _first(folder).write_bytes(_first(folder).read_bytes()[:-4])


def _promise(folder: Path) -> None:
    """A header of an array that is not there."""
    with _first(folder).open("wb") as file:
        head = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
        np.lib.format.write_array_header_1_0(file, head)


def _infinite(folder: Path) -> None:
    array = np.load(_first(folder))
    array.reshape(-1)[1] = np.inf
    np.save(_first(folder), array)


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda w: [one.unlink() for one in w.iterdir()], r"w: no folder with arrays"),
    "cut": (_cut, r"no \.npy file of numbers"),
    "promise": (_promise, r"no \.npy file of numbers"),
    "other": (lambda w: np.save(w / "fc.npy", np.zeros(2)), r"fc\.npy: .* no layer of this name"),
    "shape": (lambda w: np.save(_first(w), np.zeros(3)), r"float64 \[3\], and the layer has"),
    "whole": (lambda w: np.save(_first(w), np.load(_first(w)).astype(int)), r"int64 \["),
    "objects": (lambda w: np.save(_first(w), np.array([None])), r"no \.npy file of numbers"),
    "infinite": (_infinite, r"1 of its numbers are no finite float32"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_weights_that_are_none_of_a_network(mistake: str, tmp_path: Path) -> None:
    network, folder = NETS["residual"](), tmp_path / "w"
    write_weights(network, {with_weights(network)[-1].name: Trained()}, folder)
    spoil, words = MISTAKES[mistake]
    spoil(folder)
    with pytest.raises(ModelFileError, match=words) as raised:
        read_weights(network, folder)
    assert str(folder) in str(raised.value)


def test_codes_do_not_learn(tmp_path: Path) -> None:
    network = NETS["residual"]()
    layers = [*network.layers]
    layers[0] = replace(layers[0], makes=replace(layers[0].makes, codes=Codes(1.0, 0)))
    with pytest.raises(UnsupportedError, match="only networks of real numbers learn"):
        read_weights(replace(network, layers=tuple(layers)), tmp_path)


def test_a_folder_that_would_be_mixed(tmp_path: Path) -> None:
    network = NETS["residual"]()
    first, *_, last = (layer.name for layer in with_weights(network))
    (path, *_) = write_weights(network, {first: Trained(True, False)}, tmp_path)
    with pytest.raises(HeadraceError, match="go on from that folder"):
        write_weights(network, {last: Trained()}, tmp_path)
    with pytest.raises(HeadraceError, match="is no folder"):
        write_weights(network, {last: Trained()}, path)
    _, known = read_weights(network, tmp_path)
    both = together(known, {last: Trained()})
    assert len(write_weights(network, both, tmp_path)) == 3
    np.save(tmp_path / "scores.npy", np.zeros(3))
    with pytest.raises(HeadraceError, match=r"scores\.npy is there, and no weights"):
        write_weights(network, both, tmp_path)


def test_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """Train, then run, count and export what was learned; and train on."""
    if reason := why_not(CHIP.machines[0]):
        pytest.skip(reason)
    (file, x, y), array = residual("float32")
    path = str(file.write(tmp_path / "x.tflite", [x], [y]))
    network = read_network(path)
    (port,) = network.inputs
    np.save(tmp_path / "one.npy", array)
    np.save(tmp_path / "x.npy", np.concatenate([array, -array]))
    np.save(tmp_path / "labels.npy", np.array([3, 5]))
    to = [path, "--target", "cortex-m55"]
    old, new = (["--weights", str(tmp_path / name)] for name in ("w", "w2"))
    lesson = [*to, "--emulate", "--input", str(tmp_path / "x.npy"), "--rate", "0.05"]
    lesson += ["--label", str(tmp_path / "labels.npy"), "--epochs", "3", "--json", "-o"]

    def losses(*arguments: str) -> list[float]:
        capsys.readouterr()
        assert main(["run", *lesson, *arguments]) == 0
        return [row["loss"] for row in json.loads(capsys.readouterr().out)["epochs"]]

    def outputs(*arguments: str) -> np.ndarray:
        given = [*to, "--emulate", "--input", f"{port.name}={tmp_path / 'one.npy'}"]
        assert main(["run", *given, *arguments, "-o", str(tmp_path / "out")]) == 0
        return np.load(next((tmp_path / "out").iterdir())).reshape(-1)

    before = outputs()
    last = what_is_trained(network, last_layers(network, 1))[0]
    first = losses(old[1], "--train", f"{last}:bias")
    second = losses(new[1], "--train", "1", *old)
    assert first[0] > first[-1] > second[0] > second[-1]
    files = [{one.name for one in (tmp_path / name).iterdir()} for name in ("w", "w2")]
    assert len(files[0]) == 1 and files[0] < files[1] and len(files[1]) == 2
    capsys.readouterr()
    trained = outputs(*new)
    assert "as learned, from" in capsys.readouterr().err
    assert trained[3] > outputs(*old)[3] > before[3]
    for command in (["plan", *to], ["bench", *to], ["plan", *to, "--train", "1"]):
        assert main([*command, *new]) == 0
    images = {}
    for name, more in (("plain", []), ("trained", new)):
        assert main(["targets", "export", *to, *more, "-o", str(tmp_path / name)]) == 0
        images[name] = (tmp_path / name / "network.o").read_bytes()
    weights = np.load(next((tmp_path / "w2").glob("*.weights.npy")))
    kept = weights.reshape(len(weights), -1).T.astype(np.float16).tobytes()
    assert kept in images["trained"] and kept not in images["plain"]
    capsys.readouterr()
    for arguments, words in (
        (["plan", *to, "--weights", str(tmp_path / "no")], "no folder with arrays"),
        (["plan", path, *old], "--weights is for microcontrollers"),
        (["run", *lesson, new[1], "--train", f"{last}:bias"], "is not of what is learned now"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
