"""The order of a stack's blocks by the model's own perplexity, as BitStack's paper has it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from reference_llama import ReferenceLlama

import headrace
from headrace.compress import compress
from headrace.errors import UnsupportedError
from headrace.families import describe
from headrace.loaders.gguf import TensorReader
from headrace.loaders.progress import Progress
from headrace.loaders.tiled import open_model
from headrace.model import Model
from headrace.planning import bounds
from headrace.sparse.bitstack import rebuild, unpack
from headrace.stack import Stack, stack_of
from headrace.stack_order import WINDOW, WINDOWS, measure_blocks
from headrace.write_stack import write_stack

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
LEVELS = 3
TEXT = (
    "Once upon a time there was a little girl called Lily. She liked to play in the park with her "
    "dog. One day the dog ran after a big red ball, and Lily could not find it. She was very sad. "
) * 20
LEAST = 30  # matrices of stories260K that are stacked


def write(
    target: Path, *, told: list[str] | None = None, progress: Progress | None = None,
    memory: int | None = None,
) -> Path:  # fmt: skip
    """A stack in the order by perplexity."""
    say = (told if told is not None else []).append
    measure = partial(
        measure_blocks, text=TEXT, threads=1, memory=memory, progress=progress, notice=say,
    )  # fmt: skip
    write_stack(STORIES, target, rank=1, levels=LEVELS, measure=measure, notice=say)
    return target


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("order") / "s.gguf")


@pytest.fixture(scope="module")
def by_error(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("order") / "s.gguf"
    write_stack(STORIES, found, rank=1, levels=LEVELS)
    return found


def stack(path: Path) -> Stack:
    model = open_model(path)
    found = stack_of(model, describe(model))
    assert found is not None and len(found) == LEVELS * LEAST
    return found


def names(path: Path, level: int) -> list[str]:
    """Matrices whose blocks of a level come one after the other."""
    return [one.matrix.name for one in stack(path).blocks if one.level == level]


def loss(model: Model) -> float:
    """Of all tokens of the windows that blocks are tried on."""
    ids = np.array(model.tokenizer.encode(TEXT, add_special=True, parse_special=False))
    found = []
    for i in range(WINDOWS):
        window = ids[i * WINDOW : (i + 1) * WINDOW].copy()
        window[0] = model.tokenizer.bos_id
        p = np.exp(model.logits(window.tolist())[:-1].astype(np.float64))
        right = p[np.arange(WINDOW - 1), window[1:]] / p.sum(axis=1)
        found.append(-np.log(right).mean())
    return float(np.mean(found))


def test_a_model_computes_with_the_blocks_it_is_told(path: Path) -> None:
    ids = [1, 403, 407, 261, 378, 432, 285, 286, 261, 400, 31, 72, 80, 90, 100, 110, 120, 130]
    counts = {name: 1 + i % LEVELS for i, name in enumerate(names(path, 0))}
    model = ReferenceLlama(STORIES)
    by_matrix: dict[str, list] = {}
    with TensorReader() as reader:
        for one in stack(path).blocks:
            if one.level < counts[one.matrix.name]:
                raw = np.empty(one.info.n_bytes, np.uint8)
                reader.readinto(one.info, 0, raw)
                by_matrix.setdefault(one.matrix.name, []).append(unpack(raw, one.shape))
    for name, found in by_matrix.items():
        model.weights[name] = rebuild(found).astype(np.float64)
    wanted = model.logits(ids)
    with headrace.load(path, context=64) as loaded:
        whole = loaded.logits(ids)
        loaded.compute_with(counts)
        part = loaded.logits(ids)
        size = float(np.abs(wanted).max())
        assert float(np.abs(part - wanted).max()) < 0.05 * size
        assert float(np.abs(whole - wanted).max()) > 0.2 * size
        loaded.compute_with(None)
        assert np.array_equal(loaded.logits(ids), whole)


def test_blocks_come_in_the_order_of_perplexity(path: Path, by_error: Path) -> None:
    assert names(path, 0) == names(by_error, 0)
    with headrace.load(path, context=WINDOW, threads=1) as model:
        for level in range(1, LEVELS):
            order = names(path, level)
            assert sorted(order) == sorted(names(by_error, level)) and order != names(
                by_error, level
            )
            found = []
            for name in order:
                model.compute_with({**dict.fromkeys(order, level), name: level + 1})
                found.append(loss(model))
            assert np.diff(found).min() > -1e-6, found
            assert found[-1] - found[0] > 0.01
        # The first of a level is what a budget of one block more gives.
        model.compute_with(None)
        fixed = sum(model.prepared.parts.values()) - stack(path).n_bytes(LEVELS * LEAST)
        model.memory = fixed + stack(path).n_bytes((LEVELS - 1) * LEAST + 1)
        assert loss(model) == pytest.approx(found[0], abs=1e-6)


class _Stop(Exception):
    """Instead of Ctrl-C."""


def test_what_was_interrupted_goes_on(path: Path, tmp_path: Path) -> None:
    target, tried, told = tmp_path / "s.gguf", list[int](), list[str]()

    def stop(done: int, total: int | None, what: str) -> None:
        tried.append(done)
        if done == 40:
            raise _Stop

    with pytest.raises(_Stop):
        write(target, told=told, progress=stop)
    assert any(line.startswith("trying 57 blocks takes about") for line in told), told
    assert not target.exists()
    write(target, told=told, progress=lambda done, total, what: tried.append(done))
    assert tried == list(range(1, LEAST * (LEVELS - 1) + 1))
    assert any("going on after 40 of 60 blocks that were tried" in line for line in told)
    assert target.read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".s*"))


def test_levels_without_room_are_ordered_by_error(
    path: Path, by_error: Path, tmp_path: Path
) -> None:
    options = {"context": WINDOW, "logits_rows": WINDOW, "threads": 1}
    least, _ = bounds(path, **options)  # type: ignore[arg-type]  # with the first blocks
    n_bytes = stack(path).n_bytes
    memory = least + n_bytes(LEVELS * LEAST - 1) - n_bytes(LEAST)
    told: list[str] = []
    found = write(tmp_path / "s.gguf", told=told, memory=memory)
    assert any("room for 2 of 3 levels" in line for line in told), told
    assert names(found, 1) == names(path, 1) != names(by_error, 1)
    assert names(found, 2) == names(by_error, 2) != names(path, 2)


def test_the_command_asks_for_a_text(tmp_path: Path) -> None:
    target = tmp_path / "s.gguf"
    for options in ({"format": "bitstack", "method": "rtn"}, {"format": "q4_0", "calibrate": TEXT}):
        with pytest.raises(UnsupportedError, match="--sort perplexity is for --format bitstack"):
            compress(STORIES, target, sort="perplexity", **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="--sort is one of error, perplexity, not 'size'"):
        compress(STORIES, target, format="bitstack", method="rtn", sort="size")  # type: ignore[arg-type]
    assert not target.exists()
