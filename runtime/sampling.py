"""Choosing the next token, and stopping at a string."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.arguments import number, whole
from headrace.errors import HeadraceError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; larger is more varied.
        top_k: Keep only that many most likely tokens; 0 keeps all.
        top_p: Keep the fewest tokens whose probability sums to this; 1 keeps all.
        min_p: Drop tokens less likely than this share of the most likely one; 0 keeps all.
        repeat_penalty: Divide positive logits of recent tokens by this, multiply negative ones;
            1 does nothing.
        repeat_window: How many recent tokens are penalised; 0 for none.
        seed: The same seed gives the same text; None is different every time.

    Raises:
        TypeError, ValueError: A value is of the wrong type, or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_window: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repeat_penalty"):
            number(name, getattr(self, name))
        for name in ("top_k", "repeat_window", "seed"):
            if name != "seed" or self.seed is not None:
                whole(name, getattr(self, name), low=0)
        for name, valid, wanted in (
            (
                "temperature",
                self.temperature == 0.0 or 1e-3 <= self.temperature <= 1e3,
                "0 (greedy), or from 0.001 to 1000",
            ),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (off)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 (off) to 1"),
            ("repeat_penalty", 0.01 <= self.repeat_penalty <= 100, "from 0.01 to 100 (1 is off)"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {wanted}")


class Sampler:
    """Chooses tokens; in the order of llama.cpp: penalty, top-k, top-p, min-p, temperature."""

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = SamplingParams() if params is None else params
        self._random = np.random.default_rng(self.params.seed)
        self._scratch = np.empty(0, np.float32)

    def sample(self, logits: np.ndarray, recent_ids: Sequence[int] = ()) -> int:
        """The next token; `logits` is left as it is.

        Args:
            logits: float32 [n_vocab].
            recent_ids: Tokens so far, oldest first; only the penalty looks at them.

        Raises:
            HeadraceError: The largest logit is not a finite number.
        """
        params = self.params
        if params.repeat_penalty != 1.0 and params.repeat_window and len(recent_ids):
            logits = self._penalised(logits, recent_ids)
        # NaN counts as the largest for argmax, so one look at the result finds it.
        best = int(logits.argmax())
        largest = float(logits[best])
        if not math.isfinite(largest):
            raise HeadraceError(
                f"the model computed logits without a finite maximum ({largest} at token {best});"
                " the weights are damaged; download the model again, or try another --target"
            )
        if params.temperature == 0.0 or params.top_k == 1:
            return best
        ids, values = self._candidates(logits, largest)
        if len(values) == 1:
            return best if ids is None else int(ids[0])
        weights = np.exp((values - np.float32(largest)) / np.float32(params.temperature))
        index = _draw(weights, self._random.random())
        return index if ids is None else int(ids[index])

    def _penalised(self, logits: np.ndarray, recent_ids: Sequence[int]) -> np.ndarray:
        if self._scratch.shape != logits.shape:
            self._scratch = np.empty_like(logits)
        np.copyto(self._scratch, logits)
        recent = np.unique(np.asarray(recent_ids[-self.params.repeat_window :], np.int64))
        values = logits[recent]
        penalty = np.float32(self.params.repeat_penalty)
        self._scratch[recent] = np.where(values > 0, values / penalty, values * penalty)
        return self._scratch

    def _candidates(
        self, logits: np.ndarray, largest: float
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Ids (None: all of them) and logits that may be drawn."""
        params = self.params
        ids: np.ndarray | None = None
        values = logits
        if 0 < params.top_k < len(logits):
            ids, values = _largest(logits, params.top_k)
        if params.top_p < 1.0:
            ids, values = _nucleus(ids, values, largest, params.top_p)
        if params.min_p > 0.0:
            kept = np.flatnonzero(values >= np.float32(largest + math.log(params.min_p)))
            ids = kept if ids is None else ids[kept]
            values = values[kept]
        return ids, values


def _draw(weights: np.ndarray, random: float) -> int:
    """The position at which the running sum of `weights` passes `random` of the total."""
    # Sums of blocks first: a running sum over a whole vocabulary costs more than the rest.
    starts = np.arange(0, len(weights), 256)
    blocks = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    wanted = random * blocks[-1]
    # Rounding may put the draw on the very end, here and inside the block.
    block = min(int(np.searchsorted(blocks, wanted, side="right")), len(blocks) - 1)
    inside = np.cumsum(weights[starts[block] : starts[block] + 256], dtype=np.float64)
    wanted -= blocks[block - 1] if block else 0.0
    index = min(int(np.searchsorted(inside, wanted, side="right")), len(inside) - 1)
    while weights[starts[block] + index] == 0.0:  # never a token that cannot be
        index -= 1
    return int(starts[block]) + index


def _largest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of the `count` largest, largest first, lowest position among equals."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    found = np.flatnonzero(values >= least)
    order = np.argsort(-values[found], kind="stable")[:count]
    found = found[order]
    return found, values[found]


def _nucleus(
    ids: np.ndarray | None, values: np.ndarray, largest: float, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The fewest likeliest tokens that make up `share` of the probability."""
    total = float(np.exp(values - np.float32(largest)).sum())
    count = min(len(values), 128)
    while True:  # sort only as many as it takes
        found, top = _largest(values, count)
        running = np.cumsum(np.exp(top - np.float32(largest)), dtype=np.float64)
        if running[-1] >= share * total or count == len(values):
            break
        count = min(len(values), count * 8)
    kept = int(np.searchsorted(running, share * total)) + 1
    found, top = found[:kept], top[:kept]
    return (found if ids is None else ids[found]), top


class StopMatcher:
    """Ends a stream of text at the first stop string, showing no part of it.

    Text that may be the beginning of a stop string is held back until that is decided. The first
    stop string to be complete wins, the longest among those complete at once; how the text was
    cut into pieces makes no difference.

    Attributes:
        matched: The stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise ValueError("stops is a string, expected a list of strings")
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing more comes out."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Add text; returns what may be shown now."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """End the stream; returns what was held back, "" after a stop."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(len(text), len(self._stops[0]) - 1), 0, -1):
            if any(len(stop) > size and stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
