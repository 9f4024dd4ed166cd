"""Activations of two tokens in pairs, for CPUs that multiply two rows by two tokens at once.

Where a target has `token_pairs`, two neighbouring "q8" entries of a group of more than one token
take the same 96 bytes together (of "q8x2": the codes of a token, and of what they leave out):

    bytes                what, t = 0..1
    4t, 8 + 4t           int32 -8 * (sum of codes) of entry t, twice: two sums start from it
    16 + 4t              float32 scale of entry t
    24 + 4t              float32 scale * (sum of codes)
    32 + 16k + 8t + i    code of input 8k + i of entry t, k = 0..3, i = 0..7

"""

from __future__ import annotations

import numpy as np

from headrace.sparse.format import Bytes


def pair_entries(packed: Bytes) -> Bytes:
    """Reference: "q8" entries, uint8 [..., tokens, 48] with an even number of tokens, in pairs."""
    two = packed.reshape(*packed.shape[:-2], -1, 2, 48)
    shape = two.shape[:-2]
    codes = two[..., :32].reshape(*shape, 2, 4, 8).swapaxes(-3, -2).reshape(*shape, 64)
    sums = np.ascontiguousarray(two[..., 40:44]).view(np.int32)[..., 0] * 8
    words = np.ascontiguousarray(sums).view(np.uint8)  # [..., 8]: both tokens
    scales, products = (two[..., i : i + 4].reshape(*shape, 8) for i in (32, 36))
    return np.concatenate([words, words, scales, products, codes], axis=-1).reshape(packed.shape)


def separate_entries(paired: Bytes) -> Bytes:
    """Undo `pair_entries`; the sums are those of the codes."""
    two = paired.reshape(*paired.shape[:-2], -1, 96)
    shape = two.shape[:-1]
    codes = two[..., 32:].reshape(*shape, 4, 2, 8).swapaxes(-3, -2)
    out = np.empty((*shape, 2, 48), np.uint8)
    out[..., :32] = codes.reshape(*shape, 2, 32)
    out[..., 32:36] = two[..., 16:24].reshape(*shape, 2, 4)
    out[..., 36:40] = two[..., 24:32].reshape(*shape, 2, 4)
    signed = out[..., :32].view(np.int8).astype(np.int32)
    sums = signed.sum(axis=-1, dtype=np.int32)
    tail = out[..., 32:].view(np.int32)
    tail[..., 2] = -sums
    tail[..., 3] = -signed[..., :16].sum(axis=-1, dtype=np.int32)
    return out.reshape(paired.shape)
