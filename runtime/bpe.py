"""Byte-pair merging: the one loop behind both the BPE and the SentencePiece tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush


def merge(symbols: list[str], rank: Callable[[str], float | None], joint: str) -> list[str]:
    """Join neighbours, lowest rank first and leftmost among equals, until nothing joins.

    A heap keeps a long word (a megabyte without a space is a legal prompt) at n log n.

    Args:
        symbols: The characters of one word; the list is consumed.
        rank: Rank of `left + joint + right`, or None when the two may not be joined.
        joint: " " for merge rules spelled "left right", "" when the joined text itself is ranked.
    """
    count = len(symbols)
    heap: list[tuple[float, int, int, int]] = []  # (rank, left, right, characters in both)
    for left in range(count - 1):
        found = rank(symbols[left] + joint + symbols[left + 1])
        if found is not None:
            size = len(symbols[left]) + len(symbols[left + 1])
            heap.append((found, left, left + 1, size))
    if not heap:
        return symbols
    heapify(heap)
    before = list(range(-1, count - 1))
    after = list(range(1, count + 1))

    def consider(left: int, right: int) -> None:
        found = rank(symbols[left] + joint + symbols[right])
        if found is not None:
            heappush(heap, (found, left, right, len(symbols[left]) + len(symbols[right])))

    while heap:
        _, left, right, size = heappop(heap)
        # An entry is stale when either side has been joined since; sizes only grow or become 0.
        if not symbols[left] or len(symbols[left]) + len(symbols[right]) != size:
            continue
        if not symbols[right]:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        following = after[left] = after[right]
        if following < count:
            before[following] = left
            consider(left, following)
        if before[left] >= 0:
            consider(before[left], left)
    return [symbol for symbol in symbols if symbol]
