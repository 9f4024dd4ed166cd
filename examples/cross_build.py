"""Build kernels for another machine: python examples/cross_build.py aarch64-linux pack/ [CPU]

The same as `headrace targets build --target aarch64-linux --cpu CPU -o pack/`, from Python. Copy
the folder to the device, and load models there with `headrace.load(model, kernels="pack/")`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.kernels.table import kernel_table
from headrace.targets.naming import choose
from headrace.targets.pack import build
from headrace.targets.target import all_targets


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    what, folder = sys.argv[1:3]
    cpu = sys.argv[3] if len(sys.argv) > 3 else None
    levels = choose(all_targets().values(), what, cpu)
    print("CPU levels:", ", ".join(level.name for level in levels))
    pack = build(levels, list(kernel_table().values()), folder, n_workers=2, progress=show)
    for path in sorted(Path(pack).iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def show(done: int, total: int, what: str) -> None:
    if done == total:
        print(f"{what}: {total}")


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        sys.exit(str(error))
