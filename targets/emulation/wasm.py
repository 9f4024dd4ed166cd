"""Run and count kernels that are built for WebAssembly, in this process, with wasmtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import KernelError
from headrace.targets.emulation.image import ALIGNMENT, Image, Launch
from headrace.targets.linker import link_wasm
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

MACHINE = "wasmtime"
FUEL = 1 << 40  # instructions; a kernel that needs more does not end


def _placed(image: Image, base: int) -> tuple[bytes, list[list[int]]]:
    """The image with addresses where it lies at `base`, and its calls."""
    words = np.frombuffer(image.data, np.int64).copy()
    n_places, n_calls = (int(n) for n in words[:2])
    for place in words[2 : 2 + n_places]:
        words[place // 8] += base
    calls = words[2 + n_places :][: 3 * n_calls].reshape(n_calls, 3)
    return words.tobytes(), [[base + int(at), int(i), int(n)] for at, i, n in calls]


def run(kernel: str, code: bytes, target: Target, launches: Sequence[Launch]) -> int:
    """Call a kernel as `launches` say; gives the number of instructions it took.

    Constants and moves of local variables count, as they do for the engine; a compiler of
    WebAssembly makes registers of most.

    Raises:
        KernelError: the kernel traps, or stores beside an array.
    """
    import wasmtime

    with tempfile.TemporaryDirectory(prefix="headrace-wasm-") as folder:
        path = Path(folder, kernel)
        link_wasm([code], path, [symbol_of(kernel), "__heap_base"])
        config = wasmtime.Config()
        config.consume_fuel = True
        engine = wasmtime.Engine(config)
        module = wasmtime.Module(engine, path.read_bytes())
    store = wasmtime.Store(engine)
    store.set_fuel(FUEL)
    exports: Any = wasmtime.Instance(store, module, []).exports(store)
    memory, entry = exports["memory"], exports[symbol_of(kernel)]
    base = -(-exports["__heap_base"].value(store) // ALIGNMENT) * ALIGNMENT
    image = Image(launches)
    missing = base + len(image.data) - memory.data_len(store)
    if missing > 0:
        memory.grow(store, -(-missing // 65536))
    data, calls = _placed(image, base)
    memory.write(store, data, base)
    before = store.get_fuel()
    try:
        for call in calls:
            entry(store, *call)
        image.restore(bytes(memory.read(store, base, base + len(data))))
    except (wasmtime.Trap, wasmtime.WasmtimeError, KernelError) as error:
        raise KernelError(f"kernel {kernel} of {target.name} on {MACHINE}: {error}") from error
    return int(before - store.get_fuel())
