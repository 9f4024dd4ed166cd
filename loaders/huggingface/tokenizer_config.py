"""What the files around tokenizer.json say: special tokens, ends of answers, the chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headrace.errors import ModelFileError
from headrace.loaders.folder import Folder
from headrace.loaders.huggingface.config import Config
from headrace.loaders.layout import AGAIN

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"
MAX_BYTES = 16 << 20  # tokenizer_config.json of Gemma 3 has 1 MB
MAX_TEMPLATE_BYTES = 1 << 20
MAX_ENDS = 64


@dataclass
class Settings:
    """What was found.

    Attributes:
        tokens: texts of the tokens "bos", "eos", "unk" and "pad", those that there are.
        add: whether "bos" and "eos" are added to a text; None: as tokenizer.json says.
        end_ids: ids that end an answer.
        bos_ids: ids that begin a text, by the model's configs.
    """

    tokens: dict[str, str] = field(default_factory=dict)
    add: dict[str, bool | None] = field(default_factory=dict)
    end_ids: list[int] = field(default_factory=list)
    bos_ids: list[int] = field(default_factory=list)
    chat_template: str | None = None


def read_settings(folder: Folder, config: Config) -> Settings:
    """Read what there is of the files around tokenizer.json.

    Raises:
        ModelFileError: one is corrupt.
    """

    def optional(name: str) -> Config:
        values = folder.json(name, MAX_BYTES) if folder.has(name) else {}
        return Config(values, folder.path / name)

    own, special, generation = map(optional, (TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION_CONFIG))
    settings = Settings()
    for name in ("bos", "eos", "unk", "pad"):
        text = _text(own, f"{name}_token") or _text(special, f"{name}_token")
        if text:
            settings.tokens[name] = text
        if name in ("bos", "eos"):
            settings.add[name] = own.get(f"add_{name}_token", bool, None)
    for source in (generation, config):
        ends = _ids(source, "eos_token_id")
        settings.end_ids += [n for n in ends if n not in settings.end_ids]
        settings.bos_ids += _ids(source, "bos_token_id")
    settings.chat_template = _template(folder, own)
    return settings


def _text(source: Config, key: str) -> str | None:
    value = source.values.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise source.bad(key, f"is {str(value)[:60]}, expected a token")
    return value


def _ids(source: Config, key: str) -> list[int]:
    value = source.values.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > MAX_ENDS or not all(type(n) is int and 0 <= n < 1 << 31 for n in values):
        raise source.bad(key, f"is {str(value)[:60]}, expected token ids")
    return values


def _template(folder: Folder, own: Config) -> str | None:
    if folder.has(TEMPLATE):
        try:
            return folder.read(TEMPLATE, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFileError(f"not UTF-8; {AGAIN}", path=folder.path / TEMPLATE) from None
    value: Any = own.values.get("chat_template")
    if isinstance(value, list):  # of several, by name
        named = {
            one.get("name"): one.get("template")
            for one in value
            if isinstance(one, dict) and isinstance(one.get("name"), str)
        }
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise own.bad("chat_template", f"is {type(value).__name__}, expected a text")
    return value
