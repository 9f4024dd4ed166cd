"""Networks under a budget: what streams gives the same bits, and the number holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_encoders import encoder, tokens
from onnx_models import FLOAT, linear, model_of, random_network, save
from test_embed import TEXTS, write
from test_memory_limit import group
from test_n_bits_networks import product
from test_quantised_networks import small_network
from test_recurrent_networks import layer
from test_sparse_networks import SIZE, inverted_residuals

import headrace
from headrace import planning
from headrace.cli import main
from headrace.errors import BudgetError, HeadraceError, ModelFileError
from headrace.kernels.sparse_product import sparse_weights
from headrace.kernels.sparse_product_u8 import sparse_codes
from headrace.networks import graph, host_memory, needs, network_plan, packed_file, residence
from headrace.networks.network import Network, load_network, network_of
from headrace.networks.operation import Weight
from headrace.offload import pieces
from headrace.offload.budget import Limit

Inputs = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are cut into many pieces too, in a cache of their own."""
    monkeypatch.setattr(needs, "LEAST_BYTES", 512)
    monkeypatch.setattr(needs, "READER_BYTES", 0)
    monkeypatch.setattr(needs, "STEP_BYTES", 10)
    monkeypatch.setattr(network_plan, "OPERATION_BYTES", 10)
    monkeypatch.setattr(pieces, "LEAST_PIECE_BYTES", 4096)
    monkeypatch.setattr(pieces, "HUGE_PAGE", 4096)
    for module in (graph, sys.modules["headrace.networks.operation"]):
        monkeypatch.setattr(module, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(packed_file, "cache_root", lambda: tmp_path / "cache")


def _dynamic(
    rng: np.random.Generator, density: float = 1.0, sizes: tuple[int, ...] = (80, 400, 72)
) -> Any:
    """Two products whose inputs are quantised as they come; blocks of 4 x 1 weights are there."""
    constants, nodes = dict[str, np.ndarray](), list[Any]()
    for i, (read, made) in enumerate(pairwise(sizes)):
        constants |= {
            f"w{i}": sparse_codes(rng, (made, read), density).T.copy(),
            f"s{i}": rng.uniform(0.5, 2, made).astype(np.float32) / 99,
        }
        inputs = ["x" if i == 0 else f"y{i - 1}", f"w{i}", f"s{i}"]
        nodes.append(
            helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{i}"], domain="com.microsoft")
        )
    return model_of(nodes, {"x": (FLOAT, [1, "rows", sizes[0]])}, ["y1"], constants, opset=17)


def _normalised(rng: np.random.Generator) -> Any:
    """Convolutions whose weights get factors of channels, and one in groups."""
    w = {
        "a_w": rng.standard_normal((56, 24, 3, 3)) / 14, "b_w": rng.standard_normal((56, 14, 3, 3)),
        "c_w": rng.standard_normal((70, 56, 1, 1)) / 7,
    }  # fmt: skip
    n = {k: rng.uniform(0.5, 2, 70) for k in ("factor", "summand", "mean", "variance")}
    constants = {k: v.astype(np.float32) for k, v in (w | n).items()}
    nodes = [
        helper.make_node("Conv", ["x", "a_w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "b_w"], ["b"], pads=[1, 1, 1, 1], group=4),
        helper.make_node("Conv", ["b", "c_w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *n], ["y"]),
    ]
    return model_of(nodes, {"x": (FLOAT, ["n", 24, 9, 8])}, ["y"], constants)


def _floats(*shape: int) -> Inputs:
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def _mostly_zero(n: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    zeroed = rng.standard_normal((n, k)) * (rng.uniform(size=(n, k)) > 0.8)
    return zeroed.astype(np.float32)


def _rows_of_bytes(rng: np.random.Generator) -> Any:
    """Of a table that is larger than all else, dequantised, times weights."""
    constants = {
        "table": rng.integers(-128, 128, (800, 64)).astype(np.int8), "scale": np.float32(0.01),
        "w": rng.standard_normal((64, 48)).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    return model_of(nodes, {"ids": (7, ["n", 5])}, ["y"], constants)


MODELS: dict[str, tuple[Callable[[np.random.Generator], Any], Inputs]] = {
    "encoder": (
        lambda rng: encoder(rng, "new", heads=2, width=128),
        tokens(np.random.default_rng(2), 2, 20),
    ),
    "cnn": (random_network, _floats(2, 3, 29, 34)),
    "normalised": (_normalised, _floats(1, 24, 9, 8)),
    "sparse": (lambda rng: inverted_residuals(rng, _mostly_zero), _floats(1, 3, *SIZE)),
    "lstm": (lambda rng: layer("LSTM", "bidirectional")[0], layer("LSTM", "bidirectional")[1]),
    "int8": (small_network, _floats(1, 3, 27, 30)),
    "dynamic": (_dynamic, _floats(1, 7, 80)),
    "dynamic_sparse": (lambda rng: _dynamic(rng, 0.1), _floats(1, 70, 80)),
    "n_bits": (lambda rng: product(32)[0], _floats(5, 256)),
    "n_bits_of_8": (lambda rng: product(32, bits=8)[0], _floats(5, 256)),
    "n_bits_of_2": (lambda rng: product(32, bits=2)[0], _floats(5, 256)),
    "n_bits_codes": (lambda rng: product(32, level=4)[0], _floats(5, 256)),
    "rows_of_bytes": (_rows_of_bytes, {"ids": np.array([[3, -1, 799, 3, 0], [-800, 7, 7, 5, 2]])}),
}


@pytest.fixture(params=list(MODELS))
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Inputs]:
    make, inputs = MODELS[request.param]
    external = request.param in ("encoder", "cnn")
    return save(make(np.random.default_rng(3)), tmp_path / "m.onnx", external), inputs


def _bytes(network: Network, inputs: Inputs) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in network(inputs).items()}


def _least(path: Path, inputs: Inputs, **options: Any) -> int:
    with load_network(path, memory=1, **options) as network, pytest.raises(BudgetError) as caught:
        network.plan(inputs).memory  # noqa: B018
    return caught.value.needed_bytes


def test_streamed_equals_resident(named: tuple[Path, Inputs]) -> None:
    path, inputs = named
    expected, streamed = None, set()
    for threads in (1, 2):
        options: dict[str, Any] = {"threads": threads, "patches": "off"}
        with load_network(path, **options) as network:
            found, whole = _bytes(network, inputs), network.plan(inputs).memory.whole
            assert expected in (None, found)
            expected = found
        least = _least(path, inputs, **options)
        for budget in (least, (least + whole) // 2, whole):
            with load_network(path, memory=budget, **options) as network:
                memory = network.plan(inputs).memory
                assert memory.n_bytes <= budget
                for _ in range(3):
                    assert _bytes(network, inputs) == expected
                streaming = network._residence.streaming
                streamed.add(memory.streamed_bytes)
                window = None if streaming is None else streaming.window
                assert (window is None) == (memory.residency is None)
    if whole > least:
        assert max(streamed) > 0, "nothing was read"


@pytest.mark.parametrize("integers", [False, True])
def test_sparse_products_stream_in_pieces(integers: bool, tmp_path: Path) -> None:
    """Pieces are runs of tiles, which are of all sizes; the bits are those of all at once."""
    rng = np.random.default_rng(3)
    if integers:
        path = save(_dynamic(rng, 0.1, (384, 1152, 384)), tmp_path / "m.onnx")
    else:
        w = {f"w{i}": sparse_weights(rng, (384, 384), 4, 0.1).T.copy() for i in range(3)}
        names = ["x", "a", "b", "y"]
        nodes = [
            helper.make_node("MatMul", [read, f"w{i}"], [made])
            for i, (read, made) in enumerate(pairwise(names))
        ]
        model = model_of(nodes, {"x": (FLOAT, [1, "rows", 384])}, ["y"], w)
        path = save(model, tmp_path / "m.onnx")
    inputs = _floats(1, 70, 384)
    for threads in (1, 2):
        with load_network(path, threads=threads) as network:
            expected = _bytes(network, inputs)
        least = _least(path, inputs, threads=threads)
        with load_network(path, memory=least, threads=threads) as network:
            assert _bytes(network, inputs) == expected
            plan = network.plan(inputs)
            assert all(one.operation.sparse is not None for one in plan.needs.streamable)
            assert plan.memory.residency is not None
            counts = Counter(piece.matrix for piece in plan.memory.residency.streamed)
            assert max(counts.values()) > 2


def test_weights_in_parts_are_the_whole(named: tuple[Path, Inputs]) -> None:
    path, inputs = named
    in_parts = 0
    with load_network(path) as network:
        for region in network.plan(inputs).natives:
            for one in region.operations:
                for weight in one.weights.values():
                    if isinstance(weight, Weight):
                        whole = weight.make().reshape(-1).view(np.uint8)
                        assert whole.size == weight.n_bytes
                        found, parts = np.zeros_like(whole), list(weight.parts())
                        for at, part in parts:
                            data = part.reshape(-1).view(np.uint8)
                            found[at : at + data.size] = data
                        np.testing.assert_array_equal(found, whole)
                        in_parts += len(parts) > 1
    assert in_parts or path.stat().st_size < 1 << 18


def _some_budget(path: Path, inputs: Inputs) -> int:
    """With which about half of the weights are read."""
    with load_network(path) as network:
        return (_least(path, inputs) + network.plan(inputs).memory.whole) // 2


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Inputs]:
    """An encoder of 7 MB, in a file."""
    model = encoder(np.random.default_rng(3), "new", heads=4, width=512)
    return save(model, tmp_path / "m.onnx", True), tokens(np.random.default_rng(4), 1, 12)


def test_shapes_take_turns_and_share_what_stays(stored: tuple[Path, Inputs]) -> None:
    path, _ = stored
    counts = (20, 7, 20, 12, 7)
    each = [tokens(np.random.default_rng(n), 1, n) for n in counts]
    budget = _some_budget(path, each[0])
    with load_network(path) as whole, load_network(path, memory=budget) as network:
        kept = None
        for inputs in each:
            assert _bytes(network, inputs) == _bytes(whole, inputs)
            assert network.plan(inputs).memory.residency is not None
            found = {key: arena.base for key, arena in network._residence._kept.items()}
            # Plans of other shapes take some of its room, so that it may be a few more or less.
            less, more = sorted((found, found if kept is None else kept), key=len)
            assert less and less.items() <= more.items(), "what stays was read again"
            kept = found
        linked = [p for p in network._plans.values() if any(r.is_linked for r in p.natives)]
        assert len(linked) == 1


def test_memory_changes_while_loaded(stored: tuple[Path, Inputs]) -> None:
    path, inputs = stored
    least, some = _least(path, inputs), _some_budget(path, inputs)
    with load_network(path) as network:
        expected = _bytes(network, inputs)
        with pytest.raises(HeadraceError, match="loaded without"):
            network.memory = "1GB"
    with load_network(path, memory=some) as network:
        for budget in (some, least, "100MB", least, some):
            network.memory = budget
            assert _bytes(network, inputs) == expected
        with pytest.raises(BudgetError, match="least that works"):
            network.memory = least // 2
        assert network.memory == some
        assert _bytes(network, inputs) == expected


def test_files_that_change(stored: tuple[Path, Inputs], tmp_path: Path) -> None:
    path, inputs = stored
    budget = _some_budget(path, inputs)
    folder = tmp_path / "cache" / "networks"
    with load_network(path, memory=budget) as network:
        expected = _bytes(network, inputs)
        (packed,) = folder.iterdir()
        content = packed.read_bytes()
        packed.write_bytes(content[:-1])
        with pytest.raises(ModelFileError, match="changed while it is in use"):
            network(inputs)
    with load_network(path, memory=budget) as network:  # it is written anew
        assert _bytes(network, inputs) == expected
    assert [one.read_bytes() == content for one in folder.iterdir()] == [True]
    written = packed.stat().st_mtime_ns
    with load_network(path, memory=budget) as network:  # and then used as it is
        assert _bytes(network, inputs) == expected
    assert packed.stat().st_mtime_ns == written
    # Other weights under the same name, of the same size and time.
    model = encoder(np.random.default_rng(5), "new", heads=4, width=512)
    times = {one: one.stat() for one in path.parent.iterdir() if one.is_file()}
    save(model, path, True)
    for one, was in times.items():
        os.utime(one, ns=(was.st_atime_ns, was.st_mtime_ns))
    with load_network(path) as network:
        expected = _bytes(network, inputs)
    with load_network(path, memory=budget) as network:
        assert _bytes(network, inputs) == expected
    (other,) = folder.iterdir()
    assert other.name != packed.name


def test_a_damaged_file_is_packed_anew(stored: tuple[Path, Inputs], tmp_path: Path) -> None:
    path, inputs = stored
    budget = _some_budget(path, inputs)
    with load_network(path, memory=budget) as network:
        expected = _bytes(network, inputs)
    (packed,) = (tmp_path / "cache" / "networks").iterdir()
    content = packed.read_bytes()
    packed.write_bytes(content[:9999] + bytes([content[9999] ^ 1]) + content[10000:])
    with load_network(path, memory=budget) as network:
        assert _bytes(network, inputs) == expected
    assert packed.read_bytes() == content


def test_files_that_were_used_longest_ago_go(
    stored: tuple[Path, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs = stored
    budget = _some_budget(path, inputs)
    folder = tmp_path / "cache" / "networks"
    with load_network(path, memory=budget) as network:
        _bytes(network, inputs)
    (packed,) = folder.iterdir()
    size, changed = packed.stat().st_size, packed.stat().st_mtime_ns
    os.utime(packed, ns=(0, changed))
    with load_network(path, memory=budget) as network:
        _bytes(network, inputs)
    assert packed.stat().st_atime_ns >= changed, "it was not used"
    for name, at in (("old", 1), ("older", 0)):
        one = folder / f"{name}.weights"
        one.write_bytes(packed.read_bytes())
        os.utime(one, ns=(at, changed))
    packed.unlink()
    monkeypatch.setattr(packed_file, "MOST_BYTES", 2 * size)
    with load_network(path, memory=budget) as network:
        _bytes(network, inputs)
    assert {one.name for one in folder.iterdir()} == {packed.name, "old.weights"}


def test_files_of_models_that_are_gone_go(stored: tuple[Path, Inputs], tmp_path: Path) -> None:
    path, inputs = stored
    budget, folder = _some_budget(path, inputs), tmp_path / "cache" / "networks"
    other = path.with_name("other.onnx")
    shutil.copy(path, other)
    for one in (other, path):
        with load_network(one, memory=budget) as network:
            _bytes(network, inputs)
    assert len(list(folder.iterdir())) == 2
    other.rename(path.with_name("third.onnx"))
    with load_network(path.with_name("third.onnx"), memory=budget) as network:
        _bytes(network, inputs)
    assert len(list(folder.iterdir())) == 2, "the other's is still there"


def test_a_read_that_fails_ends_the_call(stored: tuple[Path, Inputs]) -> None:
    path, inputs = stored
    with load_network(path, memory=_least(path, inputs)) as network:
        expected = _bytes(network, inputs)
        streaming = network._residence.streaming
        assert streaming is not None and streaming.window is not None
        window = streaming.window
        window.halt()
        fine = window._direct.copy(), window._plain.copy()
        window._direct[:], window._plain[:] = -1, -1

        def gone(*_: object) -> None:
            raise ModelFileError("read failed", path=path)

        window._plainly.readinto = gone  # type: ignore[method-assign]
        with pytest.raises(ModelFileError, match="read failed"):
            network(inputs)
        del window._plainly.readinto
        window._direct[:], window._plain[:] = fine
        assert _bytes(network, inputs) == expected


def test_a_full_disk_is_said_before(
    stored: tuple[Path, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs = stored
    usage = shutil.disk_usage(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with (
        load_network(path, memory=_least(path, inputs)) as network,
        pytest.raises(HeadraceError, match=r"1\.05 MB are free: make room, or set HEADRACE_CACHE"),
    ):
        network(inputs)


def test_what_cannot_stream_is_refused() -> None:
    model, _ = linear(512)
    x = np.ones((1, 512), np.float32)
    with (
        network_of(model, memory=900_000) as network,
        pytest.raises(BudgetError, match=r"this network does not fit in 900 kB .*weights 1\.05 MB"),
    ):
        network({"x": x})
    rng = np.random.default_rng(1)
    w = rng.standard_normal((512, 512)).astype(np.float32)
    node = helper.make_node("MatMul", ["w", "x"], ["y"])  # no kernel of ours
    host = model_of([node], {"x": (FLOAT, [512, 2])}, ["y"], {"w": w})
    inputs = {"x": rng.standard_normal((512, 2)).astype(np.float32)}
    with network_of(host) as network:
        expected = _bytes(network, inputs)
    with network_of(host, memory=20_000_000) as network:
        assert _bytes(network, inputs) == expected


def test_weights_of_the_host_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((512, 512)).astype(np.float32)
    node = helper.make_node("MatMul", ["w", "x"], ["y"])
    path = save(model_of([node], {"x": (FLOAT, [512, 2])}, ["y"], {"w": w}), tmp_path / "h.onnx")
    inputs = {"x": rng.standard_normal((512, 2)).astype(np.float32)}
    with (
        load_network(path, memory=1_500_000) as network,
        pytest.raises(BudgetError, match=r"that onnxruntime runs \(MatMul y.*4\.19 MB"),
    ):
        network(inputs)
    with load_network(path, memory=6_000_000) as network:
        network(inputs)
        assert network.plan(inputs).memory.parts["onnxruntime"] >= 3 * w.nbytes


def test_patches_are_chosen_where_the_arena_does_not_fit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    constants = {
        "a_w": rng.standard_normal((32, 3, 3, 3)).astype(np.float32),
        "b_w": rng.standard_normal((16, 32, 3, 3)).astype(np.float32) / 9,
    }
    nodes = [
        helper.make_node("Conv", ["x", "a_w"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "b_w"], ["b"], pads=[1, 1, 1, 1], strides=[4, 4]),
        helper.make_node("GlobalAveragePool", ["b"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 3, 192, 192])}, ["y"], constants)
    path, inputs = save(model, tmp_path / "m.onnx"), _floats(1, 3, 192, 192)
    with load_network(path, patches="off") as network:
        expected, layer_by_layer = _bytes(network, inputs), network.plan(inputs).memory.whole
    budget = layer_by_layer // 2
    with load_network(path, memory=budget) as network:
        assert "Conv first to Conv b run on" in network.notices(inputs)[0]
        assert _bytes(network, inputs) == expected
        memory = network.plan(inputs).memory
        assert network.plan(inputs).patches and memory.n_bytes <= budget
    with load_network(path, memory=layer_by_layer) as network:
        assert not network.plan(inputs).patches
    with load_network(path, memory=budget, patches="off") as network, pytest.raises(BudgetError):
        network(inputs)


def test_the_commands_take_memory(stored: tuple[Path, Inputs], tmp_path: Path, capsys: Any) -> None:
    path, inputs = stored
    budget = _some_budget(path, inputs)
    sizes = ["--input", "batch=1", "--input", "tokens=12"]
    memory = ["--memory", str(budget)]

    def command(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    plan = command("plan", str(path), *memory, *sizes)
    assert plan["needed_bytes"] <= budget < plan["all_in_memory_from_bytes"]
    assert plan["needed_bytes"] == sum(one["bytes"] for one in plan["memory"])
    assert plan["bytes_read_per_run"] > 0 and not plan["is_packed"]
    assert 0 < plan["compute_s"] <= plan["predicted_s"]
    bench = command("bench", str(path), *memory, *sizes)
    assert bench["bytes_read_per_run"] == plan["bytes_read_per_run"]
    assert bench["planned_bytes"] == plan["needed_bytes"]
    assert bench["share_of_flash"] > 0 and bench["stall_share"] < 1
    assert command("plan", str(path), *memory, *sizes)["is_packed"]
    given = []
    for name, array in inputs.items():
        np.save(tmp_path / f"{name}.npy", array)
        given += ["--input", f"{name}={tmp_path / f'{name}.npy'}"]
    assert main(["run", str(path), *memory, *given, "-o", str(tmp_path / "out")]) == 0
    assert "read from the disk for each run" in capsys.readouterr().err
    expected = headrace.load(path)(inputs)["y"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "y.npy"), expected)
    assert main(["plan", str(path), "--memory", "1MB", *sizes]) == 2
    assert "the least that works is" in capsys.readouterr().err


HOLDS = """
import gc, json, sys
import numpy as np
import headrace
import headrace.networks.streaming

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

# Libraries and kernels are the process.
headrace.load(sys.argv[1], threads=2)({"x": np.zeros((1, 64), np.float32)})
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, budget = status("VmRSS"), int(sys.argv[3])
if sys.argv[4]:
    with open(sys.argv[4], "w") as file:
        file.write(str((before + budget) // 4096 * 4096 + 4096))
x = np.arange(2048, dtype=np.float32)[None] / 999
with headrace.load(sys.argv[2], memory=budget, threads=2) as network:
    sums = [float(network({"x": x})["y"].sum(dtype=np.float64)) for _ in range(3)]
print(json.dumps({"grown": status("VmHWM") - before, "sums": sums}))
"""


def test_the_number_holds_in_a_group(tmp_path: Path) -> None:
    """With packing, of matrices each of which is larger than the budget, in a cgroup as well."""
    rng = np.random.default_rng(1)
    constants = {"a": rng.standard_normal((2048, 2048), np.float32)}
    constants["b"] = constants["a"].T[:, ::-1].copy()
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 2048])}, ["y"], constants)
    path = save(model, tmp_path / "m.onnx", True)
    x = np.arange(2048, dtype=np.float32)[None] / 999
    with headrace.load(path, threads=2) as network:
        expected = float(network({"x": x})["y"].sum(dtype=np.float64))
        assert network.plan({"x": x}).memory.whole > 32 << 20
    budget = 12 << 20
    # Kernels are in the tests' cache, packed weights in another: this run packs anew.
    kernels = Path(os.environ["HEADRACE_CACHE"])
    cache = tmp_path / "own"
    cache.mkdir()
    (cache / "kernels").symlink_to(kernels / "kernels")
    small = save(linear()[0], tmp_path / "small.onnx")
    command = [sys.executable, "-c", HOLDS, str(small), str(path)]

    def run(*before: str, limit: str = "") -> Any:
        done = subprocess.run(
            [*before, *command, str(budget), limit], capture_output=True, text=True,
            env=os.environ | {"HEADRACE_CACHE": str(cache)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    try:
        with group(2 << 30) as folder:  # the process makes it as small as it needs it
            names = "memory.limit_in_bytes", "memory.max"
            (limit,) = (folder / name for name in names if (folder / name).exists())
            shell = f'echo $$ > "{folder}/cgroup.procs" && exec "$@"'
            found = run("sh", "-c", shell, "sh", limit=str(limit))
    except pytest.skip.Exception:  # the size of the process tells
        found = run()
    assert found["sums"] == [expected] * 3
    assert 4 << 20 < found["grown"] <= budget


SHAPES = """
import gc, json, sys
from pathlib import Path
import numpy as np
import headrace
import headrace.networks.streaming
from headrace.memory import give_back_heap

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

each = [{name: np.ones((1, n), np.int64) for name in ("input_ids", "attention_mask")}
        for n in (60, 7, 33, 48, 20, 54)]
with headrace.load(sys.argv[1], threads=2) as network:  # libraries and kernels are the process
    for inputs in each:
        network(inputs)
del network
gc.collect()
give_back_heap()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, found = status("VmRSS"), []
with headrace.load(sys.argv[1], memory=int(sys.argv[2]), threads=2) as network:
    for inputs in each * 2:
        network(inputs)
        found.append(network.plan(inputs).memory.n_bytes)
    print(json.dumps({"grown": status("VmHWM") - before, "planned": found,
                      "plans": len(network._plans)}))
"""


def test_the_number_holds_for_shapes_in_turn(tmp_path: Path, monkeypatch: Any) -> None:
    """What plans of other shapes keep is counted; those that it leaves no room for go."""
    monkeypatch.undo()
    model = encoder(np.random.default_rng(3), "new", heads=6, width=384, layers=6)
    path = save(model, tmp_path / "m.onnx", True)
    inputs = tokens(np.random.default_rng(4), 1, 60)
    least = _least(path, inputs)
    for budget, plans in ((least, 1), (least + (12 << 20), 6)):
        done = subprocess.run(
            [sys.executable, "-c", SHAPES, str(path), str(budget)], capture_output=True, text=True,
            env=dict(os.environ), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert max(found["planned"]) <= budget
        assert 0.7 * min(found["planned"]) < found["grown"] <= budget
        assert found["plans"] == plans


def test_what_is_free_is_the_limit(
    stored: tuple[Path, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs = stored
    budget = _some_budget(path, inputs)
    with load_network(path) as network:
        expected = _bytes(network, inputs)
    monkeypatch.setattr(residence, "WATCHED_BYTES", 1 << 20)
    monkeypatch.setattr(host_memory, "resident_bytes", lambda: 1 << 30)
    for free, streams in ((budget, True), (1 << 30, False)):
        limit = Limit((1 << 30) + free, "free")
        monkeypatch.setattr(planning, "limit_of", lambda _, limit=limit: limit)
        with load_network(path) as network:
            assert bool(network.notices(inputs)) == streams
            for _ in range(2):
                assert _bytes(network, inputs) == expected
            assert bool(network.plan(inputs).memory.streamed_bytes) == streams
            assert network.memory == (free if streams else None)


def test_encoders_take_memory(tmp_path: Path) -> None:
    folder = write(tmp_path / "bert")
    with headrace.load(folder, threads=2) as whole:
        expected = whole.embed(TEXTS)
        tokens = {name: np.zeros((1, 16), np.int64) for name in whole._takes}
        most = whole.network.plan(tokens).memory.whole
    with headrace.load(folder, threads=2, memory=2 * most // 3) as encoder:
        np.testing.assert_array_equal(encoder.embed(TEXTS), expected)
        assert encoder.network._residence.streaming is not None
    with headrace.load(folder, memory="1kB") as encoder, pytest.raises(BudgetError):
        encoder.embed(TEXTS)
