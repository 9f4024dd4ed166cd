"""What is in a model file, from its header: `headrace inspect`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.loaders.gguf import TensorInfo
from headrace.loaders.tiled import format_name, open_model
from headrace.placing import format_of, group_format, padded16
from headrace.stack import is_block, is_first
from headrace.stack_price import shown_price


def describe_model(path: Path) -> dict[str, Any]:
    """What `headrace inspect` shows; only the header is read."""
    model = open_model(path)
    get = model.metadata.get
    vocabulary = get("tokenizer.ggml.tokens")
    types: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in model.tensors.values():
        loads_as, loaded_bytes = _how_it_loads(tensor)
        row = types.setdefault(
            (tensor.type, loads_as),
            {
                "type": tensor.type, "tensors": 0, "parameters": 0, "bytes": 0, "loaded_bytes": 0,
                "loads_as": loads_as,
            },
        )  # fmt: skip
        row["tensors"] += 1
        if not is_block(tensor) or is_first(tensor):
            row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.n_bytes
        row["loaded_bytes"] += loaded_bytes
    return {
        "file": str(path),
        "files": len(model.paths),
        "size_bytes": model.size_bytes,
        "gguf_version": model.version or None,
        "architecture": get("general.architecture"),
        "name": get("general.name"),
        "parameters": sum(row["parameters"] for row in types.values()),
        "tokenizer": get("tokenizer.ggml.model"),
        "pre_tokenizer": get("tokenizer.ggml.pre"),
        "vocabulary": len(vocabulary) if isinstance(vocabulary, Sequence) else None,
        "chat_template": "tokenizer.chat_template" in model.metadata,
        "price": shown_price(model),
        "types": sorted(types.values(), key=lambda row: -row["bytes"]),
        "metadata": {key: _shortened(value) for key, value in model.metadata.items()},
    }


def _how_it_loads(tensor: TensorInfo) -> tuple[str, int]:
    """(the kernel's format or what it is expanded to, bytes in memory)."""
    if is_block(tensor) or group_format(tensor):
        return "kernel", tensor.n_bytes
    try:
        fmt = format_of(tensor)
    except UnsupportedError:
        return "not supported", 0
    n = tensor.shape[-1]
    if len(tensor.shape) == 1:
        return "float32 vector", padded16(n) * 4
    how = "kernel" if fmt.ggml_type == tensor.type or format_name(tensor.type) else "expanded"
    n_bytes = fmt.tiled_bytes(math.prod(tensor.shape[:-1]), n)
    return (how if how == "kernel" else f"expanded to {fmt.ggml_type or fmt.name}"), n_bytes


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 2000 else {"characters": len(value), "first": value[:200]}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    if isinstance(value, int | float | bool):
        return value
    count = len(value)
    plain = value[:8].tolist() if isinstance(value, np.ndarray) else value[:8]
    first = [_shortened(one) for one in plain]
    return first if count <= 8 else {"count": count, "first": first}
