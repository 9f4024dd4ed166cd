"""Model directories as Hugging Face's transformers writes them: a `ModelFile` from config.json,
tokenizer.json and safetensors files, with the keys and the tensor names of a GGUF file.

One file for each `model_type`. Weights are read where they lie: what GGUF's converter changes in
them (rotary pairs, norms) is said in metadata instead, and families obey.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.folder import Folder
from headrace.loaders.huggingface.common import Description
from headrace.loaders.huggingface.config import Config
from headrace.loaders.huggingface.float4 import PACKED, with_float4
from headrace.loaders.huggingface.float8 import check_quantization, with_scales
from headrace.loaders.huggingface.tokenizer import read_tokenizer
from headrace.loaders.model_file import ModelFile, TensorInfo
from headrace.loaders.safetensors import read_parts

CONFIG = "config.json"
MAX_CONFIG_BYTES = 4 << 20
_PARTS = ("common", "config", "float4", "float8", "tokenizer", "tokenizer_config", "pretokenizers")
_FILES = {"MoE++": "moepp"}  # of model types that no file can be called as
_GIVEN = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")


def names() -> list[str]:
    """The model types that have a file here."""
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PARTS]


def read_directory(path: str | Path) -> ModelFile:
    """Read and validate all but the weights of a model directory.

    Raises:
        ModelNotFoundError: a file is missing.
        UnsupportedError: a model type, tokenizer or type of weights that is not there.
        ModelFileError: a file is truncated, corrupt or hostile, or they contradict each other.
    """
    folder = Folder(Path(path))
    config = Config(folder.json(CONFIG, MAX_CONFIG_BYTES), folder.path / CONFIG)
    description = _describe(config)
    blocks = check_quantization(config)
    parts = read_parts(folder)
    tensors: dict[str, TensorInfo] = {}
    of_name: dict[str, str] = {}  # of the file
    given = with_float4([info for part in parts for info in part.tensors])
    for info in with_scales(given, blocks):
        name = description.gguf_name(info.name)
        where: dict[str, Any] = {"path": info.path, "tensor": info.name}
        if name is None:
            kind = config.get("model_type", str)
            raise UnsupportedError(f"no part of a {kind!r} model as Headrace knows it", **where)
        if not name:
            continue
        if name in tensors:
            raise ModelFileError(f"two tensors for one place: this and {of_name[name]!r}", **where)
        if info.type not in (*_GIVEN, PACKED):
            raise UnsupportedError(
                f"its type is {info.type}; Headrace reads {', '.join(_GIVEN)}", **where
            )
        of_name[name] = info.name
        tensors[name] = replace(info, name=name)
    if not description.tied and "output.weight" not in tensors:
        raise ModelFileError(
            "the model has no head ('lm_head.weight'), and its config does not tie it to the "
            "embedding: incomplete, or no language model",
            path=config.path,
        )
    embedding = tensors.get("token_embd.weight")
    rows = 0 if embedding is None else embedding.shape[0]
    metadata = {
        **description.metadata,
        "general.name": folder.path.resolve().name,
        **read_tokenizer(folder, config, rows),
    }
    return ModelFile(
        paths=(config.path, *(part.path for part in parts)),
        version=0,
        alignment=1,
        metadata=metadata,
        tensors=tensors,
        size_bytes=sum(part.size for part in parts),
        header_bytes=sum(part.header_bytes for part in parts),
    )


def _describe(config: Config) -> Description:
    kind = config.get("model_type", str)
    # The name comes from the file: it is looked up in a list, never imported as it is.
    file = _FILES.get(kind, kind)
    if kind == "bert":
        raise config.unsupported(
            "model_type", "is 'bert', a text encoder: `headrace embed DIRECTORY` runs it"
        )
    if not re.fullmatch(r"[a-z0-9_]{1,32}", file) or file not in names():
        raise config.unsupported(
            "model_type", f"is {kind[:64]!r}; these are supported: {', '.join(names())}"
        )
    description: Description = importlib.import_module(f"{__name__}.{file}").describe(config)
    return description
