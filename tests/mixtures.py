"""Mixtures of experts as several tests use them: what they say, from memory and from flash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import headrace
from headrace.expert_memory import predictor_bytes
from headrace.families import describe
from headrace.learned_routes import statistics_path
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import open_model
from headrace.model import Model
from headrace.offload import expert_store as store
from headrace.offload.recall import Predictor
from headrace.offload.route_statistics import RouteStatistics, learn
from headrace.offload.router_fit import RouterFit
from headrace.placing import place
from headrace.planning import bounds, prepare
from headrace.routing import record
from headrace.rows import raw_rows, read_vector

STORY = "Once upon a time there was a girl. " * 9
Said = tuple[np.ndarray, list[np.ndarray], list[int]]


def said(model: Model, ids: list[int]) -> Said:
    """What a model says of a long text, of short ones, and what it answers."""
    long = model.logits(ids)
    short = [model.logits(ids[:n]) for n in (1, 2, 7)]
    generation = model.generate(ids[:20], max_tokens=24)
    generation.text()
    return long, short, generation.ids


def same(a: Said, b: Any) -> bool:
    """Whether that is the same, bit for bit."""
    pairs = zip([a[0], *a[1]], [b[0], *b[1]], strict=True)
    return all(np.array_equal(x, y) for x, y in pairs) and a[2] == b[2]


def learn_beside(path: Path, text: str = STORY, tokens: int = 64) -> RouteStatistics:
    """Learn the routes of a text, with fitted routers, and put that beside the model."""
    fitting = RouterFit()
    trace = record(path, text, tokens=tokens, threads=1, fitting=fitting)
    learned = learn(trace, np.ones((1, 4), np.float32), fitting.fitted)
    learned.write(statistics_path(path))
    return learned


def check_from_flash(
    path: Path, ids: list[int], learned: RouteStatistics, count: int,
    predictors: Iterable[Predictor],
) -> None:  # fmt: skip
    """Experts from flash change nothing, with each predictor in the least memory, and with
    fitted routers in some more; `count` is how many experts there are.
    """
    with headrace.load(path, context=128) as model:
        whole = said(model, ids)
    least, most = bounds(path, context=128)
    assert least < most
    room = prepare(path, context=128, threads=1, target=None).room
    assert room is not None and room.count == count
    more: list[tuple[Predictor, int]] = [("fitted", 3 * room.slot_bytes)]
    for predictor, beside in [*more, *((one, 0) for one in predictors)]:
        memory = least + predictor_bytes(learned, predictor) + beside
        with headrace.load(path, context=128, memory=memory, predictor=predictor) as model:
            assert model.streams
            assert same(said(model, ids), whole)
            cache = model._held.experts
            assert cache is not None and cache.words[store.MISSES] > 0


def weights(path: Path) -> dict[str, np.ndarray]:
    """All matrices and vectors of a model, in float64."""
    model = open_model(path)
    decoder = describe(model)
    with TensorReader() as reader:
        found = {v.name: read_vector(model, reader, v) for v in decoder.vectors()}
        for p in place(model, decoder, "f32"):
            rows = raw_rows(reader, p, 0, p.matrix.rows)
            found[p.matrix.name] = rows.view(np.float32)[: p.matrix.rows]
    return {name: values.astype(np.float64) for name, values in found.items()}
