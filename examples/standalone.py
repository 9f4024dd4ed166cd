"""A model as one executable, built here for another CPU: a prompt goes in as ids, text comes out.

python examples/standalone.py [--model MODEL] [--target aarch64-linux] [--cpu cortex-a76] [PROMPT]

The executable needs no Python, no libc and no other file: copy it to the machine that it is for. If
that is not this one, QEMU runs it here (Debian's package qemu-user), where that is installed.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from pathlib import Path

from headrace.loaders.sources import resolve
from headrace.loaders.tiled import open_model
from headrace.standalone.export import export
from headrace.targets.pack import choose
from headrace.targets.target import all_targets
from headrace.tokenizer import Tokenizer

EMULATORS = {"aarch64": "qemu-aarch64", "armv7a": "qemu-arm", "riscv64": "qemu-riscv64"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--target", default=f"{platform.machine()}-linux")
    parser.add_argument("--cpu")
    parser.add_argument("--output", type=Path, default=Path("standalone-model"))
    options = parser.parse_args()

    path = resolve(options.model)
    fitting = choose(all_targets().values(), options.target, options.cpu)
    target = fitting[-1] if options.cpu else fitting[0]
    made = export(path, target, options.output, context=512)
    print(f"{made.path}: {made.file_bytes:,} bytes for {target.name}")

    ids = Tokenizer.from_metadata(open_model(path).metadata, path).encode(options.prompt)
    command = [str(options.output.resolve()), "--ids", ",".join(map(str, ids)), "-n", "16"]
    if target.architecture != platform.machine():
        emulator = EMULATORS.get(target.architecture, "")
        if shutil.which(emulator) is None:
            print("run it there as:", *command)
            return
        # The weakest emulated CPU that the target is for.
        command = [*target.machines[0].split(), *command]
    print(*command)
    print(options.prompt, end="", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
