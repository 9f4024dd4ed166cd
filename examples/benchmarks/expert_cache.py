"""Decode with room for a share of the experts: what waits, what is read in vain, and how fast.

python examples/benchmarks/expert_cache.py MODEL --share 0.25 --tokens 200

Every way answers the same tokens: on demand (room for twice a token's experts of one layer), then
with the share, by policy and by what predicts. Belady's rate, of who knows the future and reads
nothing ahead, comes from what the tokens chose. A hit is a use that waits for no read.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import headrace
from headrace.model import Model
from headrace.offload import expert_store as store
from headrace.offload.expert_cache import ExpertCounts
from headrace.offload.recall import Predictor
from headrace.planning import bounds, prepare

CONTEXT = 512
WARM = 32  # tokens


@dataclass(frozen=True)
class Way:
    """How experts are kept and asked for."""

    name: str
    policy: int
    predictor: Predictor
    all_room: bool = True


WAYS = (
    Way("on demand", store.LRU, "none", False),
    Way("LRU", store.LRU, "none"),
    Way("LFU", store.LFU, "none"),
    Way("EdgeMoE corrected", store.EDGE, "none"),
    Way("next use", store.NEXT_USE, "none"),
    Way("next use, gates", store.NEXT_USE, "gates"),
    Way("next use, fitted", store.NEXT_USE, "fitted"),
)


def memory_for(path: Path, slots: int, predictor: Predictor) -> int:
    """The least budget with room for so many experts, and for all that every token reads."""
    low, high = bounds(path, context=CONTEXT)
    while high - low > 4096:
        middle = (low + high) // 2
        found = prepare(
            path, context=CONTEXT, threads=None, target=None, budget=middle, predictor=predictor
        )
        if found.residency is not None or 0 < found.slots < slots:
            low = middle
        else:
            high = middle
    return high


def answer(
    model: Model, text: str, tokens: int
) -> tuple[float, ExpertCounts, list[list[tuple[int, int]]]]:
    """(seconds for a token, counts, experts of each mixture of each token), after some to warm up.

    Where an answer ends, the same question is asked again.
    """
    used, before, began, n = list[list[tuple[int, int]]](), ExpertCounts(), 0.0, 0
    seed = warm = 0
    while n < tokens + WARM:
        seed += 1
        generation = model.generate(
            text, raw=True, max_tokens=tokens + WARM - n, seed=seed, lookup=False
        )
        done = 0
        for _ in generation:
            n, done = n + len(generation.ids) - done, len(generation.ids)
            if began:
                routes = enumerate(model._programs.routes(1))
                used += [[(m, int(e)) for e in chosen[0]] for m, chosen in routes]
            elif n >= WARM:
                before, warm, began = _counts(model), n, time.perf_counter()
    spent = time.perf_counter() - began
    return spent / (n - warm), _counts(model).since(before), used


def _counts(model: Model) -> ExpertCounts:
    counts = model.expert_counts
    assert counts is not None
    return counts


def belady(used: list[list[tuple[int, int]]], room: int) -> float:
    """Share of uses that find their expert, where who is used last leaves."""
    flat = [one for visit in used for one in visit]
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, one in enumerate(flat):
        places[one].append(i)
    following = {i: j for at in places.values() for i, j in itertools.pairwise(at)}
    cached: dict[tuple[int, int], int] = {}
    heap: list[tuple[int, tuple[int, int]]] = []
    hits = 0
    for i, one in enumerate(flat):
        hits += one in cached
        if one not in cached and len(cached) >= room:
            while True:
                later, other = heapq.heappop(heap)
                if cached.get(other) == -later:
                    break
            del cached[other]
        cached[one] = following.get(i, len(flat) + i)
        heapq.heappush(heap, (-cached[one], one))
    return hits / len(flat)


def main() -> None:
    """Parse the command line, run every way in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts that have room")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3, help="take the best of so many")
    parser.add_argument("--text", default="The history of the bridge began when the town decided")
    options = parser.parse_args()
    least = prepare(options.model, context=CONTEXT, threads=None, target=None).room
    if least is None:
        raise SystemExit(f"{options.model} has no experts that could come from flash")
    room = round(options.share * least.count)
    best: dict[str, tuple[float, str]] = {}
    ideal = 0.0
    for _ in range(options.runs):
        for way in WAYS:
            slots = room if way.all_room else least.least
            memory = memory_for(options.model, slots, way.predictor)
            with headrace.load(
                options.model, context=CONTEXT, memory=memory, predictor=way.predictor
            ) as model:
                assert model._held.experts is not None
                model._held.experts.words[store.POLICY] = way.policy
                spent, counts, used = answer(model, options.text, options.tokens)
                ideal = belady(used, room)
                said = (
                    f"{model.prepared.slots:6} {100 * counts.hit_rate:6.1f}% "
                    f"{counts.wasted_bytes / 1e6:8.1f} MB "
                    f"{counts.useful * counts.slot_bytes / 1e6:8.1f} MB"
                )
            if way.name not in best or spent < best[way.name][0]:
                best[way.name] = spent, said
    slowest = best[WAYS[0].name][0]
    print(
        f"{'':20} {'room':>6} {'hits':>7} {'read in vain':>14} and of use   ms/token  of on demand"
    )
    for name, (spent, said) in best.items():
        print(f"{name:20} {said} {1e3 * spent:8.2f} {spent / slowest:12.2f}")
    print(f"Belady, without reading ahead: {100 * ideal:.1f}%")


if __name__ == "__main__":
    main()
