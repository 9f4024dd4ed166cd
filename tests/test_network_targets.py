"""Networks on CPU levels below this CPU's best: `target`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import linear, save
from targets_here import BEST, TARGETS, target_params
from test_n_bits_networks import product, rows

import headrace
from headrace.cli import main
from headrace.errors import KernelError
from headrace.networks.network import network_of

LEAST = next(iter(TARGETS))


@pytest.mark.parametrize("target", target_params())
def test_a_level_of_this_cpu(target: str) -> None:
    """Codes of rows lie as the level's kernel has them: 8 bits, whose sums are exact anywhere."""
    model, w, b = product(32, bias=True, level=4)
    x = rows(21)
    with network_of(model, threads=2, target=target) as network:
        assert network.target == target
        y = network({"x": x})["y"]
        assert [on for on, _ in network.plan({"x": x}).where()] == ["headrace"]
    steps = np.abs(x).reshape(len(x), -1, 32).max(-1).repeat(32, 1) / 254
    size = np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(b)
    off = size * 8 * 260 * 2.0**-24 + steps @ np.abs(w)
    assert (np.abs(y - (x.astype(np.float64) @ w + b)) <= off).all()


def test_commands_take_it(tmp_path: Path, capsys: Any) -> None:
    path = str(save(linear()[0], tmp_path / "linear.onnx"))
    for target, options in ((LEAST, ["--target", LEAST]), (BEST, [])):
        assert main(["bench", path, "--threads", "1", "--runs", "1", "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["target"] == target
    assert main(["inspect", path, "--target", LEAST]) == 0
    model = str(Path(__file__).parent / "data" / "stories260K.gguf")
    capsys.readouterr()
    assert main(["inspect", model, "--target", LEAST]) == 2
    assert "`inspect` takes --target for ONNX files" in capsys.readouterr().err


def test_a_foreign_level_is_refused(tmp_path: Path) -> None:
    path = save(linear()[0], tmp_path / "linear.onnx")
    foreign = "riscv64" if "x86" in BEST else "x86-64-v2"
    with pytest.raises(KernelError, match=f"this CPU cannot run {foreign}: .*it runs .*{BEST}"):
        headrace.load(path, target=foreign)
    with pytest.raises(KernelError, match="unknown target 'z80'; targets: "):
        headrace.load(path, target="z80")
