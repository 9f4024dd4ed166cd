"""Time prefill and decode of a GGUF file with llama.cpp, through llama-cpp-python.

    python llama_cpp_bench.py MODEL [-p 512] [-n 128] [-t THREADS] [-r 3] [--context TOKENS]
        [--no-repack]

The work is that of `llama-bench -p N -n M -d CONTEXT`: random tokens, batch 1, no sampling, logits
of the last token only, one warm-up. It calls llama_decode itself: `Llama.eval` also copies logits,
which costs a quarter of the speed. Prints one JSON line; `-p 0` or `-n 0` leaves that half out.

Not named llama_cpp.py, which would hide the package of that name from everything beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable

import llama_cpp as lc
import numpy as np

BATCH = 512


class Llama:
    """A model and a context of a fixed size, as little as the timing needs."""

    def __init__(self, path: str, threads: int, context: int, repack: bool = True) -> None:
        self._quiet = lc.llama_log_callback(lambda level, text, data: None)
        lc.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lc.llama_backend_init()
        of_model = lc.llama_model_default_params()
        of_model.use_extra_bufts = repack
        model = lc.llama_model_load_from_file(path.encode(), of_model)
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = lc.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = lc.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {context} tokens")
        self.vocabulary = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))

    def read(self, ids: np.ndarray) -> None:
        """Read tokens behind what has been read; returns when they are done."""
        for first in range(0, len(ids), BATCH):
            chunk = ids[first : first + BATCH]
            tokens = (lc.llama_token * len(chunk))(*[int(i) for i in chunk])
            if lc.llama_decode(self._context, lc.llama_batch_get_one(tokens, len(chunk))):
                raise SystemExit("llama_decode failed")
        lc.llama_synchronize(self._context)

    def forget(self, start: int = 0) -> None:
        """Drop the keys and values from position `start` on."""
        memory = lc.llama_get_memory(self._context)
        if start == 0:
            lc.llama_memory_clear(memory, True)
        elif not lc.llama_memory_seq_rm(memory, 0, start, -1):
            raise SystemExit("llama.cpp cannot drop the end of this model's context")


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Rates of every run after the warm-up; best and median."""
    room = max(args.prompt_tokens, args.context + args.new_tokens) + 8
    llama = Llama(args.model, args.threads, room, not args.no_repack)
    random = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return random.integers(min(100, llama.vocabulary // 2), llama.vocabulary, n)

    def one_by_one(tokens: np.ndarray) -> None:
        for i in range(len(tokens)):
            llama.read(tokens[i : i + 1])

    rates: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(args.runs + 1):
        if args.prompt_tokens:
            llama.forget()
            prompt = ids(args.prompt_tokens)
            seconds = timed(lambda tokens=prompt: llama.read(tokens))
            rates["prefill"].append(args.prompt_tokens / seconds)
    if args.new_tokens:
        llama.forget()
        llama.read(ids(args.context))
        for _ in range(args.runs + 1):
            llama.forget(args.context)
            new = ids(args.new_tokens)
            seconds = timed(lambda tokens=new: one_by_one(tokens))
            rates["decode"].append(args.new_tokens / seconds)
    result: dict[str, object] = {
        "peer": f"llama-cpp-python {lc.__version__}",
        "model": args.model,
        "threads": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "context_tokens": args.context,
    }
    for what, found in rates.items():
        if found:
            result[f"{what}_tok_s"] = max(found[1:])
            result[f"{what}_tok_s_median"] = statistics.median(found[1:])
    return result


def main() -> None:
    """Parse the command line, measure, print."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512)
    parser.add_argument("-n", "--new-tokens", type=int, default=128)
    parser.add_argument("-t", "--threads", type=int, default=cores)
    parser.add_argument("-r", "--runs", type=int, default=3)
    parser.add_argument("--context", type=int, default=0, help="decode after so many tokens")
    parser.add_argument(
        "--no-repack", action="store_true", help="leave weights where they are mapped"
    )
    args = parser.parse_args()
    if args.runs < 1 or min(args.prompt_tokens, args.new_tokens, args.context) < 0:
        parser.error("--runs must be at least 1, and no count below 0")
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
