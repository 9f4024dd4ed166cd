"""A conversation with a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from headrace.arguments import one_text
from headrace.generation import Generation
from headrace.sampling import SamplingParams

if TYPE_CHECKING:
    from headrace.model import Model


class Chat:
    """A conversation with a model: `send` a message, iterate over the answer.

    The part of the conversation that the model has read already is not read again.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": one_text("system", system)})

    def send(
        self,
        text: str,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        lookup: bool | None = None,
        draft: Model | Literal["self"] | None = None,
    ) -> Reply:
        """Say something; the answer is generated as the result is iterated over.

        Arguments and errors are those of `Model.generate`. A message whose answer was cut short
        stays in the conversation with what there was of it; one that fails before is taken back.
        """
        messages = [*self.messages, {"role": "user", "content": one_text("text", text)}]
        ids = self._model.tokenize_chat(messages)
        params = SamplingParams(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed)
        generation = Generation(
            self._model, ids, max_tokens, params, stop, reuse=True, lookup=lookup, draft=draft
        )
        return Reply(self, messages, generation)


class Reply:
    """An answer of a chat: an iterator over its pieces, which end up in the conversation."""

    def __init__(self, chat: Chat, messages: list[dict[str, str]], generation: Generation) -> None:
        self._chat = chat
        self._last = chat.messages  # the conversation as this reply knows it
        self._messages = messages
        self._generation = generation
        self._answer = ""
        self.stats = generation.stats
        self.lookup = generation.lookup

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            piece = next(self._generation)
        except StopIteration:
            self._keep("")  # an answer may have no text
            raise
        self._keep(piece)
        return piece

    def _keep(self, piece: str) -> None:
        self._answer += piece
        # What was said since is not taken back by an older reply.
        if self.stats.new_tokens and self._chat.messages is self._last:
            answer = {"role": "assistant", "content": self._answer}
            self._last = self._chat.messages = [*self._messages, answer]

    def text(self) -> str:
        """The rest of the answer as one string."""
        return "".join(self)
