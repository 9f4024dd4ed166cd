"""What the instructions of a RISC-V function cost: one on groups of m vector registers counts as m.

The group's size (LMUL) is not in the instruction but in what was set before it. It is followed
through the function's branches; where two ways meet, the larger counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from headrace.errors import KernelError

_ARITHMETIC, _LOAD, _STORE = 0x57, 0x07, 0x27
_BRANCH, _JAL, _JALR = 0x63, 0x6F, 0x67
_ELEMENT_BITS = {0: 8, 5: 16, 6: 32, 7: 64}  # by the width field of vector loads and stores
# Where bits 2, 3, ... of compressed jumps and branches lie in the offset; 0 for none.
_JUMP_BITS = (5, 1, 2, 3, 7, 6, 10, 8, 9, 4, 11)
_BRANCH_BITS = (5, 1, 2, 6, 7, 0, 0, 0, 3, 4, 8)

Setting = tuple[int, Fraction]  # element bits, LMUL
_ANY: Setting = (8, Fraction(1))  # where it makes no difference


def _field(word: int, high: int, low: int) -> int:
    return word >> low & (1 << high - low + 1) - 1


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _decode(code: bytes) -> Iterator[tuple[int, int, int]]:
    """Offset, instruction and its length."""
    at = 0
    while at < len(code):
        length = 4 if code[at] & 3 == 3 else 2
        yield at, int.from_bytes(code[at : at + length], "little"), length
        at += length


def _setting(word: int) -> Setting | None:
    """What a vset instruction sets; None for other instructions."""
    if word & 0x7F != _ARITHMETIC or _field(word, 14, 12) != 7:
        return None
    if _field(word, 31, 30) == 2:
        raise KernelError("the type of vectors comes from a register")
    power = _signed(_field(word, 22, 20), 3)
    return 8 << _field(word, 25, 23), Fraction(2) ** power


def _compressed_offset(word: int, places: tuple[int, ...], bits: int) -> int:
    moved = (_field(word, at, at) << to for at, to in enumerate(places, 2) if to)
    return _signed(sum(moved), bits)


def _next(at: int, word: int, length: int) -> tuple[int, ...]:
    """Offsets of the instructions that may follow in the function."""
    after = at + length
    if length == 4:
        opcode, rd = word & 0x7F, _field(word, 11, 7)
        if opcode == _BRANCH:
            offset = _field(word, 31, 31) << 12 | _field(word, 7, 7) << 11
            offset |= _field(word, 30, 25) << 5 | _field(word, 11, 8) << 1
            return after, at + _signed(offset, 13)
        if opcode == _JAL and rd == 0:
            offset = _field(word, 31, 31) << 20 | _field(word, 19, 12) << 12
            offset |= _field(word, 20, 20) << 11 | _field(word, 30, 21) << 1
            return (at + _signed(offset, 21),)
        return () if opcode == _JALR and rd == 0 else (after,)
    kind = word & 3, _field(word, 15, 13)
    if kind == (1, 5):  # c.j
        return (at + _compressed_offset(word, _JUMP_BITS, 12),)
    if kind in {(1, 6), (1, 7)}:  # c.beqz, c.bnez
        return after, at + _compressed_offset(word, _BRANCH_BITS, 9)
    returns = kind == (2, 4) and _field(word, 12, 12) == 0 and _field(word, 6, 2) == 0  # c.jr
    return () if returns else (after,)


def _calls(word: int, length: int) -> bool:
    if length == 4:
        return word & 0x7F in {_JAL, _JALR} and _field(word, 11, 7) != 0
    return word & 3 == 2 and _field(word, 15, 12) == 9 and _field(word, 6, 2) == 0


def _memory_cost(word: int, setting: Setting) -> Fraction:
    mode, fields = _field(word, 27, 26), _field(word, 31, 29) + 1
    kind = _field(word, 24, 20)
    if mode == 0 and kind in {8, 11}:  # whole registers; masks
        return Fraction(fields)
    bits, lmul = setting
    if mode in {0, 2}:
        lmul = lmul * _ELEMENT_BITS[_field(word, 14, 12)] / bits
    return max(lmul, Fraction(1)) * fields


def _arithmetic_cost(word: int, setting: Setting) -> Fraction:
    function, form = _field(word, 31, 26), _field(word, 14, 12)
    if function == 0b100111 and form == 3:  # vmv<n>r.v
        return Fraction(_field(word, 17, 15) + 1)
    one_element = function == 0b010000 and form in {1, 2, 5, 6}
    mask_logic = function >> 3 == 0b011 and form == 2
    return Fraction(1) if one_element or mask_logic else max(setting[1], Fraction(1))


def _is_vector(word: int, length: int) -> bool:
    if length != 4:
        return False
    if word & 0x7F in {_LOAD, _STORE}:
        return _field(word, 14, 12) in _ELEMENT_BITS
    return word & 0x7F == _ARITHMETIC and _field(word, 14, 12) != 7


def _of_whole_registers(word: int) -> bool:
    """Whether an instruction on vectors does the same whatever their type is."""
    if word & 0x7F == _ARITHMETIC:
        return _field(word, 31, 26) == 0b100111 and _field(word, 14, 12) == 3  # vmv<n>r.v
    return _field(word, 27, 26) == 0 and _field(word, 24, 20) == 8  # vl<n>r.v, vs<n>r.v


def costs(code: bytes) -> dict[int, int]:
    """Cost of each instruction of a function, by offset.

    Raises:
        KernelError: an instruction on vectors is reached with no known setting.
    """
    instructions = {at: (word, length) for at, word, length in _decode(code)}
    known: dict[int, set[Setting]] = {0: set()}
    todo = [0]
    while todo:
        at = todo.pop()
        word, length = instructions[at]
        own = _setting(word) if length == 4 else None
        after = {own} if own else set() if _calls(word, length) else known[at]
        for target in _next(at, word, length):
            if target in instructions and (target not in known or not after <= known[target]):
                known[target] = known.get(target, set()) | after
                todo.append(target)
    result = {}
    for at, (word, length) in instructions.items():
        if at not in known or not _is_vector(word, length):
            result[at] = 1
            continue
        cost = _arithmetic_cost if word & 0x7F == _ARITHMETIC else _memory_cost
        settings = known[at]
        if not settings and not _of_whole_registers(word):
            raise KernelError(f"the type of vectors is unknown at offset {at:#x}")
        result[at] = int(max(cost(word, setting) for setting in settings or {_ANY}))
    return result
