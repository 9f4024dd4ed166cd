"""Metadata as the bytes of a GGUF header, for models that did not come with any."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from headrace.loaders.model_file import StringArray
from headrace.loaders.value_types import ARRAY, BOOL, STRING

INT32, FLOAT32, INT64, FLOAT64 = 5, 6, 11, 12


def encode_key(key: str, value: Any) -> bytes:
    """A key with its value: str, bool, int, float, `StringArray`, or an array of int32 or float32.

    Numbers take 64 bits, so that none is rounded.
    """
    if isinstance(value, str):
        kind, raw = STRING, _string(value)
    elif isinstance(value, bool):
        kind, raw = BOOL, bytes((value,))
    elif isinstance(value, int):
        kind, raw = INT64, struct.pack("<q", value)
    elif isinstance(value, float):
        kind, raw = FLOAT64, struct.pack("<d", value)
    elif isinstance(value, StringArray):
        kind, raw = ARRAY, struct.pack("<IQ", STRING, len(value)) + value.packed
    elif isinstance(value, np.ndarray) and value.dtype in (np.int32, np.float32):
        item = INT32 if value.dtype == np.int32 else FLOAT32
        little = value.astype(value.dtype.newbyteorder("<"))
        kind, raw = ARRAY, struct.pack("<IQ", item, len(value)) + little.tobytes()
    else:
        raise TypeError(f"{key}: no value of a header: {type(value).__name__}")
    return _string(key) + struct.pack("<I", kind) + raw


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
