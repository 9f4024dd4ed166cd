"""What sentence-transformers' files say of how token vectors become one vector of a text."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.folder import Folder
from headrace.loaders.huggingface.config import Config

MAX_BYTES = 1 << 20
MOST_TOKENS = 1 << 20
_MODES = {  # in the order in which sentence-transformers puts them beside each other
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}  # fmt: skip
_UNREAD = ("pooling_mode_weightedmean_tokens",)


@dataclass(frozen=True)
class Settings:
    """How texts are embedded.

    Attributes:
        pooling: "cls", "max", "mean", "mean_sqrt_len" or "last", or several beside each other.
        normalize: whether vectors get length 1.
        max_tokens: of a text with its special tokens; what is longer is cut.
        said: whether the model's files say so, and it is no assumption.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int = 512
    said: bool = False


def read_settings(folder: Folder) -> Settings:
    """From modules.json, the modules' own config.json, and sentence_bert_config.json.

    Raises:
        UnsupportedError: a module that is neither Transformer, Pooling nor Normalize.
        ModelFileError: a file is corrupt or hostile.
    """
    max_tokens = _max_tokens(folder)
    if not folder.has("modules.json"):
        return Settings(max_tokens=max_tokens)
    path = folder.path / "modules.json"
    import json

    try:
        modules = json.loads(folder.read("modules.json", MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"no JSON: {error}", path=path) from None
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ModelFileError("expected a list of modules; download the model again", path=path)
    pooling: tuple[str, ...] = ("mean",)
    normalize = False
    for module in modules:
        entry = Config(module, path)
        kind = entry.get("type", str).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder, entry.get("path", str))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedError(
                f"{path}: a module {kind[:40]!r}; read are Transformer, Pooling and Normalize"
            )
    return Settings(pooling, normalize, max_tokens, said=True)


def _pooling(folder: Folder, name: str) -> tuple[str, ...]:
    inner = Folder(folder.file(name, folder.path / "modules.json"))
    config = Config(inner.json("config.json", MAX_BYTES), inner.path / "config.json")
    if any(config.get(key, bool, False) for key in _UNREAD):
        raise UnsupportedError(f"{config.path}: {_UNREAD[0]!r} is not read")
    modes = tuple(mode for key, mode in _MODES.items() if config.get(key, bool, False))
    if not modes:
        raise ModelFileError("no mode of pooling is true", path=config.path)
    return modes


def _max_tokens(folder: Folder) -> int:
    found = []
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("config.json", "max_position_embeddings"),
    ):
        if folder.has(name):
            config = Config(folder.json(name, MAX_BYTES), folder.path / name)
            size = config.get(key, int, None, low=3, high=MOST_TOKENS)
            if size is not None:
                found.append(size)
    return min(found, default=Settings.max_tokens)
