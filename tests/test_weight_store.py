"""Weights of a network in memory: shared by key, and given back one by one."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest

from headrace.available import resident_bytes
from headrace.networks.operation import Weight
from headrace.networks.weight_store import Held, WeightStore

SIZE = 24 << 20


def weight(value: int, key: str | None, n_bytes: int = SIZE) -> Weight:
    return Weight(n_bytes, lambda: np.full(n_bytes, value, np.uint8), key=key)


def content(held: Held) -> set[int]:
    return set(np.frombuffer(ctypes.string_at(held.base, held.n_bytes), np.uint8).tolist())


def test_one_memory_for_one_key() -> None:
    store = WeightStore()
    a, b, c, again, d = store.placed(
        [weight(1, "a", 100), weight(2, None, 100), weight(3, None, 1), weight(1, "a", 100),
         weight(4, "d", 0)]
    )  # fmt: skip
    assert a is again and len({one.base % 64 for one in (a, b, c, d)}) == 1
    assert [content(one) for one in (a, b, c, d)] == [{1}, {2}, {3}, set()]
    (other,) = WeightStore().placed([weight(1, "a", 100)])
    assert other.base != a.base
    (shared, new) = store.placed([weight(1, "a", 100), weight(5, "e", 100)])
    assert shared is a and content(new) == {5}


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_each_weight_goes_with_the_last_that_holds_it() -> None:
    store = WeightStore()
    first = store.placed([weight(i, str(i)) for i in range(4)])
    second = store.placed([weight(2, "2"), weight(9, None)])
    assert second[0] is first[2]
    before = resident_bytes()
    del first
    gone = before - resident_bytes()
    assert 2.9 * SIZE < gone < 3.1 * SIZE
    assert content(second[0]) == {2} and content(second[1]) == {9}
    (again,) = store.placed([weight(7, "0")])  # it is made anew
    assert content(again) == {7}


def test_what_cannot_be_made_is_held_by_nobody() -> None:
    def fails() -> np.ndarray:
        raise ValueError("no")

    store = WeightStore()
    with pytest.raises(ValueError, match="no"):
        store.placed([weight(1, "a", 100), Weight(100, fails, key="b")])
    (found,) = store.placed([weight(2, "b", 100)])
    assert content(found) == {2}
