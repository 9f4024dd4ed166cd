"""Measure a model: prefill, decode, start-up, memory, beside the memory's own read bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headrace.loaders.progress import Progress
from headrace.loaders.sources import resolve
from headrace.machine import (
    BENCH_BYTES,
    QUICK_BYTES,
    buffer_bytes,
    known_read_bandwidth,
    read_bandwidth,
    remember_read_bandwidth,
)
from headrace.model import Model
from headrace.offload.expert_cache import ExpertCounts
from headrace.offload.recall import Predictor
from headrace.peak import peak_rss_bytes
from headrace.planning import kernel_store, prepare
from headrace.prediction import Passes
from headrace.rates import measure_rates

FIRST_TOKENS = 5  # of the prompt whose time to the first token is taken


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    memory: int | None = None,
    threads: int | None = None,
    target: str | None = None,
    kernels: str | Path | None = None,
    context: int | None = None,
    context_tokens: int = 0,
    runs: int = 3,
    whole_stack: bool = False,
    predictor: Predictor = "fitted",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Best of `runs`: prefill of random tokens, then decode one by one from an empty context.

    As llama-bench does it: random tokens, no sampling, logits of the last token only. With
    `context_tokens`, decoding starts after that many tokens of context. The model is loaded with
    a context of `context` tokens; default: as many as are needed.

    Raises:
        what `headrace.load` raises; ValueError: a count is below 1.
    """
    if prompt_tokens < 1 or new_tokens < 1 or runs < 1 or context_tokens < 0:
        raise ValueError("prompt tokens, new tokens and runs must be at least 1")
    needed = max(prompt_tokens, new_tokens + context_tokens, FIRST_TOKENS)
    prepared = prepare(
        resolve(model, progress=progress), context=context or needed, threads=threads,
        target=target, kernels=kernels, budget=memory, whole_stack=whole_stack,
        predictor=predictor,
    )  # fmt: skip
    # Before loading, as there is no room for it later; nor is there now in a small budget.
    room = None if memory is None else memory - prepared.parts["the process"]
    rates = measure_rates(
        prepared, kernel_store(prepared), prompt_tokens=prompt_tokens,
        probe=room is None or room >= QUICK_BYTES, progress=progress,
    )  # fmt: skip
    began = time.perf_counter()
    with Model(prepared, progress, rates) as loaded:
        load_s = time.perf_counter() - began
        random = np.random.default_rng(0)
        first_token_s = _first_token(loaded, random)
        prefill, decode, stalls = [], [], []
        counts = list[ExpertCounts]()
        for run in range(runs + 1):
            if progress is not None:
                progress(run, runs + 1, "measuring")
            prefill.append(_timed(lambda: loaded.read_tokens(_ids(loaded, random, prompt_tokens))))
            start = 0
            if context_tokens:
                loaded.read_tokens(_ids(loaded, random, context_tokens))
                start = context_tokens
            else:
                loaded.forget()
            ids = _ids(loaded, random, new_tokens)
            waited, before = loaded.stall_s, loaded.expert_counts or ExpertCounts()
            decode.append(_timed(partial(_one_by_one, loaded, ids, start)))
            stalls.append(loaded.stall_s - waited)
            counts.append((loaded.expert_counts or ExpertCounts()).since(before))
        # Before the bandwidth's large buffer: this is what the model itself took.
        peak = peak_rss_bytes()
        plan = loaded.plan
        bandwidth = _bandwidth(loaded)
        decode_tok_s = new_tokens / min(decode[1:])
        mean_context = context_tokens + new_tokens / 2
        n_bytes = plan.bytes_per_token
        kv_read = int(mean_context * plan.kv_bytes_per_context_token)
        best = int(np.argmin(decode[1:])) + 1
        passes = Passes(
            replace(rates, memory=bandwidth), loaded.residency, n_bytes, plan.threads,
            loaded.prepared.expert_bytes,
        )  # fmt: skip
        speed = passes.prediction(prompt_tokens)
        flash = speed.flash
        read, needed = _read_of_flash(loaded, counts[best], new_tokens)
        return {
            "model": str(plan.model),
            "format": loaded.format,
            "threads": plan.threads,
            "target": plan.target,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "context_tokens": context_tokens,
            "prefill_tok_s": prompt_tokens / min(prefill[1:]),
            "decode_tok_s": decode_tok_s,
            "decode_tok_s_median": new_tokens / float(np.median(decode[1:])),
            "bytes_per_token": n_bytes,
            "kv_bytes_read_per_token": kv_read,
            "memory_read_gb_s": None if bandwidth is None else bandwidth / 1e9,
            "decode_share_of_limit": (
                None if bandwidth is None else decode_tok_s * (n_bytes + kv_read) / bandwidth
            ),
            "predicted_tok_s": speed.tok_s,
            "prompt_s": min(prefill[1:]),
            "predicted_prompt_s": speed.first_token_s,
            "budget_bytes": plan.budget,
            "resident_weights_bytes": plan.resident_weights,
            "window_bytes": plan.window,
            "bytes_read_per_token": read,
            "flash_read_gb_s": None if flash is None else flash / 1e9,
            "read_mode": None if speed.mode is None else str(speed.mode),
            "decode_share_of_flash": (None if flash is None else decode_tok_s * needed / flash),
            # What a token took, over the longer of reading and computing: 1 is perfect overlap.
            "overlap": (
                None
                if not flash or not needed or not speed.compute_s
                else min(decode[1:]) / new_tokens / max(needed / flash, speed.compute_s)
            ),
            "stall_per_token_s": stalls[best] / new_tokens,
            "stall_share": stalls[best] / decode[best],
            **_of_experts(loaded, counts[best]),
            "expanded_bytes": sum(e["bytes"] - e["file_bytes"] for e in plan.expanded),
            "weights_bytes": plan.weights,
            "kv_cache_bytes": plan.kv_cache,
            "planned_peak_bytes": plan.peak_bytes,
            "peak_rss_bytes": peak,
            "load_s": load_s,
            "first_token_s": first_token_s,
        }


