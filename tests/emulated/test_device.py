"""Whole models on whole emulated devices: Debian's Python, our wheel, no compiler.

`examples/emulated_device.py` makes the device. It is what a stranger would do, so the wheel is
installed as it is, the device itself tells what its CPU has, and chooses kernels by that.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from wheels import ROOT, build_wheel

import headrace
from headrace import plan as plans
from headrace.errors import KernelError
from headrace.planning import prepare
from headrace.targets.linker import find_linker
from headrace.targets.naming import choose
from headrace.targets.pack import build
from headrace.targets.target import Target, all_targets
from headrace.targets.vector_length import NO_VECTORS, machine

pytestmark = [pytest.mark.slow, pytest.mark.hang_s(1800)]

SCRIPT = ROOT / "examples" / "emulated_device.py"
STORIES = ROOT / "tests" / "data" / "stories260K.gguf"
GOLDEN = json.loads((ROOT / "tests" / "data" / "golden_smollm2.json").read_text("utf-8"))
# By Debian's name: the architecture of our targets, and what is chosen on which CPU. The last is
# the one that runs the large model.
DEVICES = {
    "arm64": ("aarch64", {
        "qemu-aarch64 -cpu cortex-a53": "aarch64-neon",
        "qemu-aarch64 -cpu cortex-a76": "aarch64-dotprod",
    }),
    "armhf": ("armv7a", {"qemu-arm -cpu cortex-a7": "armv7-neon"}),
    "riscv64": ("riscv64-linux", {
        NO_VECTORS: "riscv64",
        machine(128): "riscv64-v128",
        machine(256): "riscv64-v256",
    }),
}  # fmt: skip

ON_DEVICE = """
import json, sys
import headrace
model, target, ids, n_tokens, threads = json.loads(sys.argv[1])
with headrace.load(model, context=128, threads=threads) as loaded:
    assert loaded.target == target, loaded.target
    answer = loaded.generate(ids, max_tokens=n_tokens)
    answer.text()
    print(*answer.ids)
assert not {"numba", "llvmlite"} & {*sys.modules}
"""


@pytest.fixture(scope="module")
def devices(request: pytest.FixtureRequest) -> Path:
    """A folder for the devices, which stay from run to run."""
    for tool in ("apt-get", "dpkg-deb", "tar"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: devices are made of Debian's packages")
    try:
        find_linker()
    except KernelError as error:
        pytest.skip(str(error))
    return Path(request.config.cache.mkdir("devices"))


def levels(device: str) -> list[Target]:
    name, machines = DEVICES[device]
    found = choose(all_targets().values(), name, None)
    return [target for target in found if target.name in machines.values()]


@cache
def wheel_for(device: str, model: Path, folder: Path) -> Path:
    """A wheel with the kernels that a model needs on a device."""
    prepared = prepare(model, context=None, threads=1, target=None)
    rows = {
        row.name: row
        for target in levels(device)
        for row in plans.kernels_of(prepared.decoder, prepared.placed, target)
    }
    pack = build(levels(device), list(rows.values()), folder / "pack", n_workers=2)
    sources = folder / "sources"
    sources.mkdir()
    return build_wheel(sources, [(levels(device)[0].architecture, pack)])


def on_device(device: str, emulator: str, wheel: Path, folder: Path, *what: object) -> list[int]:
    program = emulator.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian's package qemu-user)")
    command = [
        sys.executable, SCRIPT, "--folder", folder, "--wheel", wheel, "--emulator", emulator,
        "--python", device, "-c", ON_DEVICE, json.dumps(what),
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.mark.parametrize(
    ("device", "emulator", "target"),
    [(d, e, t) for d, (_, machines) in DEVICES.items() for e, t in machines.items()],
    ids=[t for _, machines in DEVICES.values() for t in machines.values()],
)
def test_a_small_model_on_two_threads(
    device: str, emulator: str, target: str, devices: Path, wheels: Path
) -> None:
    folder = wheels / device
    wheel = wheel_for(device, STORIES, folder)
    with headrace.load(STORIES, context=128) as model:
        ids = model.tokenize("Once upon a time")
        wanted = model.generate(ids, max_tokens=16)
        wanted.text()
    found = on_device(device, emulator, wheel, devices, str(STORIES), target, ids, 16, 2)
    assert found == wanted.ids


@pytest.mark.parametrize("device", DEVICES)
def test_smollm2(device: str, smollm2_path: Path, devices: Path, wheels: Path) -> None:
    emulator, target = list(DEVICES[device][1].items())[-1]
    wheel = wheel_for(device, smollm2_path, wheels / f"{device}-smollm2")
    prompt = GOLDEN["prompts"][0]
    model = str(smollm2_path.resolve())
    found = on_device(device, emulator, wheel, devices, model, target, prompt["ids"], 4, 1)
    assert found == prompt["greedy16"][:4]
