"""Types of GGUF's metadata values, by the numbers that files have for them."""

from __future__ import annotations

import struct

UINT32, BOOL, STRING, ARRAY, UINT64, FLOAT64 = 4, 7, 8, 9, 10, 12

SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    UINT32: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    BOOL: struct.Struct("<B"),
    UINT64: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    FLOAT64: struct.Struct("<d"),
}
