"""Streamed weights give the same bits as weights in memory, and failures are exceptions."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tiled import EXPANDED, FAMILIES, KINDS, write_model

import headrace
from headrace.compress import compress
from headrace.errors import BudgetError, CancelledError, HeadraceError, ModelFileError
from headrace.memory_plan import memory_plan, plan_model
from headrace.model import Model
from headrace.offload import pieces
from headrace.offload.revision import Revision
from headrace.planning import prepare
from headrace.refit import refit

CONTEXT = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and slots that small models have many of."""
    monkeypatch.setattr(pieces, "HUGE_PAGE", pieces.PAGE)
    monkeypatch.setattr(pieces, "LEAST_PIECE_BYTES", 2 << 10)
    monkeypatch.setattr("headrace.choices.PIECE_BYTES", 0)


def budgets(path: Path, **options: Any) -> list[int]:
    """The least that works, something between, and not quite enough for everything."""
    whole = plan_model(path, context=CONTEXT, measure=False).peak_bytes
    with pytest.raises(BudgetError) as caught:
        headrace.load(path, memory=1, context=CONTEXT, **options)
    least = caught.value.needed_bytes
    assert least < whole
    return [least, (least + whole) // 2, whole - 1]


def results(model: Model) -> list[np.ndarray]:
    """Logits of chunks through all programs, of more than one pass."""
    ids = [i * 7 % model.vocabulary for i in range(40)]
    found = [model.logits(ids), model.logits(ids[:1]), model.logits(ids[:3])]
    for i in range(3):
        model.read_tokens([ids[i + 3]], i + 3)
    return [*found, model.logits(ids[:18], last=2)]


def check(path: Path) -> None:
    with headrace.load(path, context=CONTEXT, threads=2) as model:
        expected = results(model)
        assert not model.streams
    for memory in budgets(path):
        with headrace.load(path, memory=memory, context=CONTEXT, threads=2) as model:
            assert model.streams
            assert model.plan.peak_bytes <= memory
            found = results(model)
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_the_same_bits(name: str) -> None:
    check(FAMILIES[name])


@pytest.mark.parametrize("kinds", [KINDS, *([kind] for kind in KINDS)], ids="-".join)
def test_types_give_the_same_bits(kinds: list[str], tmp_path: Path) -> None:
    check(write_model(tmp_path / "m.gguf", kinds))


def test_tiled_files_give_the_same_bits(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", KINDS)
    check(compress(source, tmp_path / "m.gguf").path)


def test_rows_of_a_tiled_embedding_that_is_rewritten(tmp_path: Path) -> None:
    """Some of it is coded and becomes float32, the rest is float16 and streams."""
    source = write_model(tmp_path / "source.gguf", ["F16", "Q8_0"])  # the embedding is Q8_0
    path = compress(source, tmp_path / "m.gguf").path
    with headrace.load(path, context=CONTEXT, threads=2, activations="f32") as model:
        expected = results(model)
    memory = budgets(path, activations="f32")[0]
    with headrace.load(path, memory=memory, context=CONTEXT, threads=2, activations="f32") as model:
        assert model.streams
        for a, b in zip(results(model), expected, strict=True):
            assert np.array_equal(a, b)


def test_what_is_rewritten_while_loading_stays(tmp_path: Path) -> None:
    check(write_model(tmp_path / "m.gguf", ["Q8_0", EXPANDED[0]]))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A model of its own to a test, of 2 MB."""
    return write_model(tmp_path / "m.gguf", ["Q8_0", "F16"])


@pytest.fixture
def streaming(copy: Path) -> Iterator[Model]:
    with headrace.load(copy, memory=budgets(copy)[1], context=CONTEXT, threads=2) as model:
        yield model


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("headrace-read")]


def logits(model: Model) -> np.ndarray:
    return model.logits(list(range(20)), last=3)


def put_back(path: Path, data: bytes, stamp: os.stat_result) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_a_file_that_shrinks_and_comes_back(copy: Path, streaming: Model) -> None:
    expected = logits(streaming)
    data, stamp = copy.read_bytes(), copy.stat()
    os.truncate(copy, len(data) // 2)
    for _ in range(2):
        with pytest.raises(ModelFileError, match=r"the file changed|the file shrank") as caught:
            logits(streaming)
        assert caught.value.path == copy
    put_back(copy, data, stamp)
    assert np.array_equal(logits(streaming), expected)


def test_a_file_that_is_written_to(copy: Path, streaming: Model) -> None:
    expected = logits(streaming)
    data, stamp = copy.read_bytes(), copy.stat()
    at = len(data) // 2
    with open(copy, "r+b") as file:  # a few bytes anywhere
        file.seek(at)
        file.write(bytes(byte ^ 255 for byte in data[at : at + 64]))
    os.utime(copy, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    for _ in range(2):
        with pytest.raises(ModelFileError, match="written to"):
            logits(streaming)
        assert not readers()  # nothing of it is left in the window
    put_back(copy, data, stamp)
    assert np.array_equal(logits(streaming), expected)


def test_a_file_that_changes_during_a_pass(
    copy: Path, streaming: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(streaming)
    data, stamp = copy.read_bytes(), copy.stat()
    walk = Model._walk

    def meanwhile(self: Model, *rest: Any) -> bool:
        done = walk(self, *rest)
        os.utime(copy, ns=(1, 1))
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Model, "_walk", meanwhile)
        with pytest.raises(ModelFileError, match="written to"):
            streaming.read_tokens([1, 2, 3])
    assert streaming._kept == []
    put_back(copy, data, stamp)
    assert np.array_equal(logits(streaming), expected)


def test_a_file_that_is_replaced_or_gone_does_not_matter(copy: Path, tmp_path: Path) -> None:
    least, middle, most = budgets(copy)
    other = tmp_path / "other.gguf"
    with headrace.load(copy, context=CONTEXT, threads=2) as model:
        expected = logits(model)
    other.write_bytes(bytes(copy.stat().st_size))
    with headrace.load(copy, memory=middle, context=CONTEXT, threads=2) as model:
        other.rename(copy)  # what the name leads to now is no model at all
        assert np.array_equal(logits(model), expected)
        model.memory = most
        assert np.array_equal(logits(model), expected)
        copy.unlink()
        model.memory = least + 200_000
        assert np.array_equal(logits(model), expected)


def test_a_read_that_fails_once_is_made_again(streaming: Model) -> None:
    expected = logits(streaming)
    window = streaming._held.streaming.window
    window.halt()
    files = window._direct if window.mode.direct else window._plain
    good = int(files[len(files) // 2])
    files[len(files) // 2] = 987654  # no descriptor: the system says EBADF
    with pytest.warns(RuntimeWarning, match=r"reads of .* failed and were made again"):
        assert np.array_equal(logits(streaming), expected)
    assert window.flow.mended_reads >= 1
    files[len(files) // 2] = good


def test_a_disk_that_fails_ends_in_an_exception(streaming: Model) -> None:
    expected = logits(streaming)
    window = streaming._held.streaming.window
    (file,) = window._files.values()
    window.halt()
    window._plain[:] = window._direct[:] = 987654
    write_only = os.open(os.devnull, os.O_WRONLY)
    there = os.dup(file.plain.fileno())
    file.check = lambda: None
    os.dup2(write_only, file.plain.fileno())  # reading from it is an error of the system
    for _ in range(2):
        with pytest.raises(ModelFileError, match="read failed") as caught:
            logits(streaming)
        assert caught.value.tensor is not None and caught.value.offset is not None
        assert not readers()
    os.dup2(there, file.plain.fileno())
    assert np.array_equal(logits(streaming), expected)
    os.close(write_only)
    os.close(there)


@pytest.mark.parametrize("times", [1e-3, 1e3])
def test_a_plan_follows_what_the_disk_gives(times: float, streaming: Model) -> None:
    """The machine may have been busy in the moment when it was measured, or idle for once."""
    held = streaming._held
    assert held._rates.flash is not None
    believed = {
        mode: replace(rate, bytes_s=rate.bytes_s * times)
        for mode, rate in held._rates.flash.items()
    }
    held._rates = replace(held._rates, flash=believed)
    held._revision = Revision(believed)
    held.plan = memory_plan(streaming.prepared, held._rates)
    at_first = streaming.plan.flash_read_gb_s
    assert at_first is not None
    for _ in range(1000):  # several for each way to read
        streaming.logits([1, 2, 3])
        found = streaming.plan.flash_read_gb_s
        assert found is not None
        if found > 1.5 * at_first if times < 1 else found < at_first / 1.5:
            break
    else:
        pytest.fail(f"still {found} GB/s, as at first")


def test_cancelling_and_going_on(streaming: Model) -> None:
    expected = logits(streaming)
    for delay in (0.0, 0.001, 0.003):
        timer = threading.Timer(delay, streaming.cancel)
        timer.start()
        with contextlib.suppress(CancelledError):
            while timer.is_alive():
                logits(streaming)
        timer.join()
        assert np.array_equal(logits(streaming), expected)


def test_nothing_is_left_of_a_closed_model(copy: Path) -> None:
    before, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with headrace.load(copy, memory=budgets(copy)[0], context=CONTEXT) as model:
            logits(model)
            assert readers()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    assert len(os.listdir("/proc/self/fd")) == fds


def test_memory_changes_while_loaded(copy: Path) -> None:
    least, middle, most = budgets(copy)
    with headrace.load(copy, context=CONTEXT, threads=2) as model:
        expected = logits(model)
        whole = model.memory
        kept = model.plan.resident_weights
        with pytest.raises(BudgetError, match="the least that works") as caught:
            model.memory = 1
        least = caught.value.needed_bytes  # more than at first: longer chunks may be read
        for memory in (most, least, middle, most, whole, least, whole):
            model.memory = memory
            assert model.memory == memory
            assert model.plan.peak_bytes <= memory
            assert model.streams == (memory < whole)
            assert np.array_equal(logits(model), expected)
        assert model.plan.resident_weights == kept
        assert np.array_equal(logits(model), expected)


def test_shrinking_fails_where_the_file_is_another(copy: Path) -> None:
    middle = budgets(copy)[1]
    data = copy.read_bytes()
    with headrace.load(copy, context=CONTEXT, threads=2) as model:
        expected = logits(model)
        stamp = copy.stat()
        copy.write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelFileError, match="the file changed"):
            model.memory = middle
        assert np.array_equal(logits(model), expected)  # all of it is still in memory
        copy.unlink()
        with pytest.raises(HeadraceError):
            model.memory = middle
        assert np.array_equal(logits(model), expected)
        put_back(copy, data, stamp)
        model.memory = middle
        assert np.array_equal(logits(model), expected)


def test_growing_fails_where_the_file_is_bad(copy: Path) -> None:
    least, middle, most = budgets(copy)
    data = copy.read_bytes()
    with headrace.load(copy, memory=least, context=CONTEXT, threads=2) as model:
        expected = logits(model)
        stamp = copy.stat()
        os.truncate(copy, len(data) // 2)
        with pytest.raises(ModelFileError):
            model.memory = most
        assert model.memory == least
        put_back(copy, data, stamp)
        assert np.array_equal(logits(model), expected)
        model.memory = middle
        assert np.array_equal(logits(model), expected)


def test_text_is_kept_over_a_change(copy: Path) -> None:
    most = budgets(copy)[2]
    with headrace.load(copy, context=CONTEXT) as model:
        model.read_tokens(list(range(10)))
        model.read_tokens([10], 10)
        expected = model._read([11], 11).copy()
        model.memory = most
        assert np.array_equal(model._read([11], 11), expected)


def test_weights_that_cannot_stream_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", [EXPANDED[0]])
    with pytest.raises(BudgetError, match="headrace compress"):
        headrace.load(path, memory="100MB", context=CONTEXT)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_was_loaded_streaming_may_grow_whole(tied: bool, tmp_path: Path) -> None:
    path = FAMILIES["gemma2"] if tied else write_model(tmp_path / "m.gguf", ["Q8_0", "F16"])
    with headrace.load(path, context=CONTEXT, threads=2) as model:
        expected = results(model)
        whole = model.memory
    with headrace.load(path, memory=budgets(path)[0], context=CONTEXT, threads=2) as model:
        model.memory = whole
        assert not model.streams
        for a, b in zip(results(model), expected, strict=True):
            assert np.array_equal(a, b)
        for i in range(0, model.vocabulary, 7):
            assert np.isfinite(model.logits([i])).all()


def test_a_generation_goes_on_over_a_change() -> None:
    stories = Path(__file__).parent / "data" / "stories260K.gguf"
    with headrace.load(stories, context=CONTEXT, threads=2) as model:
        text = model.generate("Once upon a time", raw=True, max_tokens=20).text()
        whole = model.memory
        generation = model.generate("Once upon a time", raw=True, max_tokens=20)
        pieces_found = [next(generation)]
        model.memory = whole - 200_000
        assert model.streams
        pieces_found.append(next(generation))
        model.memory = whole
        assert "".join([*pieces_found, *generation]) == text


def test_given_back_memory_stays_away(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST_PIECE_BYTES", 64 << 10)
    with headrace.load(copy, context=CONTEXT, threads=2) as model:
        model.memory = budgets(copy)[2]
        place = max(model._held.weights._spare.values(), key=lambda place: place.n_bytes)
        assert place.n_bytes > 3 * 4096
        first = place.address // 4096 * 4096 + 4096
        with open("/proc/self/smaps") as file:
            area, flags = (0, 0), ""
            for line in file:
                head = line.split()[0]
                if "-" in head and not head.endswith(":"):
                    area = tuple(int(one, 16) for one in head.split("-"))  # type: ignore[assignment]
                elif line.startswith("VmFlags:") and area[0] <= first < area[1]:
                    flags = line
        assert " nh" in flags or " hg" not in flags  # no huge pages are made of it


def test_readers_that_cannot_start(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with headrace.load(copy, memory=budgets(copy)[1], context=CONTEXT, threads=2) as model:
        expected = logits(model)
        model._held.streaming.window.halt()
        start, started = threading.Thread.start, []

        def few(self: threading.Thread) -> None:
            if self.name.startswith("headrace-read"):
                if len(started) >= most:
                    raise RuntimeError("can't start new thread")
                started.append(self)
            start(self)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", few)
            most = 0
            with pytest.raises(HeadraceError, match="no thread to read with"):
                logits(model)
            most = 1
            assert np.array_equal(logits(model), expected)
        model._held.streaming.window.halt()
        assert np.array_equal(logits(model), expected)


class Interrupt(Exception):
    """What a signal handler raises in the middle of anything."""


def interrupted(seconds: float, work: Callable[[], object]) -> None:
    """Do `work`, into which a signal comes after so long, if it is not over before."""

    def handler(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with contextlib.suppress(Interrupt):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals here")
def test_interrupts_leave_memory_and_readers_whole(copy: Path) -> None:
    least, middle, most = budgets(copy)
    random = np.random.default_rng(0)
    with headrace.load(copy, memory=most, context=CONTEXT, threads=2) as model:
        expected = logits(model)
        for i in range(24):
            budget = (least, most, middle)[i % 3]
            change = partial(setattr, model, "memory", budget)
            interrupted(float(random.uniform(1e-4, 0.03)), change)
            assert np.array_equal(logits(model), expected)
        model.memory = middle  # whatever the last interrupt left
        for _ in range(24):
            model._held.streaming.window.halt()  # the next pass starts readers
            interrupted(float(random.uniform(1e-5, 0.004)), partial(logits, model))
            assert np.array_equal(logits(model), expected)
        assert len(readers()) <= model._held.streaming.window.mode.readers
    assert not readers()


def test_memory_may_be_set_while_another_thread_reads(copy: Path) -> None:
    least, middle, most = budgets(copy)
    with headrace.load(copy, memory=middle, context=CONTEXT, threads=2) as model:
        expected = results(model)
        errors: list[BaseException] = []
        over = threading.Event()

        def supervise() -> None:
            try:
                while not over.is_set():
                    for memory in (least, most, middle):
                        model.memory = memory
                        over.wait(0.02)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            for _ in range(3):
                for a, b in zip(results(model), expected, strict=True):
                    assert np.array_equal(a, b)
        finally:
            over.set()
            thread.join()
        assert not errors


@pytest.mark.parametrize("budget", [None, 1])
def test_a_file_that_is_replaced_before_it_is_loaded(copy: Path, budget: int | None) -> None:
    memory = budgets(copy)[1] if budget else None
    prepared = prepare(copy, context=CONTEXT, threads=2, target=None, budget=memory)
    other = copy.with_name("other.gguf")
    other.write_bytes(copy.read_bytes())
    os.utime(other, ns=(1, 1))
    other.rename(copy)
    with pytest.raises(ModelFileError, match="the file changed"):
        Model(prepared, None)
    assert not readers()


def test_logits_that_are_scored_are_counted(copy: Path) -> None:
    plain = prepare(copy, context=CONTEXT, threads=2, target=None)
    scored = prepare(copy, context=CONTEXT, threads=2, target=None, logits_rows=100)
    more = sum(scored.parts.values()) - sum(plain.parts.values())
    assert more == (100 * 4 + plain.target.most_tokens) * plain.decoder.vocabulary * 4
    assert refit(scored, None).parts == scored.parts


def test_neither_steps_nor_changes_wait_without_end(copy: Path) -> None:
    least = budgets(copy)[0]
    over = threading.Event()
    changes = [0, 0]
    with headrace.load(copy, memory=least + 400_000, context=CONTEXT, threads=2) as model:
        expected = logits(model)

        def change(index: int) -> None:
            while not over.is_set():
                model.memory = least + 200_000 * (1 + index)
                changes[index] += 1

        threads = [threading.Thread(target=change, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        try:
            before = list(changes)
            for _ in range(10):
                assert np.array_equal(logits(model), expected)
            assert all(now > then for now, then in zip(changes, before, strict=True))
        finally:
            over.set()
            for thread in threads:
                thread.join()
