"""One answer of a model: an iterator over its text."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headrace.arguments import texts, whole
from headrace.detokenizer import Detokenizer
from headrace.errors import BusyError, CancelledError
from headrace.sampling import Sampler, SamplingParams, StopMatcher

if TYPE_CHECKING:
    from headrace.model import Model

FinishReason = Literal["eos", "length", "stop", "cancelled"]


@dataclass
class Stats:
    """How a generation went. Times in seconds; `prefill_s` ends with the first token's logits."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: FinishReason | None = None


class Generation:
    """An iterator over pieces of generated text; `stats` and `ids` tell how it went.

    The prompt is read when the first piece is asked for.
    """

    def __init__(
        self, model: Model, ids: list[int], max_tokens: int, params: SamplingParams,
        stop: str | Sequence[str], *, reuse: bool,
    ) -> None:  # fmt: skip
        ids = model._checked(ids)
        max_tokens = whole("max_tokens", max_tokens, low=1)
        # Not the generation itself: the model would keep it, and it keeps the model.
        self._owner = object()
        self._cancels = model._cancels  # a `cancel` from here on ends this generation
        self.stats = Stats(prompt_tokens=len(ids))
        self.ids: list[int] = []
        self._model = model
        self._matcher = StopMatcher(texts("stop", stop))
        self._sampler = Sampler(params)
        self._pieces = self._run(ids, max_tokens, reuse)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except ValueError as error:
            if "already executing" in str(error):  # in another thread
                raise BusyError("this generation is being read by another thread") from error
            raise

    def close(self) -> None:
        """End it here."""
        self._pieces.close()
        if self.stats.finish_reason is None:
            self.stats.finish_reason = "cancelled"

    def text(self) -> str:
        """The rest of the text as one string."""
        return "".join(self)

    def _first(self, prompt: list[int], reuse: bool) -> int:
        model, began = self._model, time.perf_counter()
        with model._begin(self._owner, self._cancels):
            # What is in the cache may be counted on only now that nobody else can change it.
            start = _common_prefix(model._kept, prompt[:-1]) if reuse else 0
            self.stats.reused_tokens = start
            token = self._sampler.sample(model._read(prompt[start:], start), self._recent)
        self.stats.prefill_s = time.perf_counter() - began
        return token

    def _next(self, token: int, position: int) -> int:
        model, began = self._model, time.perf_counter()
        with model._resume(self._owner):
            chosen = self._sampler.sample(model._read([token], position), self._recent)
        self.stats.decode_s += time.perf_counter() - began
        return chosen

    def _run(self, prompt: list[int], max_tokens: int, reuse: bool) -> Generator[str, None, None]:
        model, stats = self._model, self.stats
        detokenizer = Detokenizer(model.tokenizer, after=prompt[-1])
        self._recent = list(prompt)
        try:
            token = self._first(prompt, reuse)
            position = len(prompt)
            while True:
                self.ids.append(token)
                self._recent.append(token)
                stats.new_tokens += 1
                if token in model.tokenizer.eos_ids:
                    stats.finish_reason = "eos"
                    break
                piece = self._matcher.push(detokenizer.push(token))
                if piece:
                    yield piece
                if self._matcher.stopped:
                    stats.finish_reason = "stop"
                    return
                if stats.new_tokens >= max_tokens or position >= model.context:
                    stats.finish_reason = "length"
                    break
                token = self._next(token, position)
                position += 1
        except CancelledError:
            stats.finish_reason = "cancelled"
        rest = self._matcher.push(detokenizer.finish()) + self._matcher.finish()
        if rest:
            yield rest


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
