"""What networks learned, as whole ONNX files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_classifiers import CLASSIFIERS, Classifier
from training_networks import TARGETS

from headrace.cli import main
from headrace.errors import HeadraceError, UnsupportedError
from headrace.micro.learning import Trained, short_names, with_weights
from headrace.micro.network import Depthwise, MicroNetwork
from headrace.micro.reading import read_network
from headrace.micro.trained_onnx import check_onnx, write_onnx
from headrace.targets.emulation.machines import why_not


def all_kinds() -> Any:
    """Convolutions without norms, depthwise ones, and products with a bias of their own or not."""
    of = Classifier().conv(8, 3, strides=[2, 2]).then("Relu").conv(8, 8, group=8).then("Relu")
    of.then("Flatten").linear(9, 8 * 6 * 5).then("Relu").then("MatMul", of.weights(9, 7))
    of.then("Add", of.weights(7)).then("MatMul", of.weights(7, 5))
    return of.then("Softmax", axis=-1).model()


def changed(network: MicroNetwork, trained: dict[str, Trained]) -> MicroNetwork:
    """As if what is trained had learned something."""
    rng = np.random.default_rng(1)

    def of(layer: Any) -> Any:
        what = trained.get(layer.name, Trained(False, False))
        new = {
            name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
            for name in ("weights", "bias")
            if getattr(what, name) and (array := getattr(layer, name)) is not None
        }
        return replace(layer, **new)

    return replace(network, layers=tuple(map(of, network.layers)))


def saved(model: Any, folder: Path) -> Path:
    onnx.save(model, folder / "x.onnx")
    return folder / "x.onnx"


def test_a_whole_file_has_what_was_learned(tmp_path: Path) -> None:
    source, path = saved(all_kinds(), tmp_path), tmp_path / "trained.onnx"
    network = read_network(source)
    *layers, last = with_weights(network)
    assert len(layers) == 4 and any(isinstance(layer, Depthwise) for layer in layers)
    trained = {layer.name: Trained() for layer in layers} | {last.name: Trained(True, False)}
    new = changed(network, trained)
    write_onnx(source, new, trained, path)
    for one, other in zip(with_weights(read_network(path)), with_weights(new), strict=True):
        assert one.weights.tobytes() == other.weights.tobytes()
        assert one.bias.tobytes() == other.bias.tobytes()
    image = np.random.default_rng(2).standard_normal((1, 3, 12, 10)).astype(np.float32)
    made = [
        onnxruntime.InferenceSession(str(one)).run(None, {"x": image})[0] for one in (source, path)
    ]
    assert np.abs(made[0] - made[1]).max() > 1e-3
    before, after = onnx.load(source), onnx.load(path)
    assert [*before.graph.node] == [*after.graph.node]


def refused(model: Any, which: int, what: Trained, words: str, folder: Path) -> None:
    source = saved(model, folder)
    layer = with_weights(read_network(source))[which]
    with pytest.raises(UnsupportedError, match=words) as raised:
        check_onnx(source, {layer.name: what}, folder / "y.onnx")
    short = short_names(with_weights(read_network(source)))[layer.name]
    assert str(source) in str(raised.value) and f"{short}: its" in str(raised.value)


def test_layers_that_are_more_than_a_node(tmp_path: Path) -> None:
    weights, bias = Trained(True, False), Trained(False, True)
    refused(CLASSIFIERS["plain"](), 0, weights, "weights are more than 'c0': another", tmp_path)
    refused(CLASSIFIERS["plain"](), 0, bias, "bias is more than 'c1': another", tmp_path)
    refused(all_kinds(), -1, bias, "bias is not in one constant", tmp_path)
    of = Classifier().conv(8, 3)
    twice = of.then("Conv", of.weights(8, 8, 1, 1)).then("Relu").then("Conv", "c2").model()
    refused(twice, 1, weights, "weights are 'c2', which others read, too", tmp_path)
    model = all_kinds()
    constant = onnx.helper.make_node("Constant", [], ["c0"], value=model.graph.initializer[0])
    del model.graph.initializer[0]
    model.graph.node.insert(0, constant)
    refused(model, 0, weights, "weights are not in one constant", tmp_path)


def test_by_the_command_line(tmp_path: Path, capsys: Any) -> None:
    source, chip = saved(CLASSIFIERS["plain"](), tmp_path), TARGETS["cortex-m55"]
    network = read_network(source)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.standard_normal((4, 3, 12, 10)).astype(np.float32))
    np.save(tmp_path / "labels.npy", np.arange(4))
    names = [*short_names(with_weights(network)).values()]
    command = ["run", str(source), "--target", chip.name, "--emulate", "--rate", "0.1"]
    command += ["--input", str(tmp_path / "x.npy"), "--label", str(tmp_path / "labels.npy")]
    command += ["--epochs", "4", "--json"]
    path = tmp_path / "trained.onnx"
    for train, output, words in (
        (f"{names[-1]}:bias,{names[0]}", path, "another node's constants"),
        (names[-1], source, "is what is trained"),
        (names[-1], tmp_path / "no" / "x.onnx", "is not a directory"),
    ):
        assert main([*command, "--train", train, "-o", str(output)]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(HeadraceError, match="of ONNX files only"):
        check_onnx(tmp_path / "x.tflite", {}, path)
    if reason := why_not(chip.machines[0]):
        pytest.skip(reason)
    assert main([*command, "--train", f"{names[-1]}:bias", "-o", str(path)]) == 0
    first = json.loads(capsys.readouterr().out)["epochs"]
    command[1] = str(path)
    assert main([*command, "--train", f"{names[-1]}:bias"]) == 0
    second = json.loads(capsys.readouterr().out)["epochs"]
    assert first[0]["loss"] > first[-1]["loss"] > second[-1]["loss"]
