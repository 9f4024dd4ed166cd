"""Attention over a half-precision KV cache: the rows of the kernel table, and their cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.attention_decode import decode, decode_scratch_bytes
from headrace.kernels.attention_prefill import QUERIES, prefill, prefill_bf16, prefill_scratch_bytes
from headrace.kernels.attention_short import short
from headrace.kernels.kv_cache import CHUNK, padded
from headrace.kernels.rope import rope
from headrace.targets.table import Case, Kernel
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def kernels(head: int) -> dict[str, Kernel]:
    """Rows for a head width: "decode", "rope", "short" and "prefill"."""
    d16 = padded(head) // 16
    shared = ("headrace.kernels.kv_cache", "headrace.kernels.math", "headrace.kernels.softmax")

    def sources(own: str) -> tuple[str, ...]:
        return (f"headrace.kernels.{own}", *shared)

    return {
        "decode": Kernel(
            f"attention_decode_d{d16 * 16}",
            lambda target: decode(d16),
            sources("attention_decode"),
            lambda target, rng: _cases("decode", head, target, rng),
            __name__,
        ),
        "rope": Kernel(
            f"attention_rope_d{d16 * 16}",
            lambda target: rope(d16),
            sources("rope"),
            lambda target, rng: _cases("rope", head, target, rng),
            __name__,
        ),
        "short": Kernel(
            f"attention_short_d{d16 * 16}",
            lambda target: short(d16),
            (*sources("attention_short"), "headrace.kernels.attention_decode"),
            lambda target, rng: _cases("short", head, target, rng),
            __name__,
        ),
        "prefill": Kernel(
            f"attention_prefill_d{d16 * 16}",
            lambda target: (
                prefill_bf16(d16) if target.bf16_dot and d16 % 2 == 0 else prefill(d16, target)
            ),
            sources("attention_prefill"),
            lambda target, rng: _cases("prefill", head, target, rng),
            __name__,
        ),
    }


def all_kernels() -> list[Kernel]:
    """Every row of this module for the head widths of common models."""
    return [kernel for head in (8, 64, 80, 128, 256) for kernel in kernels(head).values()]


def kernel_named(name: str) -> Kernel:
    """The row of this name, of any head width."""
    _, operation, width = name.split("_")
    return kernels(int(width.removeprefix("d")))[operation]


def _rotated(x: np.ndarray, table: np.ndarray, n_rot: int, paired: int, norm: Any) -> np.ndarray:
    """Reference rope of [tokens, heads, head] in half-split order; table [tokens, n_rot]."""
    import numpy as np

    x = x.astype(np.float64)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
    half = n_rot // 2
    a, b = (x[..., 0:n_rot:2], x[..., 1:n_rot:2]) if paired else (x[..., :half], x[..., half:n_rot])
    c, s = table[:, None, :half], table[:, None, half:]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., n_rot:]], axis=-1)


def _cases(kind: str, head: int, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    """One shape per feature: plain, sliding window, soft cap, norms, partial rotation."""
    import numpy as np

    settings = [
        # heads, kv, position, tokens, window, cap, paired, norms, rotated
        (6, 2, 0, 1, 0, 0.0, 1, False, head),
        (4, 4, 70, 21, 0, 30.0, 0, True, head),
        (6, 2, 530, 37, 300, 0.0, 1, False, head if head % 8 else head // 2),
    ]
    reads = kind in ("short", "prefill")  # what `rope` has made
    for n_heads, n_kv, position, tokens, window, cap, paired, norms, n_rot in settings:
        tokens = 1 if kind == "decode" else tokens
        width, total = padded(head), position + tokens
        room = -(-total // CHUNK) * CHUNK
        q = rng.standard_normal((tokens, n_heads, head)).astype(np.float32)
        k = rng.standard_normal((total, n_kv, head)).astype(np.float32)
        v = rng.standard_normal((total, n_kv, head)).astype(np.float32)
        angle = np.arange(total)[:, None] * 10000.0 ** -(np.arange(n_rot // 2) / (n_rot // 2))
        table = np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
        q_norm = rng.standard_normal(head).astype(np.float32) if norms else None
        k_norm = rng.standard_normal(head).astype(np.float32) if norms else None
        scale = np.float32(head**-0.5)
        # Reference: float64 attention over half-precision keys and values.
        keys = _rotated(k, table, n_rot, paired, k_norm).astype(np.float16)
        values = v.astype(np.float16)
        queries = _rotated(q, table[position:], n_rot, paired, q_norm) * scale
        expected = np.zeros((tokens, n_heads, head))
        for i in range(tokens):
            low = max(0, position + i + 1 - window) if window else 0
            span = slice(low, position + i + 1)
            for h in range(n_heads):
                g = h * n_kv // n_heads
                s = keys[span, g].astype(np.float64) @ queries[i, h]
                s = cap * np.tanh(s / cap) if cap else s
                p = np.exp(s - s.max())
                expected[i, h] = (p / p.sum()) @ values[span, g].astype(np.float64)
        k_cache = np.zeros((room // CHUNK, n_kv, CHUNK // 16, width, 16), np.float16)
        v_cache = np.zeros((room // CHUNK, n_kv, CHUNK, width), np.float16)
        full_k, full_v = k_cache.copy(), v_cache.copy()
        for cache_k, cache_v, n in ((full_k, full_v, total), (k_cache, v_cache, position)):
            by_token = np.zeros((n_kv, room, width), np.float16)
            by_token[:, :n, :head] = keys[:n].transpose(1, 0, 2)
            blocks = by_token.reshape(n_kv, room // CHUNK, CHUNK // 16, 16, width)
            cache_k[:] = blocks.transpose(1, 0, 2, 4, 3)
            by_token[:, :n, :head] = values[:n].transpose(1, 0, 2)
            cache_v[:] = by_token.reshape(n_kv, room // CHUNK, CHUNK, width).transpose(1, 0, 2, 3)
        if reads:
            k_cache[:], v_cache[:] = full_k, full_v
        padded_tokens = -(-tokens // QUERIES) * QUERIES
        rotated = np.zeros((padded_tokens, n_heads, width), np.float32)
        if reads:
            rotated[:tokens, :, :head] = queries
        out = np.zeros((tokens, n_heads, head), np.float32)
        new_k = np.ascontiguousarray(k[position:])
        new_v = np.ascontiguousarray(v[position:])
        n_bytes = max(decode_scratch_bytes(head), prefill_scratch_bytes(head, n_heads // n_kv))
        scratch = np.zeros((8, n_bytes), np.uint8)
        chunks = total // CHUNK + 1
        partial = np.zeros((max(n_heads, 8), chunks, width + 16), np.float32)
        slots = [
            q, new_k, new_v, k_cache, v_cache, k_cache[0, 0].nbytes, v_cache[0, 0].nbytes, n_heads,
            n_kv, head, n_rot, table, n_rot * 4, paired, 0 if q_norm is None else q_norm,
            0 if k_norm is None else k_norm, 1e-5, float(scale), cap, window, out, scratch,
            n_bytes, partial, np.zeros(n_heads, np.int64), np.array([position], np.int64), chunks,
            np.array([tokens], np.int64), q[0].nbytes, new_k[0].nbytes, new_v[0].nbytes, rotated,
            out[0].nbytes, k_cache[0].nbytes, v_cache[0].nbytes,
        ]  # fmt: skip
        outputs: list[tuple[Any, Any]] = []
        if kind != "rope":
            outputs.append((out, expected))
        if not reads:
            outputs += [(k_cache, full_k), (v_cache, full_v)]
        if kind == "rope":
            want = np.zeros_like(rotated)
            want[:tokens, :, :head] = queries
            outputs.append((rotated, want))
        # A key may round to the neighbouring half, which moves a score by 2**-11 of its size.
        size = float(np.abs(queries).max() * np.abs(keys.astype("f4")).max())
        # bfloat16 products: 2**-8 of every score and of every weight and value.
        pairs = kind == "prefill" and target.bf16_dot
        tolerance = (2.0**-6 if pairs else 2.0**-10) * max(1.0, size)
        yield Case(slots, outputs, tolerance, f"{n_heads}/{n_kv}x{head} at {position}+{tokens}")
