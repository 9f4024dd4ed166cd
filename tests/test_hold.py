"""One user of a model at a time, whatever interrupts it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import headrace
from headrace.errors import BusyError, HeadraceError
from headrace.hold import Hold, Holder

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"


def take_and_lose(holder: Holder) -> None:
    """As a KeyboardInterrupt right after taking it would."""
    hold = Hold(sys._getframe())
    assert holder.take(hold) is hold


def test_a_hold_whose_frame_is_gone_is_void() -> None:
    holder = Holder()
    take_and_lose(holder)
    thread = threading.Thread(target=take_and_lose, args=(holder,))
    thread.start()
    thread.join()
    mine = Hold(sys._getframe())
    assert holder.take(mine) is mine


def test_a_hold_that_is_used_stands_in_the_way() -> None:
    holder, mine = Holder(), Hold(sys._getframe())
    assert holder.wait(mine)
    found: list[Hold] = []

    def other() -> None:
        found.append(holder.take(Hold(sys._getframe())))

    other()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [mine, mine]
    assert not holder.wait(Hold(sys._getframe()))  # by this thread: it would wait for ever
    holder.give_back(mine)
    assert not holder.is_taken()


def test_a_model_closed_and_called_by_its_own_callback() -> None:
    model = headrace.load(STORIES)
    told: list[str] = []

    def progress(*_: object) -> None:
        with pytest.raises(BusyError, match="further up in this thread"):
            model.logits([1])
        model.close()
        told.append("closed")

    assert model.logits([1, 2], progress=progress).shape[0] == 2
    assert told
    with pytest.raises(HeadraceError, match="closed"):
        model.logits([1])
    with pytest.raises(HeadraceError, match="closed"), model:
        pass
    assert not [t for t in threading.enumerate() if t.name.startswith("headrace-")]


def test_an_older_reply_takes_nothing_back(smollm2_path: Path) -> None:
    with headrace.load(smollm2_path, context=1024) as model:
        chat = model.chat()
        old = chat.send("Tell a long story.", max_tokens=20)
        next(old)
        chat.send("What is 2+2?", max_tokens=4).text()
        said = chat.messages
        with pytest.raises(BusyError):
            next(old)
        assert chat.messages is said
        assert [m["role"] for m in said] == ["user", "assistant"] * 2
