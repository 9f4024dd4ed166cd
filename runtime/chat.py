"""Chat messages to the prompt text that a model was trained on.

The template comes from the model file, so it is hostile until proven otherwise: it runs in
jinja2's immutable sandbox with bounds on steps, seconds and characters. It is compiled only when
a conversation is rendered, so a broken template never keeps a model from loading, and jinja2 is
imported only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.errors import TemplateError

if TYPE_CHECKING:
    from headrace.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 1 << 17  # Gemma 4's, a long one, has 12,000

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def has_template(metadata: Mapping[str, Any]) -> bool:
    """Whether `ChatTemplate.from_metadata` finds one, by the header alone."""
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    return "tokenizer.chat_template" in metadata or "<|im_start|>" in tokens


class ChatTemplate:
    """A model's chat template.

    Args:
        source: Jinja source, as in `tokenizer.chat_template`.
        bos_token: Text of the BOS token, "" if there is none.
        eos_token: Text of the EOS token, "" if there is none.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled: Any = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a GGUF file, or ChatML when it has none but knows `<|im_start|>`.

        Raises:
            TemplateError: There is no template to use.
        """
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            if tokenizer.id_of("<|im_start|>") is None:
                raise TemplateError(
                    "the model file has no chat template (tokenizer.chat_template): it is probably"
                    " a base model; use --raw to continue plain text"
                )
            source = CHATML
        if not isinstance(source, str):
            raise TemplateError(
                f"tokenizer.chat_template is {type(source).__name__}, expected a string; use --raw"
            )
        texts = [
            "" if token is None else tokenizer.token_bytes(token).decode("utf-8", "replace")
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        ]
        return cls(source, *texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Write a conversation as a prompt.

        The text usually begins with the BOS token already: encode it with `add_special=False`.

        Args:
            messages: Dictionaries with "role" and "content".
            add_generation_prompt: End with the header of the assistant's answer.
            extra: Further variables for the template (`tools`, `enable_thinking`, ...).

        Raises:
            TemplateError: The template is broken, refuses the messages, or breaks a limit of the
                sandbox; the message has its line number.
        """
        if len(self.source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has {len(self.source)} characters, more than"
                f" {MAX_SOURCE_CHARS}; use --raw"
            )
        from headrace import chat_sandbox

        if self._compiled is None:
            self._compiled = chat_sandbox.compile_template(self.source)
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._tokens,
            **extra,
        }
        return chat_sandbox.render(self._compiled, variables)
