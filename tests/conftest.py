"""Fixtures and guards for all tests."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CALL_LIMIT_S = 120.0
SLOW_LIMIT_S = 900.0
KERNEL_TESTS = ("test_kernels.py", "test_emulated_kernels.py")
SETUP_LIMIT_S = 900.0  # fetching the model over a slow line is no hang

_real_cache = os.environ.get("HEADRACE_CACHE")
_stderr_fd = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-instructions",
        action="store_true",
        help="write what was counted to tests/emulated/instructions.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hang_s(seconds): this test may take longer than 120 s")
    global _stderr_fd
    _stderr_fd = os.dup(2)  # not captured at this point
    # The user's cache is used for models only. Kernels go to a cache that lasts from run to run:
    # they are keyed by their source text, and compiling them all again takes long.
    root = Path(str(config.rootpath), ".pytest_cache", "d", "headrace")
    root.mkdir(parents=True, exist_ok=True)
    os.environ["HEADRACE_CACHE"] = str(root)
    # A shell starts background jobs with SIGINT ignored, which children inherit: tests of Ctrl-C
    # need the handler that Python has otherwise.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Compile on all cores what the selected tests want compiled; see `compile_ahead`."""
    wanted, models = set(), set()
    for item in session.items:
        if item.path.name in KERNEL_TESTS and isinstance(item, pytest.Function):
            wanted.add((item.callspec.params["name"], item.callspec.params["target_name"]))
        if item.path.name == "test_microcontrollers.py" and isinstance(item, pytest.Function):
            values = getattr(getattr(item, "callspec", None), "params", {})
            if "kernel" in values:
                wanted.add((values["kernel"], values["target_name"]))
        if item.path.name == "test_families.py" and isinstance(item, pytest.Function):
            parameters = getattr(item, "callspec", None)
            values = parameters.params if parameters else {}
            models.add(values.get("target") or values.get("loaded", ("", ""))[1])
    if session.config.option.collectonly or not (wanted or models):
        return
    from compile_ahead import HEADS, compile_ahead

    from headrace.kernels import attention

    names = [kernel.name for head in HEADS for kernel in attention.kernels(head).values()]
    wanted |= {(name, target) for name in names for target in models if target}
    compile_ahead(wanted)


def pytest_unconfigure() -> None:
    os.close(_stderr_fd)


def _guard(seconds: float) -> None:
    # Dumps every thread's stack and ends the process: also when stuck inside a native call.
    if sys.gettrace() is None:  # not under a debugger
        faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr_fd)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    _guard(SETUP_LIMIT_S)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    limit = SLOW_LIMIT_S if item.get_closest_marker("slow") else CALL_LIMIT_S
    if marker := item.get_closest_marker("hang_s"):
        limit = float(marker.args[0])
    _guard(limit)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The published SmolLM2 file: the user's cached one, else fetched; skipped when offline."""
    from headrace.errors import DownloadError
    from headrace.loaders import pull

    isolated = os.environ.pop("HEADRACE_CACHE")
    if _real_cache is not None:
        os.environ["HEADRACE_CACHE"] = _real_cache
    try:
        path = pull.pull("smollm2-135m")
    except DownloadError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to fetch the model: {error}")
        pytest.skip(f"the model cannot be fetched: {error}")
    finally:
        os.environ["HEADRACE_CACHE"] = isolated
    # So that tests of `smollm2-135m` by name find it as well.
    linked = pull.models_dir() / path.name
    linked.parent.mkdir(parents=True, exist_ok=True)
    if not linked.exists():
        linked.unlink(missing_ok=True)
        linked.symlink_to(path)
    return path


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel pack for this CPU with what `data/stories260K.gguf` and its plan need."""
    from headrace import plan as plans
    from headrace.errors import KernelError
    from headrace.kernels import probe
    from headrace.planning import prepare
    from headrace.targets.host import pick_target
    from headrace.targets.linker import find_linker
    from headrace.targets.pack import build

    try:
        find_linker()
    except KernelError as error:
        pytest.skip(str(error))
    best = pick_target(None)
    stories = Path(__file__).parent / "data" / "stories260K.gguf"
    prepared = prepare(stories, context=None, threads=1, target=None)
    rows = plans.kernels_of(prepared.decoder, prepared.placed, best)
    rows = [*rows, probe.kernel()]
    return build([best], rows, tmp_path_factory.mktemp("pack"), n_workers=2)
