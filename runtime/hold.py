"""Who uses a model: one thread at a time, whatever interrupts it.

A lock that an interrupt parts from its owner (between taking it and saying so) stays locked for
good. A hold instead names the frame that took it: when that frame is on no stack any more, the hold
is void.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from types import FrameType

_numbers = itertools.count()


class Hold:
    """One use of something by a frame of this thread; later ones have larger numbers."""

    def __init__(self, frame: FrameType) -> None:
        self.number = next(_numbers)
        self.thread = threading.get_ident()
        self._frame: FrameType | None = frame

    def end(self) -> None:
        """Let go of the frame, which may well refer to this hold."""
        self._frame = None

    def comes_before(self, other: Hold) -> bool:
        """Is this one of another thread that asked earlier, and still asks?"""
        return self.number < other.number and self.thread != other.thread and not self.is_void()

    def is_void(self) -> bool:
        """Has the frame that took it gone, without giving it back? (Or its thread, by a fork.)"""
        at = sys._current_frames().get(self.thread)
        while at is not None:
            if at is self._frame:
                return False
            at = at.f_back
        return True


class Holder:
    """Holds at most one `Hold` at a time."""

    def __init__(self) -> None:
        self._held: dict[str, Hold] = {}

    def take(self, hold: Hold) -> Hold:
        """The hold that there is now: the new one, or the one that stands in its way."""
        while True:
            # One step of the interpreter, which no interrupt can cut in two.
            found = self._held.setdefault("", hold)
            if found is hold or not found.is_void():
                return found
            self.give_back(found)

    def give_back(self, hold: Hold) -> None:
        """End a hold; nothing happens if it is not the present one."""
        if self._held.get("") is hold:
            self._held.pop("", None)
        hold.end()

    def is_taken(self) -> bool:
        """Is there a hold?"""
        return bool(self._held)

    def wait(self, hold: Hold) -> bool:
        """Take it as soon as it is free; False if this thread itself holds it further up."""
        while (found := self.take(hold)) is not hold:
            if found.thread == hold.thread:
                return False
            time.sleep(0.001)
        return True
