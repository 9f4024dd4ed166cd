"""Arenas: what they give, and what is said when the system gives nothing."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys

import pytest

from headrace.errors import BudgetError
from headrace.memory import ALIGNMENT, Arena


def test_pieces_are_aligned_zero_and_apart() -> None:
    arena = Arena({"a": 5, "b": 130, "c": 64})
    assert list(arena) == ["a", "b", "c"]
    assert arena.n_bytes == 64 + 192 + 64
    assert all(arena.address(name) % ALIGNMENT == 0 for name in arena)
    arena.view("b")[:] = 7
    assert not arena.view("a").any()
    assert not arena.view("c", "f4").any()


def test_a_view_keeps_the_mapping() -> None:
    view = Arena({"a": 1 << 20}).view("a")
    view[:] = 1
    assert view.sum() == 1 << 20


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(BudgetError, match=r"refuses 3\.00 GB of memory.*ulimit") as caught:
        Arena({"a": 3_000_000_000})
    assert caught.value.needed_bytes >= 3_000_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_an_address_space_that_is_too_small() -> None:
    code = (
        "import resource\nfrom headrace.memory import Arena\n"
        "from headrace.errors import BudgetError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try: Arena({'a': 8 << 30})\n"
        "except BudgetError as error: print(error.needed_bytes)"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert int(found) == 8 << 30


def test_a_change_to_huge_pages_drops_the_content() -> None:
    arena = Arena({"a": 5000, "b": 100}, huge=False)
    arena.view("a")[:] = 1
    arena.change_to_huge_pages()
    if hasattr(mmap, "MADV_DONTNEED"):
        assert not arena.view("a").any()
    arena.view("b")[:] = 2
    assert (arena.view("b") == 2).all()
