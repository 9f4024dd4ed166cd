"""Names to files: resolving, wheels from a (loopback) package index, the (loopback) hub."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, FileServer, serve

from headrace.errors import DownloadError, ModelFileError, ModelNotFoundError
from headrace.loaders import pull as pulling
from headrace.loaders import wheels
from headrace.loaders.pull import HubId, Known, parse_hub_id, pull
from headrace.loaders.sources import resolve

MODEL = b"GGUF" + random.Random(1).randbytes(1_000_000)
MEMBER = "tiny_wheel/tiny.Q4_1.gguf"
WHEEL = "tiny_wheel-1.0-py3-none-any.whl"


def make_wheel(model: bytes = MODEL) -> bytes:
    info = "tiny_wheel-1.0.dist-info"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, model)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return out.getvalue()


def known(wheel: bytes, model: bytes = MODEL) -> Known:
    return Known(
        package="tiny-wheel",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        wheel_bytes=len(wheel),
        member=MEMBER,
        sha256=hashlib.sha256(model).hexdigest(),
        size_bytes=len(model),
        licence="Apache-2.0",
    )


@pytest.fixture(scope="module")
def server_process() -> Iterator[FileServer]:
    with serve() as server:
        yield server


@pytest.fixture
def server(server_process: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    fresh = FileServer(url=server_process.url)
    fresh.requests = server_process.requests
    fresh.requests.clear()
    server_process.__dict__.update(fresh.__dict__)
    return server_process


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration of this machine, and nothing outside the loopback interface."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    values = {
        "HEADRACE_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def index(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """A package index with one wheel, which KNOWN calls `tiny`."""
    server.wheels[WHEEL] = make_wheel()
    monkeypatch.setitem(pulling.KNOWN, "tiny", known(server.wheels[WHEEL]))
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    return server


def leftovers() -> list[str]:
    directory = pulling.models_dir()
    return [p.name for p in directory.iterdir()] if directory.exists() else []


# ---- wheels -------------------------------------------------------------------------------------


def test_a_known_name_is_fetched_once(index: FileServer) -> None:
    calls: list[tuple[int, int | None, str]] = []
    path = resolve("tiny", progress=lambda *call: calls.append(call))
    assert path.read_bytes() == MODEL
    assert leftovers() == ["tiny.Q4_1.gguf"]
    labels = [label.split()[0] for _, _, label in calls]
    assert list(dict.fromkeys(labels)) == ["Downloading", "Checking", "Unpacking"]
    assert all(total is not None and 0 <= done <= total for done, total, _ in calls)
    index.wheels.clear()  # from now on only the cache has it
    assert resolve("tiny") == path
    assert pull("tiny", verify=True) == path


def test_a_damaged_cached_file_is_fetched_again(index: FileServer) -> None:
    target = pulling.models_dir() / "tiny.Q4_1.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(MODEL[:-1])
    assert resolve("tiny").read_bytes() == MODEL
    target.write_bytes(MODEL[:-1] + b"!")  # of the right size: noticed by `headrace pull`
    assert pull("tiny", verify=True).read_bytes() == MODEL


def test_a_wheel_with_another_hash_is_refused(index: FileServer) -> None:
    index.wheels[WHEEL] = make_wheel(MODEL[:-1] + b"!")
    with pytest.raises(DownloadError, match="wrong hash"):
        pull("tiny")
    assert leftovers() == []


def test_a_cut_off_download(index: FileServer) -> None:
    index.cut_after = 1000  # newer versions of pip go on from there, but not for ever
    with pytest.raises(DownloadError, match="cut off"):
        pull("tiny")
    assert leftovers() == []


def test_no_network(index: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match="index cannot be reached: check the network"):
        pull("tiny")
    assert leftovers() == []


def test_an_index_that_does_not_have_it(index: FileServer) -> None:
    index.wheels.clear()
    with pytest.raises(DownloadError, match="does not have it: check pip's `index-url`"):
        pull("tiny")


PULL_SCRIPT = """
import sys
from headrace.loaders import pull
pull.KNOWN["tiny"] = pull.Known(*{fields!r})
print("ready", flush=True)
try:
    pull.pull("tiny", progress=lambda done, total, label: print(done, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_pull() -> subprocess.Popen[str]:
    code = PULL_SCRIPT.format(fields=tuple(pulling.KNOWN["tiny"]))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for_growth(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    while int(line if (line := child.stdout.readline().strip()) != "ready" else 0) < 30_000:
        assert line, "the pull ended before it was interrupted"


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_leaves_nothing_and_kill_does_no_harm(index: FileServer) -> None:
    index.bytes_per_s = 1_000_000
    child = start_pull()
    wait_for_growth(child)
    installers = children_of(child.pid)
    child.send_signal(signal.SIGINT)  # to the parent alone: it must end the installer
    assert child.wait(10) == 130
    assert leftovers() == []
    assert not [pid for pid in installers if Path(f"/proc/{pid}").exists()]
    child = start_pull()
    wait_for_growth(child)
    installers = children_of(child.pid)
    child.kill()
    child.wait()
    for pid in installers:
        os.kill(pid, signal.SIGKILL)
    assert [name for name in leftovers() if not name.startswith(".pull-")] == []
    index.bytes_per_s = None
    old = time.time() - 2 * 24 * 3600
    for stale in pulling.models_dir().glob(".pull-*"):
        os.utime(stale, (old, old))
    assert pull("tiny").read_bytes() == MODEL
    assert leftovers() == ["tiny.Q4_1.gguf"]


def children_of(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in listing.read_text().split()] if listing.exists() else []


def test_two_processes_pull_at_once(index: FileServer) -> None:
    index.bytes_per_s = 1_000_000
    children = [start_pull(), start_pull()]
    assert [child.communicate(timeout=60)[0] != "" for child in children] == [True, True]
    assert [child.returncode for child in children] == [0, 0]
    assert (pulling.models_dir() / "tiny.Q4_1.gguf").read_bytes() == MODEL
    assert leftovers() == ["tiny.Q4_1.gguf"]


def test_no_installer(index: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DownloadError, match="-m ensurepip"):
        pull("tiny")


def test_uv_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("UV", "/opt/uv")
    command = wheels._installer(known(b""), tmp_path)
    assert command[:3] == ["/opt/uv", "pip", "install"]
    assert "--target" in command
    assert "--no-deps" in command


def test_full_disk_is_said_before_fetching(
    index: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(DownloadError, match=r"0 MB are free.*HEADRACE_CACHE"):
        pull("tiny")
    assert index.requests == []


def test_full_disk_while_writing(index: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheels, "_fetch", full)
    with pytest.raises(DownloadError, match="is full"):
        pull("tiny")
    assert leftovers() == []


def test_an_archive_that_lies_about_its_size(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(make_wheel(MODEL + bytes(10_000_000)))
    part = tmp_path / "part"
    with pytest.raises(DownloadError, match="expected"):
        wheels._extract(wheel, known(b""), part, lambda *_: None, "")
    assert part.stat().st_size == len(MODEL) + 1
    wheel.write_bytes(b"<html>")
    with pytest.raises(DownloadError, match="not the expected archive"):
        wheels._extract(wheel, known(b""), part, lambda *_: None, "")


def test_a_cache_that_is_a_file(index: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(DownloadError, match=r"cache is not a directory: .*HEADRACE_CACHE"):
        resolve("tiny")


def test_a_cache_that_may_not_be_written(
    index: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DownloadError, match=r"cache is not writable: .*HEADRACE_CACHE"):
        resolve("tiny")


@pytest.mark.parametrize("when", ["Downloading", "Checking", "Unpacking"])
def test_a_callback_that_fails_is_not_the_disk(index: FileServer, when: str) -> None:
    """Progress goes to a pipe that is closed, say."""
    failure = BrokenPipeError(32, "Broken pipe")

    def progress(done: int, total: int | None, label: str) -> None:
        if label.startswith(when):
            raise failure

    with pytest.raises(BrokenPipeError) as caught:
        pull("tiny", progress=progress)
    assert caught.value is failure
    assert leftovers() == []


def test_a_warm_name_costs_little(index: FileServer) -> None:
    pull("tiny")
    code = (
        "import sys, time\n"
        "from headrace.loaders import pull, sources\n"
        f"pull.KNOWN['tiny'] = pull.Known(*{tuple(pulling.KNOWN['tiny'])!r})\n"
        "t = time.perf_counter(); sources.resolve('tiny'); print(time.perf_counter() - t)\n"
        "heavy = {'rich', 'huggingface_hub', 'jinja2', 'platformdirs', 'numpy', 'subprocess',"
        " 'zipfile', 'hashlib', 'difflib', 'tqdm', 'dataclasses'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    # -S -I and the package by hand: what site and the editable install import is not ours.
    seconds, heavy = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[1]
    ).splitlines()
    # Interpreters differ in what their own start-up imports.
    ours = set(eval(heavy)) - _imported_by_start_up()
    assert ours == set()
    assert float(seconds) < 0.003


def _imported_by_start_up() -> set[str]:
    code = "import sys, pathlib, typing; print(sorted(sys.modules))"
    return set(eval(subprocess.check_output([sys.executable, "-c", code], text=True)))


# ---- paths --------------------------------------------------------------------------------------


def test_files_and_directories(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(file) == file
    assert resolve(str(file)) == file
    assert resolve("a.gguf") == Path("a.gguf")
    assert resolve(tmp_path) == file
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"2 models; name one of:\n.*a\.gguf\n.*b\.gguf"):
        resolve(tmp_path)


def test_a_split_model_in_a_directory(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        part.write_bytes(b"GGUF")
    assert resolve(tmp_path) == parts[0]
    parts[0].unlink()
    with pytest.raises(ModelNotFoundError, match=r"not its first: m-00001-of-00003\.gguf"):
        resolve(tmp_path)


def test_part_names_are_taken_as_they_are_spelled(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"M-{i:05d}-OF-00002.GGUF").write_bytes(b"GGUF")
    assert resolve(tmp_path) == tmp_path / "M-00001-OF-00002.GGUF"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".gguf", "y/" + "x" * 300, "x/" * 3000])
def test_names_too_long_for_a_file(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(name)
    with pytest.raises(ModelNotFoundError):
        resolve(Path(name))


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(ModelNotFoundError):
        resolve(tmp_path / "a" / "b.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135n", "Did you mean smollm2-135m?"),
        ("./SmolLM2.Q4_2.gguf", "Did you mean SmolLM2.Q4_1.gguf?"),
        ("nowhere/x.gguf", "the directory nowhere does not exist"),
        ("models/x", "no file or directory models/x"),
        ("models/x", "write hf://models/x"),
        ("", "name is empty"),
        ("models", "directory without a .gguf file"),
        ("link.gguf", "which does not exist"),
        ("hf://x", "no hub id"),
        ("~nobody-at-all/x.gguf", "does not exist"),
    ],
)
def test_not_found(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2.Q4_1.gguf").write_bytes(b"GGUF")
    (tmp_path / "models").mkdir()
    (tmp_path / "link.gguf").symlink_to("gone.gguf")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert message in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may look anywhere")
def test_no_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    with pytest.raises(ModelFileError, match="no permission"):
        resolve(closed / "x.gguf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", HubId("org/repo")),
        ("org/repo:Q4_K_M", HubId("org/repo", None, "Q4_K_M")),
        ("org/repo@v1:dir/x.gguf", HubId("org/repo", "v1", "dir/x.gguf")),
        ("hf://org/repo", HubId("org/repo")),
        ("hf://org/repo@v1/dir/x.gguf", HubId("org/repo", "v1", "dir/x.gguf")),
        ("hf://org/repo:x.gguf", HubId("org/repo", None, "x.gguf")),
        ("hf://models/org/repo/x.gguf", HubId("org/repo", None, "x.gguf")),
        ("hf://models/repo", HubId("models/repo")),
        ("hf://org/repo/../../x.gguf", None),
        ("repo", None),
        ("a/b/c", None),
        ("org/repo\n", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


# ---- hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.repos["org/one"] = {"README.md": b"hi", "one.Q8_0.gguf": MODEL}
    server.repos["org/many"] = {
        "many.Q4_0.gguf": MODEL[:2000],
        "many.Q8_0.gguf": MODEL[:3000],
        "mmproj-many.gguf": MODEL[:100],
        "big-00001-of-00002.gguf": b"GGUF1",
        "big-00002-of-00002.gguf": b"GGUF2",
    }
    server.repos["org/none"] = {"README.md": b"hi"}
    server.repos["org/vision"] = {"v.gguf": MODEL[:50], "mmproj-v.gguf": MODEL[:60]}
    return server


def test_the_only_file_of_a_repository(hub: FileServer, capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int | None, str]] = []
    path = pull("org/one", progress=lambda *call: calls.append(call))
    assert path.read_bytes() == MODEL
    assert path.parts[-3:] == ("snapshots", COMMIT, "one.Q8_0.gguf")
    assert calls[-1] == (len(MODEL), len(MODEL), "Downloading one.Q8_0.gguf")
    assert capfd.readouterr() == ("", "")
    assert pull("org/vision").name == "v.gguf"


def test_a_cached_file_is_found_without_the_hub(hub: FileServer) -> None:
    path = resolve("org/one:one.Q8_0.gguf")
    hub.requests.clear()
    assert resolve("org/one:one.Q8_0.gguf") == path
    assert resolve("hf://org/one/one.Q8_0.gguf") == path
    assert resolve("org/one:q8_0") == path
    assert hub.requests == []
    assert resolve("org/one") == path  # which file is meant only the hub knows
    assert hub.seen("GET", "/cdn/") == 0


def test_without_a_network_what_is_cached_is_used(
    hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pull("org/one")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/one") == path
    assert pull("org/one", file="one.Q8_0.gguf") == path
    for name in ("org/many", "org/many:many.Q4_0.gguf"):
        with pytest.raises(DownloadError, match="hub cannot be reached: check the network"):
            resolve(name)


def test_several_files_are_listed(hub: FileServer) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        pull("org/many")
    message = str(caught.value)
    assert "has 3 models that fit; name one of:" in message
    assert "org/many:many.Q4_0.gguf" in message
    assert "org/many:big-00001-of-00002.gguf" in message
    assert "00002-of" not in message.replace("-of-00002", "")
    assert pull("org/many:q4_0").read_bytes() == MODEL[:2000]
    with pytest.raises(ModelNotFoundError, match=r"no model 'Q2_K'; it has:\n"):
        pull("org/many:Q2_K")


def test_all_parts_of_a_split_file(hub: FileServer) -> None:
    path = pull("org/many:big")
    assert path.name == "big-00001-of-00002.gguf"
    assert path.with_name("big-00002-of-00002.gguf").read_bytes() == b"GGUF2"
    assert resolve("org/many:big-00001-of-00002.gguf") == path
    assert resolve("org/many:big-00002-of-00002.gguf") == path


def test_any_part_stands_for_a_split_file(hub: FileServer) -> None:
    path = pull("org/many:big-00002-of-00002.gguf")
    assert path.name == "big-00001-of-00002.gguf"
    assert path.with_name("big-00002-of-00002.gguf").read_bytes() == b"GGUF2"


def test_odd_part_names(hub: FileServer) -> None:
    hub.repos["org/none-of"] = {"m-00001-of-00000.gguf": b"GGUF0"}
    assert pull("org/none-of").read_bytes() == b"GGUF0"
    hub.repos["org/upper"] = {f"M-{i:05d}-OF-00002.GGUF": b"GGUF%d" % i for i in (1, 2)}
    path = pull("org/upper")
    assert path.name == "M-00001-OF-00002.GGUF"
    assert path.with_name("M-00002-OF-00002.GGUF").read_bytes() == b"GGUF2"
    assert resolve("org/upper:M-00002-OF-00002.GGUF") == path


def test_a_callback_that_fails_is_not_the_hub(hub: FileServer) -> None:
    def progress(done: int, total: int | None, label: str) -> None:
        raise ConnectionError("the caller's own")

    with pytest.raises(ConnectionError, match="the caller's own"):
        pull("org/one", progress=progress)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("org/gone", ModelNotFoundError, "no model org/gone on the hub"),
        ("org/one:two.gguf", ModelNotFoundError, "no model 'two.gguf'; it has:"),
        ("org/one@v9:one.Q8_0.gguf", ModelNotFoundError, "no revision 'v9'"),
        ("org/none", ModelNotFoundError, "holds no .gguf file"),
        ("org/a--b", ModelNotFoundError, "no valid hub id"),
        ("org/one:one.Q8_0.gguf", DownloadError, "org/one is gated: accept its terms"),
    ],
)
def test_hub_errors(name: str, error: type[Exception], message: str, hub: FileServer) -> None:
    hub.gated.add("org/one")
    if "two" in name or "@" in name:
        hub.gated.clear()
    with pytest.raises(error) as caught:
        pull(name)
    assert message in str(caught.value)


def test_a_broken_hub(hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's many tries
    hub.broken = True
    with pytest.raises(DownloadError, match="HTTP 500"):
        pull("org/one:one.Q8_0.gguf")


def test_a_broken_hub_transfer_is_resumed(hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.file_download as inside

    real_sleep = time.sleep

    def sleep(seconds: float) -> None:  # the hub's client waits here before it tries again
        hub.cut_after = None
        real_sleep(0.01)

    monkeypatch.setattr(inside.time, "sleep", sleep)
    hub.cut_after = 100_000
    assert pull("org/one").read_bytes() == MODEL


def test_the_hub_is_an_extra(hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"pip install headrace\[hub\]"):
        resolve("org/one")


def test_neither_name_nor_id() -> None:
    with pytest.raises(ModelNotFoundError, match="neither a known name"):
        pull("what is this")


def test_the_published_file(smollm2_path: Path) -> None:
    published = pulling.KNOWN["smollm2-135m"]
    assert smollm2_path.stat().st_size == published.size_bytes
    assert smollm2_path.read_bytes()[:4] == b"GGUF"
