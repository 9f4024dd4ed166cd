#!/bin/sh
# Run a model on a Raspberry Pi (or another ARM board with Linux and ssh), with kernels built here:
#
#     examples/raspberry_pi.sh pi@raspberrypi.local "Why is the sky blue?"
#
# The board needs Python 3.11 or newer with venv; 64-bit systems take AArch64's kernels, 32-bit ones
# (a Pi 2 and newer) ARMv7's. Nothing is compiled there: the wheel brings the kernels of all CPU
# levels, and the board takes the best that it can run. Numba and llvmlite are left out, which saves
# 50 MB of memory and some 150 MB of disk; where there are wheels of them, `pip install numba llvmlite`
# adds the compiler for kernels of your own.
set -eu
board=$1
prompt=${2:-Why is the sky blue?}
cd "$(dirname "$0")/.."

# Ten minutes the first time; kernels that were built before are taken from the cache.
[ -n "$(ls dist/headrace-*.whl 2>/dev/null)" ] || make wheel ARCHITECTURES="aarch64 armv7a"
wheel=$(ls -t dist/headrace-*.whl | head -1)

scp "$wheel" "$board:"
ssh "$board" sh -s "$(basename "$wheel")" <<'ON_THE_BOARD'
set -eu
[ -d headrace-env ] || python3 -m venv headrace-env
. headrace-env/bin/activate
pip install --quiet "numpy>=2.0" gguf jinja2 platformdirs psutil rich tokenizers typer
pip install --quiet --no-deps --force-reinstall "$1"
ON_THE_BOARD
printf %s "$prompt" | ssh "$board" headrace-env/bin/headrace run smollm2-135m - -n 64
