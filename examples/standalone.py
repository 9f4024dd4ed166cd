"""A model as one executable, built here for another CPU: a prompt goes in as ids, text comes out.

python examples/standalone.py [--model MODEL] [--target aarch64-linux] [--cpu cortex-a76] [PROMPT]

The executable needs no Python, no libc and no other file: copy it to the machine that it is for. If
that is not this one, QEMU runs it here (Debian's package qemu-user), where that is installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import open_model
from headrace.standalone.export import export
from headrace.targets.features import machine
from headrace.targets.naming import choose_one
from headrace.targets.target import all_targets
from headrace.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--target", default=f"{machine()}-linux")
    parser.add_argument("--cpu")
    parser.add_argument("--output", type=Path, default=Path("standalone-model"))
    options = parser.parse_args()

    path = resolve(options.model)
    target = choose_one(all_targets().values(), options.target, options.cpu)
    made = export(path, target, options.output)
    print(f"{made.path}: {made.file_bytes:,} bytes for {target.name}")

    ids = Tokenizer.from_metadata(open_model(path).metadata, path).encode(options.prompt)
    command = [str(options.output.resolve()), "--ids", ",".join(map(str, ids)), "-n", "16"]
    if target.architecture != machine():
        emulator = target.machines[0].split()  # of the weakest CPU that the target is for
        if shutil.which(emulator[0]) is None:
            print("run it there as:", *command)
            return
        command = [*emulator, *command]
    print(*command)
    print(options.prompt, end="", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    try:
        main()
    except (HeadraceError, OSError) as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"the executable ended with status {error.returncode}")
