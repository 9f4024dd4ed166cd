"""Networks whose first operations run patch by patch: the same bits, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import FLOAT, linear, model_of, random_network, save
from test_quantised_networks import Qdq, small_network

import headrace
from headrace.cli import main
from headrace.errors import HeadraceError
from headrace.kernels.geometry import Geometry
from headrace.networks.layout import BEHIND
from headrace.networks.lifetimes import ALIGNED
from headrace.networks.network import Network, network_of
from headrace.networks.operation import Image, Operation, Windows
from headrace.networks.passes.patches import Stage
from headrace.networks.patch_choice import SLACK

ROOT = Path(__file__).parents[1]


def random_integers(rng: np.random.Generator, dtype: Any, images: int) -> tuple[Any, np.ndarray]:
    """Convolutions of random geometries with sums over some of them, and an input."""
    height, width = (int(n) for n in rng.integers(30, 60, 2))
    q, channels, x = Qdq(rng, dtype), 3, "x"
    q.pair("x", 0.03, int(rng.integers(0, 100)))
    for i in range(5):
        y, written = f"v{i}", int(rng.integers(5, 70))
        taps, apart = rng.integers(1, 5, 2).tolist(), rng.integers(1, 3, 2).tolist()
        deep = i in (1, 3)
        written = channels if deep else written
        shape = (written, 1 if deep else channels, *taps)
        pads = [int(rng.integers(0, n)) for n in (*taps, *taps)]
        strides = rng.choice([1, 1, 2, 3], 2).tolist() if i in (0, 3) else [1, 1]
        group = channels if deep else 1
        q.conv(x, y, shape, strides=strides, pads=pads, dilations=apart, group=group)
        q.pair(y, 0.02, int(rng.integers(0, 100)))
        x, channels = y, written
        if i in (1, 2):  # a branch over two convolutions, the second of which sees more
            q.conv(x, f"{y}e", (written + 8, written, 3, 3), pads=[1] * 4)
            q.pair(f"{y}e", 0.02, 60)
            q.conv(f"{y}e", f"{y}f", (written, written + 8, 1, 3), pads=[0, 1, 0, 1])
            q.pair(f"{y}f", 0.02, 70)
            q.add("Add", [f"{y}_d", f"{y}f_d"], f"{y}s")
            q.pair(f"{y}s", 0.03, 50)
            x = f"{y}s"
    model = q.model([images, 3, height, width], [f"{x}_d"])
    return model, rng.standard_normal((images, 3, height, width)).astype(np.float32)


def outputs(model: Any, x: np.ndarray, **given: Any) -> tuple[list[np.ndarray], Network]:
    """What a network gives twice, and the network."""
    network = network_of(model, **given)
    found = [*network({"x": x}).values(), *network({"x": x}).values()]
    return found, network


def check(model: Any, x: np.ndarray, grids: tuple[Any, ...], threads: int = 2) -> None:
    """The same bits for all grids."""
    expected, network = outputs(model, x, threads=1)
    assert not network.plan({"x": x}).patches
    network.close()
    for grid in grids:
        found, network = outputs(model, x, threads=threads, patches=grid)
        (patches,) = network.plan({"x": x}).patches
        assert grid in ("auto", patches.grid)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        network.close()


@pytest.mark.parametrize("seed", range(6))
def test_patches_change_no_bit_of_integers(seed: int) -> None:
    model, x = random_integers(np.random.default_rng(seed), (np.uint8, np.int8)[seed % 2], 1)
    check(model, x, (2, 3 + seed % 3), threads=1 + seed % 3)


def test_several_images_and_a_network_with_other_ends() -> None:
    model, x = random_integers(np.random.default_rng(20), np.uint8, 2)
    check(model, x, (2, 3))
    rng = np.random.default_rng(3)
    check(small_network(rng), rng.standard_normal((2, 3, 27, 30)).astype(np.float32), (2, 5))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_an_input_of_bytes(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    constants: dict[str, np.ndarray] = {
        "s": np.float32(0.03), "z": dtype(3), "ws": np.float32(0.01), "wz": np.int8(0),
        "w": rng.integers(-127, 128, (24, 3, 3, 3)).astype(np.int8),
        "v": rng.integers(-127, 128, (9, 24, 3, 3)).astype(np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QLinearConv", [a, "s", "z", w, "ws", "wz", "s", "z"], [y], pads=[1] * 4)
        for a, w, y in (("x", "w", "a"), ("a", "v", "y"))
    ]
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = model_of(nodes, {"x": (kind, [1, 3, 19, 23])}, ["y"], constants)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    check(model, rng.integers(low, high + 1, (1, 3, 19, 23)).astype(dtype), (2, 4))


@pytest.mark.parametrize("images", [1, 2])
def test_patches_change_no_value_of_floats(images: int) -> None:
    """Sums keep their order (a zero may change its sign, where zeros were around an image)."""
    rng = np.random.default_rng(7)
    constants = {
        "w": rng.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5,
        "v": rng.standard_normal((32, 16, 1, 1)).astype(np.float32) / 4,
        "d": rng.standard_normal((32, 1, 5, 5)).astype(np.float32) / 5,
        "u": rng.standard_normal((16, 32, 1, 1)).astype(np.float32) / 6,
        "t": rng.standard_normal((24, 16, 3, 3)).astype(np.float32) / 12,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], strides=[2, 2], pads=[1, 1, 0, 0]),
        helper.make_node("HardSwish", ["a"], ["ah"]),
        helper.make_node("MaxPool", ["ah"], ["p"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Conv", ["p", "v"], ["b"]),
        helper.make_node("Relu", ["b"], ["br"]),
        helper.make_node("Conv", ["br", "d"], ["c"], pads=[2] * 4, group=32),
        helper.make_node("Conv", ["c", "u"], ["e"]),
        helper.make_node("Add", ["e", "ah"], ["f"]),
        helper.make_node("Mul", ["f", "p"], ["g"]),
        helper.make_node("AveragePool", ["g"], ["h"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["h", "t"], ["y"], pads=[1] * 4),
    ]
    model = model_of(nodes, {"x": (FLOAT, [images, 3, 41, 50])}, ["y"], constants)
    x = rng.standard_normal((images, 3, 41, 50)).astype(np.float32)
    check(model, x, ("auto", 2, 3))
    check(random_network(rng, images=images), x[:, :, :29, :34].copy(), (2, 3))


def needed(stage: list[Operation], tile: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Of each value the first row and the one behind the last that a tile needs, tap by tap."""
    found = {stage[-1].makes: tile}
    for one in reversed(stage):
        assert one.windows is not None
        of = one.windows.geometry
        rows = [
            y * of.strides[0] - of.pads[0] + k * of.dilations[0]
            for y in range(*found[one.makes])
            for k in range(of.taps[0])
        ]
        inside = [row for row in rows if 0 <= row < of.read[0]]
        found[one.reads[0]] = min(inside), max(inside) + 1
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_patch_takes_what_its_tile_needs_and_no_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, stage, images = 61, [], {"v0": Image(1, 61, 40, 3)}
    for i in range(6):
        taps, stride, apart = (int(rng.integers(1, n)) for n in (6, 3, 3))
        reach = (taps - 1) * apart + 1
        pads = int(rng.integers(0, reach))
        written = (size + 2 * pads - reach) // stride + 1
        geometry = Geometry(
            1, (size, 40), (written, 40), (taps, 1), (stride, 1), (pads, 0), (apart, 1)
        )
        windows = Windows(geometry, lambda _: lambda one, at: [])
        stage.append(Operation("some", [f"v{i}"], f"v{i + 1}", windows.slots(geometry), []))
        stage[-1].windows = windows
        images[f"v{i + 1}"] = Image(1, written, 40, 3)
        size = written
    found = Stage(stage, images, {"v0": FLOAT})
    for grid in (2, min(5, size)):
        for i in range(grid):
            tile = size * i // grid, size * (i + 1) // grid
            assert found.tile(grid, i, 0).needed == needed(stage, tile)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileNetV2 of width 0.35 for 144 x 144, in 8-bit integers."""
    from headrace.networks.compression.compress import compress_network

    folder = tmp_path_factory.mktemp("mobilenet")
    maker = ROOT / "examples" / "benchmarks" / "make_mobilenet_onnx.py"
    size = ["--width", "0.35", "--size", "144"]
    subprocess.run([sys.executable, maker, folder / "x.onnx", *size], check=True)
    samples = np.random.default_rng(0).standard_normal((2, 3, 144, 144)).astype(np.float32)
    np.save(folder / "samples.npy", samples)
    compress_network(
        folder / "x.onnx", folder / "y.onnx", format="int8", calibrate=folder / "samples.npy"
    )
    return folder / "y.onnx"


def test_mobilenet_takes_a_quarter(mobilenet: Path) -> None:
    x = {"input": np.random.default_rng(1).standard_normal((1, 3, 144, 144)).astype(np.float32)}
    with headrace.load(mobilenet, threads=2) as whole:
        expected = whole(x)["logits"]
        layer_by_layer = whole.plan(x)
        each = {one.makes: one for one in layer_by_layer.natives[0].operations}
        images = layer_by_layer.natives[0].layout.images
    with headrace.load(mobilenet, threads=2, patches="auto") as network:
        np.testing.assert_array_equal(network(x)["logits"], expected)
        plan = network.plan(x)
        (patches,) = plan.patches
        assert patches.whole_arena_bytes == layer_by_layer.arena_bytes
        assert 4 * plan.arena_bytes <= layer_by_layer.arena_bytes
        # Multiply-adds, counted from the sizes of what each operation makes.
        (run,) = plan.natives
        counted = 0
        for one in run.operations:
            of = each.get(one.makes.split("/headrace/")[0])
            if of is not None and one.kernel == of.kernel:
                pixels = run.layout.images[one.makes].pixels
                counted += of.macs * pixels // images[of.makes].pixels
        assert counted == patches.macs == sum(one.macs for one in run.operations)
        assert patches.whole_macs == sum(one.macs for one in each.values())
        # What is written of the arena reaches to its end.
        assert run._linked is not None
        arena, touched = run._linked.arena.view("values"), []
        for fill in (0x5A, 0xA5):
            arena[:] = fill
            np.testing.assert_array_equal(network(x)["logits"], expected)
            touched.append(int(np.flatnonzero(arena != fill).max()) + 1)
        assert plan.arena_bytes - BEHIND - ALIGNED < max(touched) <= plan.arena_bytes - BEHIND


def test_auto_takes_nearly_the_least_and_computes_least_again(mobilenet: Path) -> None:
    found = {}
    for choice in ("auto", 3, 5):
        with headrace.load(mobilenet, threads=1, patches=choice) as network:
            plan = network.plan({"input": np.zeros((1, 3, 144, 144), np.float32)})
            found[choice] = plan.arena_bytes, plan.patches[0].macs
    auto = found.pop("auto")
    least = min(n_bytes for n_bytes, _ in found.values())
    assert auto[0] <= SLACK * least
    assert all(macs >= auto[1] for n_bytes, macs in found.values() if n_bytes <= auto[0])


def test_the_command_prints_arena_and_overhead(mobilenet: Path, capsys: Any) -> None:
    path = str(mobilenet)
    assert main(["plan", path, "--json"]) == 0
    off = json.loads(capsys.readouterr().out)
    assert off["patches"] == [] and off["arena_bytes"] > 0
    assert main(["plan", path, "--patches", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["patches"]
    assert row["patches"] == "3 x 3" and row["layer_by_layer_bytes"] == off["arena_bytes"]
    with headrace.load(mobilenet, patches=3) as network:
        plan = network.plan({"input": np.zeros((1, 3, 144, 144), np.float32)})
        assert found["arena_bytes"] == plan.arena_bytes
        macs = sum(one.macs for one in plan.natives[0].operations)
        whole = plan.patches[0].whole_macs
        assert row["macs"] == macs
        assert row["recomputed_percent"] == pytest.approx(100 * (macs - whole) / whole)
    assert main(["bench", path, "--patches", "auto", "--runs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "recomputed percent" in printed and "\narena " in printed
    assert main(["plan", path, "--patches", "some"]) != 0
    assert 'must be "auto", "off"' in capsys.readouterr().err


def test_auto_leaves_alone_what_costs_much(tmp_path: Path, capsys: Any) -> None:
    """Where many taps in a row are read, patches compute most of an image again."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {}
    for i in range(3):
        weights[f"w{i}"] = rng.normal(size=(16, 16, 7, 7)).astype(np.float32)
        names = [f"x{i}", f"w{i}"], [f"x{i + 1}"]
        nodes.append(helper.make_node("Conv", *names, pads=[3] * 4, strides=[1 + 3 * (i == 2)] * 2))
    model = model_of(nodes, {"x0": (FLOAT, [1, 16, 24, 24])}, ["x3"], weights)
    path = str(save(model, tmp_path / "wide.onnx"))
    assert main(["plan", path, "--patches", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patches"][0]["recomputed_percent"] > 25
    assert main(["plan", path, "--patches", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patches"] == []


def test_what_cannot_be_cut(tmp_path: Path, capsys: Any) -> None:
    model, w = linear()
    x = np.ones((2, len(w)), np.float32)
    with network_of(model, patches="auto") as network:
        assert network({"x": x})["y"].shape == x.shape and not network.plan({"x": x}).patches
    path = save(model, tmp_path / "x.onnx")
    assert main(["plan", str(path), "--patches", "auto"]) == 0
    assert "no cut makes the arena smaller" in capsys.readouterr().err
    with headrace.load(path, patches=2) as network, pytest.raises(HeadraceError, match="2 x 2"):
        network({"x": x})
    for wrong, error in ((1, ValueError), ("x", ValueError), (True, TypeError), (2.5, TypeError)):
        with pytest.raises(error, match="patches must be"):
            headrace.load(path, patches=wrong)
    with pytest.raises(TypeError, match="takes no 'patches'"):
        headrace.load("smollm2-135m", patches=2)


@pytest.mark.parametrize("size", [(12, 12), (17, 11)])
def test_what_a_convolution_reads_is_added_to_it(size: tuple[int, int]) -> None:
    """As in ResNets: the sum is the last step of the convolution, and reads less than taps."""
    rng = np.random.default_rng(5)
    constants = {
        f"w{i}": (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32) for i in range(2)
    }
    nodes = []
    for i, (x, y) in enumerate((("x", "s"), ("s", "y"))):
        nodes += [
            helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            helper.make_node("Add", [x, f"c{i}"], [y]),
        ]
    model = model_of(nodes, {"x": (FLOAT, [1, 16, *size])}, ["y"], constants)
    check(model, rng.standard_normal((1, 16, *size)).astype(np.float32), (2, 3))
