"""Experts lie in files behind those that they follow, where that is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from test_experts import FAMILIES
from test_routing import RATES, TEXT, random_trace

import headrace
from headrace.compress import compress
from headrace.expert_order import chains
from headrace.families import describe
from headrace.learned_routes import statistics_of, statistics_path
from headrace.loaders.tiled import open_model
from headrace.offload.route_statistics import learn
from headrace.routing import record


def test_chains_follow_the_likeliest() -> None:
    learned = learn(random_trace(), RATES)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(8), (4, 1)), axis=1)
    affinity = np.zeros_like(learned.affinity)
    for m in range(1, 4):
        affinity[m, order[m - 1], order[m]] = 1
    found = chains(replace(learned, affinity=affinity))
    assert sorted(found) == [(m, e) for m in range(4) for e in range(8)]
    first = [e for m, e in found if m == 0]
    assert first == np.argsort(-learned.frequency[0], kind="stable").tolist()
    for i, e in enumerate(first):
        rank = order[0].tolist().index(e)
        assert found[4 * i : 4 * i + 4] == [(m, order[m, rank]) for m in range(4)]


def test_mixtures_of_different_sizes() -> None:
    learned = replace(learn(random_trace(), RATES), experts=np.array([8, 2, 5, 8]))
    found = chains(learned)
    assert sorted(found) == [(m, e) for m, n in enumerate((8, 2, 5, 8)) for e in range(n)]


def test_a_file_in_that_order_is_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes((FAMILIES / "mixtral.gguf").read_bytes())
    plain = compress(path, tmp_path / "plain.gguf", format="q8_0").path
    learned = learn(record(path, TEXT, tokens=64, threads=2), RATES)
    learned.write(statistics_path(path))
    notes: list[str] = []
    ordered = compress(path, tmp_path / "ordered.gguf", format="q8_0", notice=notes.append).path
    assert sum("ordered.gguf.routes" in note for note in notes) == 1
    model = open_model(ordered)
    found, why = statistics_of(ordered, model)
    assert why is None and found is not None and found.tokens == 64

    mixtures = list(describe(model).mixtures().values())
    expected = [
        matrix.name for m, e in chains(learned) for matrix in mixtures[m].each[e].matrices()
    ]
    infos = {n: model.tensors[n] for n in expected}
    assert sorted(infos, key=lambda n: infos[n].offset) == expected
    last = max(i.offset for n, i in model.tensors.items() if n not in infos and "blk." in n)
    assert last < infos[expected[0]].offset
    with headrace.load(plain, context=128) as one, headrace.load(ordered, context=128) as other:
        ids = one.tokenize(TEXT)[:60]
        assert np.array_equal(one.logits(ids), other.logits(ids))
