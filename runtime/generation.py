"""One answer of a model: an iterator over its text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headrace.arguments import switch, texts, whole
from headrace.detokenizer import Detokenizer
from headrace.draft import SELF, ModelDraft
from headrace.errors import BusyError, CancelledError, HeadraceError
from headrace.lookup import Lookup
from headrace.pace import MOST_DRAFTED, Acceptance, tokens_to_check
from headrace.sampling import Sampler, SamplingParams, StopMatcher

if TYPE_CHECKING:
    import numpy as np

    from headrace.model import Model

FinishReason = Literal["eos", "length", "stop", "cancelled", "error"]


@dataclass
class Stats:
    """How a generation went. Times in seconds; `prefill_s` ends with the first token's logits.

    Attributes:
        passes: forward passes after the prompt.
        finish_reason: None while it goes on; "error": an exception came out of it.
        accepted_tokens: new tokens that had been guessed, and so took no pass of their own.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    accepted_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def tokens_per_pass(self) -> float | None:
        """New tokens for each pass; the first comes out of the prompt's. None without a pass."""
        return (self.passes + self.accepted_tokens) / self.passes if self.passes else None


class Generation:
    """An iterator over pieces of generated text; `stats` and `ids` tell how it went.

    The prompt is read when the first piece is asked for. `lookup` says whether tokens are guessed.
    """

    def __init__(
        self, model: Model, ids: list[int], max_tokens: int, params: SamplingParams,
        stop: str | Sequence[str], *, reuse: bool, lookup: bool | None,
        draft: Model | Literal["self"] | None = None,
    ) -> None:  # fmt: skip
        ids = model._checked(ids)
        max_tokens = whole("max_tokens", max_tokens, low=1)
        # Not the generation itself: the model would keep it, and it keeps the model.
        self._owner = object()
        self._cancels = model._cancels  # a `cancel` from here on ends this generation
        self.stats = Stats(prompt_tokens=len(ids))
        self.ids: list[int] = []
        default = model.streams or draft is not None
        self.lookup = default if lookup is None else switch("lookup", lookup)
        self._text: Lookup | ModelDraft = Lookup()
        if draft is not None:
            if draft != SELF and not isinstance(draft, type(model)):
                raise TypeError(
                    f"draft must be a loaded model or 'self', not {type(draft).__name__}"
                )
            if draft == SELF and model.prepared.stack is None:
                raise ValueError("draft 'self' is for a stack of blocks, which this model is not")
            self._text = ModelDraft(draft, model)
        self._acceptance = Acceptance()
        self._model = model
        self._ahead: deque[int] = deque()  # chosen tokens whose turn comes next
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
            start = model._read_before(prompt[:-1]) if reuse else 0
            self.stats.reused_tokens = start
            token = self._choose(model._read(prompt[start:], start))
        self.stats.prefill_s = time.perf_counter() - began
        return token

    def _choose(self, logits: np.ndarray) -> int:
        token = self._sampler.sample(logits, self._recent)
        self._recent.append(token)
        return token

    def _next(self, token: int, position: int, most: int) -> int:
        """What follows `token`, which stands at `position`; `most` tokens may follow it."""
        model, began = self._model, time.perf_counter()
        with model._resume(self._owner):
            if self._ahead:
                model._accept(token, position)
                self.stats.accepted_tokens += 1
                chosen = self._ahead.popleft()
            elif self.lookup:
                chosen, *rest = self._pass(token, position, most)
                self._ahead.extend(rest)
            else:
                chosen = self._choose(model._read([token], position))
                self.stats.passes += 1
        self.stats.decode_s += time.perf_counter() - began
        return chosen

    def _pass(self, token: int, position: int, most: int) -> list[int]:
        """Read a token and what may follow it: the tokens that do follow, at most `most`.

        Each is chosen from the logits that it would have been chosen from without a draft.
        """
        model, began = self._model, time.perf_counter()
        draft = self._text.draft(min(most - 1, MOST_DRAFTED))
        n = tokens_to_check(draft, self._acceptance, model._pass_times)
        if n:
            rows = model._read_guessed([token, *draft.tokens[:n]], position)
        else:
            self._text.unread()
            rows = [model._read([token], position)]
        self.stats.passes += 1
        chosen: list[int] = []
        for i, row in enumerate(rows):
            try:
                chosen.append(self._choose(row))
            except HeadraceError:  # the tokens before it are good: it fails again in its turn
                if not chosen:
                    raise
                break
            if i == n or chosen[-1] != draft.tokens[i] or chosen[-1] in model.tokenizer.eos_ids:
                break
        for one in chosen:
            self._text.push(one)
        self._acceptance.add(draft, chosen)
        model._pass_times.add(n + 1, time.perf_counter() - began)
        return chosen

    def _run(self, prompt: list[int], max_tokens: int, reuse: bool) -> Generator[str, None, None]:
        model, stats = self._model, self.stats
        detokenizer = Detokenizer(model.tokenizer, after=prompt[-1])
        self._recent = list(prompt)
        try:
            token = self._first(prompt, reuse)
            position = len(prompt)
            if self.lookup:
                for one in self._recent:
                    self._text.push(one)
            while True:
                self.ids.append(token)
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
                most = min(max_tokens - stats.new_tokens, model.context - position)
                token = self._next(token, position, most)
                position += 1
        except CancelledError:
            stats.finish_reason = "cancelled"
        except Exception:
            stats.finish_reason = "error"  # the next look finds no more text, and why
            raise
        rest = self._matcher.push(detokenizer.finish()) + self._matcher.finish()
        if rest:
            yield rest


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
