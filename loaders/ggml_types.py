"""The tensor types of GGML as plain data: id in the file, name, block elements and block bytes.

A copy, because importing the gguf package costs more than reading a model's header; a test
compares it with the package's own table, which lacks bitnet.cpp's I2_S. (Its number was that of
IQ4_NL_4_4, which models in memory had, and no files.)
"""

from __future__ import annotations

from typing import NamedTuple


class GgmlType(NamedTuple):
    """One tensor type; a row of weights is a whole number of blocks.

    `tail` is the number of bytes that a tensor has behind its blocks.
    """

    id: int
    name: str
    block_elements: int
    block_bytes: int
    tail: int = 0


_TABLE = (
    GgmlType(0, "F32", 1, 4),
    GgmlType(1, "F16", 1, 2),
    GgmlType(2, "Q4_0", 32, 18),
    GgmlType(3, "Q4_1", 32, 20),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24),
    GgmlType(8, "Q8_0", 32, 34),
    GgmlType(9, "Q8_1", 32, 40),
    GgmlType(10, "Q2_K", 256, 84),
    GgmlType(11, "Q3_K", 256, 110),
    GgmlType(12, "Q4_K", 256, 144),
    GgmlType(13, "Q5_K", 256, 176),
    GgmlType(14, "Q6_K", 256, 210),
    GgmlType(15, "Q8_K", 256, 292),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    GgmlType(24, "I8", 1, 1),
    GgmlType(25, "I16", 1, 2),
    GgmlType(26, "I32", 1, 4),
    GgmlType(27, "I64", 1, 8),
    GgmlType(28, "F64", 1, 8),
    GgmlType(29, "IQ1_M", 256, 56),
    GgmlType(30, "BF16", 1, 2),
    GgmlType(34, "TQ1_0", 256, 54),
    GgmlType(35, "TQ2_0", 256, 66),
    GgmlType(36, "I2_S", 128, 32, 32),  # of bitnet.cpp, whose type it is
    GgmlType(39, "MXFP4", 32, 17),
    GgmlType(40, "NVFP4", 64, 36),
    GgmlType(41, "Q1_0", 128, 18),
)

BY_ID: dict[int, GgmlType] = {t.id: t for t in _TABLE}
BY_NAME: dict[str, GgmlType] = {t.name: t for t in _TABLE}

# Ids that llama.cpp once wrote and later took out of the format.
REMOVED: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


def why_unsupported(type_id: int) -> str:
    """What to tell someone whose file holds a tensor of a type that is not in the table."""
    name = REMOVED.get(type_id)
    if name is None:
        return f"unknown tensor type {type_id}: a newer format than this release knows"
    text = f"tensor type {type_id} ({name}) was removed from GGUF: get the file as "
    if name.startswith("IQ4_NL"):
        return text + "IQ4_NL"
    return text + "Q4_0"