def _read_of_flash(model: Model, counts: ExpertCounts, tokens: int) -> tuple[int, int]:
    """Bytes read for a token, and of those the ones that were of use.

    What streams is the same for all tokens; what experts are read is counted.
    """
    streamed = model.plan.flash_bytes_per_token
    if model.expert_counts is None:
        return streamed, streamed
    streamed -= model.prepared.expert_bytes(1)
    useful = counts.read_bytes - counts.wasted_bytes
    return streamed + counts.read_bytes // tokens, streamed + useful // tokens


def _of_experts(model: Model, counts: ExpertCounts) -> dict[str, Any]:
    if model.expert_counts is None:
        return {}
    return {
        "experts_in_memory": model.prepared.slots,
        "expert_hit_rate": counts.hit_rate,
        "expected_hit_rate": model.plan.expected_hit_rate,
        "expected_early_hit_rate": model.plan.expected_early_hit_rate,
        "expected_stall_per_token_s": model.plan.expected_stall_s,
        "expected_bytes_read_per_token": model.plan.flash_bytes_per_token,
        "routing": f"{model.plan.routing}; the tokens here are random, which is worse than text",
        "neurons_fire": model.plan.neurons_fire,
        "expert_request_us": counts.asking_s / max(1, counts.requests) * 1e6,
        "expert_hits": counts.hits,
        "expert_late": counts.late,
        "expert_misses": counts.misses,
        "expert_ahead_useful_bytes": counts.useful * counts.slot_bytes,
        "expert_ahead_wasted_bytes": counts.wasted_bytes,
    }


def _bandwidth(model: Model) -> float | None:
    """Bytes per second that memory gives: as before, where the budget has no room to measure."""
    plan = model.plan
    left = BENCH_BYTES if plan.budget is None else plan.budget - plan.peak_bytes
    n_bytes = buffer_bytes(min(left, BENCH_BYTES))
    if n_bytes is None:
        return known_read_bandwidth(plan.target, plan.threads)
    bandwidth = read_bandwidth(model.kernel_store, model.team, n_bytes)
    if n_bytes == BENCH_BYTES:
        remember_read_bandwidth(plan.target, plan.threads, bandwidth)
    return bandwidth


def _ids(model: Model, random: np.random.Generator, n: int) -> list[int]:
    vocabulary = model.vocabulary
    low = min(100, vocabulary // 2)
    return [int(i) for i in random.integers(low, vocabulary, n)]


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _one_by_one(model: Model, ids: list[int], start: int) -> None:
    for i, token in enumerate(ids):
        model.read_tokens([token], start + i)


def _first_token(model: Model, random: np.random.Generator) -> float:
    ids = _ids(model, random, FIRST_TOKENS)
    return _timed(lambda: model.read_tokens(ids))
