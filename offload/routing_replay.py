"""A recorded text read again with a cache of experts: which policy and predictor is good at what.

Time is counted in layers that compute. Flash serves one read at a time, which takes `read_time`;
what is waited for goes first, and a read that has begun is finished. With a `read_time` of 0 what
is predicted is there when it is wanted: the predictor alone decides. As in the native cache
(`headrace.kernels.expert_cache`), experts of the mixture at work, and those that were asked for
ahead until their turn, do not leave; what turns out not to be wanted is taken back if it has not
begun to be read. Experts without weights are no uses, and need no room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.offload.expert_store import CLASSES, DOUBT, FADE, SURE_ENOUGH
from headrace.offload.route_statistics import RouteStatistics
from headrace.offload.route_trace import DISTANCES, NONE, RouteTrace, ranked

Floats = NDArray[np.float64]
POLICIES = (
    "random", "lru", "lfu", "edgemoe printed", "edgemoe corrected", "next use", "belady",
)  # fmt: skip
PREDICTORS = ("none", "pre-gating", "pre-gating 2", "pairs", "affinity")
_FADES = 50  # tokens after which a choice counts a third in the share of the last ones
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85)  # of experts
RATE_TOKENS = 512
EARLY_TOKENS = 128  # until then few predictions are believed, as none have come true yet
_FOREVER = 1 << 60

# After the choice of a mixture of a token: (mixtures from here, ranks of experts of that one, by
# how much each is above the first that is not predicted).
Prediction = tuple[int, np.ndarray, np.ndarray]
Predictor = Callable[[int, int], Iterator[Prediction]]


@dataclass(frozen=True)
class Replay:
    """What came of it.

    Attributes:
        hits: uses that waited for no read; `late` ones waited for one that had been asked for
            ahead, `misses` for one of their own.
        ahead: experts read ahead, of which `useful` were used.
        seconds: in layers that compute; `stall` of them waited.
    """

    hits: int
    late: int
    misses: int
    ahead: int
    useful: int
    time: float
    stall: float

    @property
    def hit_rate(self) -> float:
        """Share of the uses."""
        return self.hits / max(1, self.hits + self.late + self.misses)


def predictor_of(name: str, trace: RouteTrace, learned: RouteStatistics | None) -> Predictor:
    """One of `PREDICTORS`; tables need what was learned, on another text."""
    chosen = trace.chosen.astype(np.int64)
    mixtures, active = chosen.shape[1:]

    def gates(distances: int) -> Predictor:
        def predict(token: int, mixture: int) -> Iterator[Prediction]:
            for distance in range(1, distances + 1):
                if mixture + distance < mixtures:
                    ranks = trace.ahead[distance - 1, token, mixture + distance].astype(np.int64)
                    if ranks[0] != NONE:
                        yield (
                            distance,
                            ranks,
                            trace.margins[distance - 1, token, mixture + distance],
                        )

        return predict

    def table(token: int, mixture: int) -> Iterator[Prediction]:
        assert learned is not None
        later, before = (mixture + 1) % mixtures, chosen[token, mixture]
        if name == "affinity":
            scores = learned.by_affinity(later, before)
        else:
            back, at = divmod(mixture - 1, mixtures)
            if token + back < 0:
                return
            scores = learned.by_pairs(later, chosen[token + back, at], before)
        yield 1, *ranked(scores[: trace.experts[later]], active)

    def none(token: int, mixture: int) -> Iterator[Prediction]:
        yield from ()

    if name in ("pairs", "affinity"):
        if learned is None:
            raise ValueError(f"{name} needs statistics of another text")
        return table
    return {"none": none, "pre-gating": gates(1), "pre-gating 2": gates(2)}[name]


class _Cache:
    """Slots, and reads under way."""

    def __init__(
        self, trace: RouteTrace, slots: int, policy: str, read_time: float, seed: int = 0
    ) -> None:
        self._policy, self._read_time = policy, read_time
        self._mixtures = len(trace.experts)
        e = int(trace.experts.max())
        n = self._mixtures * e
        self._layer = np.repeat(np.arange(self._mixtures), e)
        self.slot = np.full(n, -1)
        self.arrival = np.zeros(n)  # when the read ends; `_FOREVER`: it has not begun
        self._uses = np.zeros(n, np.int64)
        self._last = np.zeros(n, np.int64)
        self._share = np.zeros(n)  # of the last tokens that took it
        self.next_use = np.full(n, _FOREVER)
        self.early = np.zeros(n, bool)
        self._of_slot = np.full(slots, -1)
        self.stays = np.full(n, -1, np.int64)
        self._queue = deque[int]()
        self._busy, self.clock = 0.0, 0.0
        self.ahead = 0
        self._rng = np.random.default_rng(seed)

    def use(self, expert: int, now: int, following: int) -> None:
        self._uses[expert] += 1
        self._share[expert] += 1 / (_FADES + 1)
        self._last[expert] = now
        self.next_use[expert] = following

    def age(self, layer: int) -> None:
        """A token comes to a mixture."""
        e = len(self._share) // self._mixtures
        self._share[layer * e : (layer + 1) * e] *= _FADES / (_FADES + 1)

    def there(self, expert: int) -> bool:
        return bool(self.slot[expert] >= 0 and self.arrival[expert] <= self.clock)

    def advance(self) -> None:
        """Reads ahead begin as long as flash has nothing else to do."""
        while self._queue and self._busy <= self.clock:
            self._begin(self._queue.popleft(), self._busy)
            self.ahead += 1

    def _begin(self, expert: int, at: float) -> None:
        self.arrival[expert] = self._busy = at + self._read_time

    def _take(self, expert: int, layer: int, now: int) -> bool:
        free = np.flatnonzero(self._of_slot < 0)
        if len(free):
            slot = int(free[0])
        else:
            held = self._of_slot
            leaves = (self.stays[held] < now) & (self.arrival[held] <= self.clock)
            if not leaves.any():
                return False
            score = np.where(leaves, self._score(held, layer), np.inf)
            slot = int(np.argmin(score))
            self.slot[held[slot]] = -1
        self._of_slot[slot] = expert
        self.slot[expert] = slot
        return True

    def _score(self, held: np.ndarray, layer: int) -> Floats:
        """See `headrace.offload.expert_requests`: the least goes first."""
        found: Floats
        if self._policy == "random":
            found = self._rng.random(len(held))
            return found
        if self._policy == "belady":
            found = -self.next_use[held].astype(float)
            return found
        if self._policy in ("lru", "lfu"):
            often = self._uses[held] * 2.0**24 if self._policy == "lfu" else 0.0
            found = often + self._last[held]
            return found
        distance = self._layer[held] - layer
        if self._policy == "edgemoe printed":
            distance = -distance
        distance = np.where(distance <= 0, distance + self._mixtures, distance)
        found = self._uses[held] / distance
        if self._policy == "next use":
            share = self._share[held]
            found = -(distance + self._mixtures * (1 - share) / (share + 16 / 65536))
        return found

    def demand(self, expert: int, layer: int, now: int) -> None:
        """Read at once; a read ahead that has not begun goes first now."""
        if self.slot[expert] < 0:
            while not self._take(expert, layer, now):
                # All slots wait for reads: the next one that ends gives way.
                self.clock = float(self.arrival[self._of_slot].min())
                self.advance()
        elif expert in self._queue:
            self._queue.remove(expert)
            self.ahead += 1
        self._begin(expert, max(self.clock, self._busy))

    def ask(self, expert: int, layer: int, now: int) -> None:
        """Read when nothing else is to be read."""
        if self._take(expert, layer, now):
            self.early[expert] = True
            self.arrival[expert] = _FOREVER
            self._queue.append(expert)

    def drop_stale(self, layer: int, wanted: np.ndarray) -> None:
        """Take back what was asked for ahead for a mixture and has not begun."""
        for expert in [x for x in self._queue if self._layer[x] == layer and x not in wanted]:
            self._queue.remove(expert)
            self._of_slot[self.slot[expert]] = -1
            self.slot[expert] = -1


def replay(
    trace: RouteTrace, slots: int, policy: str, predictor: Predictor, *,
    read_time: float = 0.0, sure: float = SURE_ENOUGH, tokens: int | None = None,
) -> Replay:  # fmt: skip
    """Read the tokens one by one.

    Args:
        slots: experts that have room, at least twice as many as a token takes in a mixture.
        policy: one of `POLICIES`.
        predictor: of `predictor_of`.
        read_time: of an expert, in layers that compute.
        sure: how often predictions of experts that were not there, with margins like that, must
            have come true for experts to be asked for ahead; 0: all are.
        tokens: only the first so many.
    """
    chosen = trace.chosen[:tokens].astype(np.int64)
    mixtures, active = chosen.shape[1:]
    if slots < 2 * active:
        raise ValueError(f"{slots} slots are less than twice the {active} experts of a token")
    e = int(trace.experts.max())
    flat = (chosen + np.arange(mixtures)[None, :, None] * e).reshape(-1, active)
    weighs = (chosen < trace.computed[None, :, None]).reshape(-1, active)
    following = _following(flat, mixtures * e)
    cache = _Cache(trace, slots, policy, read_time)
    first = np.unique(flat, return_index=True)
    cache.next_use[first[0]] = first[1] // active
    # Until some have come true none is believed.
    came_true = np.full((mixtures, DISTANCES + 1, CLASSES), 0.5)
    judged = np.zeros(came_true.shape, np.int64)
    usual = np.zeros((mixtures, DISTANCES + 1))
    said: dict[int, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]] = {}
    hits = late = misses = useful = 0
    stall = 0.0
    for now, every in enumerate(flat):
        token, m = divmod(now, mixtures)
        experts = every[weighs[now]]
        cache.advance()
        for distance, ranks, kinds, absent in said.pop(now, []):
            for right, kind in zip(np.isin(ranks, experts)[absent], kinds[absent], strict=True):
                cell = m, distance, kind
                judged[cell] += 1
                came_true[cell] += (right - came_true[cell]) / min(judged[cell] + DOUBT, FADE)
        cache.age(m)
        there = [cache.there(x) for x in experts]
        cache.stays[experts] = now
        cache.drop_stale(m, experts)
        for x, is_there in zip(experts.tolist(), there, strict=True):
            coming = cache.slot[x] >= 0
            useful += bool(coming and cache.early[x])
            cache.early[x] = False
            if is_there:
                hits += 1
            elif coming:
                late += 1
            else:
                misses += 1
            if not coming or cache.arrival[x] >= _FOREVER:
                cache.demand(x, m, now)
        after = following[now][weighs[now]]
        for x, next_use in zip(experts.tolist(), after.tolist(), strict=True):
            cache.use(x, now, next_use)
        for distance, said_ranks, said_margins in predictor(token, m):
            later = (m + distance) % mixtures
            read = said_ranks < trace.computed[later]
            ranks, margins = said_ranks[read], said_margins[read]
            at, of = later * e + ranks, usual[later]
            kinds = np.searchsorted(of[distance] / 2 * np.arange(1, CLASSES), margins)
            of[distance] += (said_margins.astype(float).mean() - of[distance]) / 64
            absent = cache.slot[at] < 0
            for x, kind in zip(at.tolist(), kinds.tolist(), strict=True):
                if cache.slot[x] < 0 and came_true[later, distance, kind] >= sure:
                    cache.ask(x, m, now)
                if cache.slot[x] >= 0:
                    cache.stays[x] = max(cache.stays[x], now + distance - 1)
            said.setdefault(now + distance, []).append((distance, at, kinds, absent))
        ready = max(cache.clock, float(cache.arrival[experts].max(initial=0.0)))
        stall += ready - cache.clock
        cache.clock = ready + 1
    return Replay(hits, late, misses, cache.ahead, useful, cache.clock, stall)


def rates(trace: RouteTrace, report: Callable[[int, int], None] | None = None) -> Floats:
    """What a cache finds where shares of a model's experts have room: see `RouteStatistics.rates`.

    It keeps and predicts as the native one does, and what is predicted is there in time.

    Args:
        report: called with how many shares are done, and how many there are.
    """
    active, count = trace.chosen.shape[2], int(trace.computed.sum())
    gates = predictor_of("pre-gating 2", trace, None)
    least = 2 * active
    sizes = sorted({least, *(max(least, round(share * count)) for share in SHARES)})
    found = list[tuple[float, float, float, float]]()
    for i, slots in enumerate(sizes):
        if slots >= count:
            break
        one = replay(trace, slots, "next use", gates, tokens=RATE_TOKENS)
        early = replay(trace, slots, "next use", gates, tokens=EARLY_TOKENS)
        uses = max(1, one.hits + one.late + one.misses)
        # Experts that are read for the first time are few where a text goes on.
        reads = (one.misses + one.ahead) / uses
        found.append((slots / count, one.hit_rate, reads, early.hit_rate))
        if report is not None:
            report(i + 1, len(sizes))
    return np.array([*found, (1.0, 1.0, 0.0, 1.0)])


def _following(flat: np.ndarray, n: int) -> np.ndarray:
    """When each use's expert is used next."""
    following = np.full(flat.shape, _FOREVER)
    coming = np.full(n, _FOREVER)
    for now in range(len(flat) - 1, -1, -1):
        following[now] = coming[flat[now]]
        coming[flat[now]] = now
    return following
