"""Run headrace on a whole emulated device: Debian's Python for another CPU, under QEMU.

    make wheel ARCHITECTURES=aarch64
    python examples/emulated_device.py arm64 MODEL "Why is the sky blue?" -n 4

The wheel has the kernels, so nothing is compiled on the device, which has no Numba and no llvmlite.
Debian's packages are taken from where this machine takes its own, and unpacked in a folder of ours:
nothing is installed here, and nobody has to be root. Needs Debian (apt and its keys), qemu-user and
pip. Everything but the CPU and Linux itself is what a real device would have.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = "trixie"  # the first with NumPy 2, and with RISC-V
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
PYTHON = "3.13"  # the suite's
PACKAGES = ("python3", "python3-numpy", "python3-psutil", "python3-jinja2", "python3-platformdirs",
            "python3-rich", "python3-typer")  # fmt: skip
# What Debian has no package of; from the package index, built for these versions of glibc.
WHEELS = ("tokenizers",)
GLIBCS = ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_31", "manylinux_2_39")
TOOLS = ("apt-get", "dpkg-deb", "tar")


@dataclass(frozen=True)
class Device:
    """An architecture: its emulator, Debian's folder of libraries, and the platform of wheels."""

    emulator: str
    libraries: str
    platform: str


DEVICES = {
    "arm64": Device("qemu-aarch64 -cpu cortex-a76", "aarch64-linux-gnu", "aarch64"),
    "armhf": Device("qemu-arm -cpu cortex-a7", "arm-linux-gnueabihf", "armv7l"),
    "riscv64": Device(
        "qemu-riscv64 -cpu rv64,v=true,vext_spec=v1.0,vlen=256", "riscv64-linux-gnu", "riscv64"
    ),
}


def run(*command: object, **options: object) -> str:
    """A program's output; this one ends with its message if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout


def mirror() -> str:
    """Where this machine takes Debian's packages from."""
    wanted = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    sites = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()
    if not sites or not Path(KEYS).is_file():
        sys.exit("apt knows no mirror of Debian here: run `apt-get update` (on Debian)")
    return sites[0]


def unpack(architecture: str, folder: Path) -> Path:
    """Debian's Python for an architecture and what it needs, in a folder; made once."""
    root, state = folder / "root", folder / "apt"
    if (folder / "unpacked").exists():
        return root
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("etc", "lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    (state / "etc" / "sources.list").write_text(f"deb [signed-by={KEYS}] {mirror()} {SUITE} main\n")
    settings = {
        "Dir::Etc": state / "etc",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    run(*apt, "install", "--download-only", "--no-install-recommends", *PACKAGES)
    for name in ("bin", "lib", "sbin"):  # links on every Debian, which no package here brings
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in sorted((state / "archives").glob("*.deb")):
        files = folder / "files.tar"
        files.write_bytes(subprocess.check_output(["dpkg-deb", "--fsys-tarfile", package]))
        run("tar", "-xf", files, "-C", root, "--keep-directory-symlink", "--no-same-owner")
    (folder / "unpacked").touch()
    return root


def install(wheel: Path, device: Device, site: Path) -> None:
    """Install our wheel, and others for the device's platform, in a folder."""
    shutil.rmtree(site, ignore_errors=True)
    platforms = [f"--platform={glibc}_{device.platform}" for glibc in GLIBCS]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", *platforms]
    run(*pip, *options, f"--target={site}", wheel, *WHEELS)


def newest_wheel() -> Path:
    """The wheel that was built last."""
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit("there is no wheel in dist/: run `make wheel`")
    return wheels[-1]


def main() -> int:
    """Make the device, and run `headrace run` on it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", choices=DEVICES, help="Debian's name of it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows `headrace run`")
    parser.add_argument("--emulator", help="another CPU, such as 'qemu-aarch64 -cpu cortex-a53'")
    parser.add_argument("--wheel", type=Path, help="default: the newest in dist/")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "devices")
    parser.add_argument("--python", action="store_true", help="arguments are Python's own")
    asked = parser.parse_args()
    device = DEVICES[asked.architecture]
    emulator = shlex.split(asked.emulator or device.emulator)
    for tool in (*TOOLS, emulator[0]):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed (the emulators are Debian's package qemu-user)")
    folder = asked.folder.resolve() / asked.architecture
    root = unpack(asked.architecture, folder)
    install(asked.wheel or newest_wheel(), device, folder / "site")
    libraries = root / "usr" / "lib" / device.libraries
    environment = {
        # Debian chooses among several BLAS when it configures a package, which nobody did here.
        "LD_LIBRARY_PATH": f"{libraries / 'blas'}:{libraries / 'lapack'}",
        "PYTHONPATH": folder / "site",
        "HEADRACE_CACHE": folder / "cache",
    }
    options = [word for pair in environment.items() for word in ("-E", "{}={}".format(*pair))]
    program = [] if asked.python else ["-m", "headrace", "run"]
    command = [*emulator, "-L", root, *options, root / "usr/bin/python3", *program]
    return subprocess.run([*map(str, command), *asked.arguments], env=dict(os.environ)).returncode


if __name__ == "__main__":
    sys.exit(main())
