"""Models whose layers are stacks of blocks: written, loaded in any budget, changed while loaded."""

from __future__ import annotations

import errno
import itertools
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference_llama import ReferenceLlama
from test_check import check

import headrace
from headrace import cli
from headrace.cli_output import show
from headrace.compare import compare as measure
from headrace.compress import Sort, compress
from headrace.description import describe_model
from headrace.errors import BudgetError, HeadraceError, ModelFileError, UnsupportedError
from headrace.families import describe
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import Entry, build_header, open_model, tiled_type
from headrace.memory_plan import plan_model
from headrace.model import Model
from headrace.partial_file import PartialFile
from headrace.price import price_of
from headrace.sparse.bitstack import rebuild, unpack
from headrace.stack import Stack, stack_of
from headrace.stack_price import price_at
from headrace.standalone.export import export
from headrace.targets.host import pick_target
from headrace.write_stack import write_stack

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
LEVELS, RANK = 4, 2
IDS = [1, 403, 407, 261, 378, 432, 285, 286, 261, 400, 31, 72, 80, 90, 100, 110, 120, 130, 140, 150]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a stack; the matrices whose inputs are no multiple of 32 stay whole."""
    found = tmp_path_factory.mktemp("stack") / "stories.gguf"
    write_stack(STORIES, found, rank=RANK, levels=LEVELS)
    return found


def stack(path: Path) -> Stack:
    model = open_model(path)
    found = stack_of(model, describe(model))
    assert found is not None
    return found


def load(path: Path, **options: object) -> Model:
    return headrace.load(path, context=64, **options)  # type: ignore[arg-type]


def expected(path: Path, blocks: int) -> np.ndarray:
    """Logits by numpy, from the weights that the first blocks stand for."""
    model = ReferenceLlama(STORIES)
    by_matrix: dict[str, list] = {}
    with TensorReader() as reader:
        for one in stack(path).blocks[:blocks]:
            raw = np.empty(one.info.n_bytes, np.uint8)
            reader.readinto(one.info, 0, raw)
            by_matrix.setdefault(one.matrix.name, []).append(unpack(raw, one.shape))
    for name, found in by_matrix.items():
        model.weights[name] = rebuild(found).astype(np.float64)
    return model.logits(IDS)


def test_the_order_is_by_level(path: Path) -> None:
    found = stack(path)
    n = found.least
    assert len(found) == n * LEVELS and n == 6 * 5  # ffn_down has 172 inputs
    levels = [one.level for one in found.blocks]
    assert levels == sorted(levels)
    sizes = [found.n_bytes(count) for count in range(len(found) + 1)]
    assert all(a < b for a, b in itertools.pairwise(sizes))
    for count in (n, n + 1, len(found)):
        assert found.fitting(found.n_bytes(count)) == count
        assert found.fitting(found.n_bytes(count) - 1) == count - 1
        held = [one.level for one in found.blocks[:count]]
        most = {m: sum(o.matrix.name == m for o in found.blocks[:count]) for m in found.shapes}
        assert max(most.values()) - min(most.values()) <= 1, held


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_logits_are_those_of_the_rebuilt_weights(path: Path, levels: int) -> None:
    blocks = levels * stack(path).least
    wanted = expected(path, blocks)
    size = float(np.abs(wanted).max())
    with load(path) as model:
        beside = sum(model.prepared.parts.values()) - stack(path).n_bytes(len(stack(path)))
        model.memory = beside + stack(path).n_bytes(blocks)
        assert model.prepared.blocks == blocks
        long = model.logits(IDS)  # rebuilt tiles
        short = model.logits(IDS[:8])  # sign planes
        assert float(np.abs(long - wanted).max()) < 0.05 * size
        assert float(np.abs(short - wanted[:8]).max()) < 0.05 * size


@pytest.mark.parametrize("target", [None, "x86-64-v3"])
def test_checked_tokens_equal_decode(path: Path, target: str | None) -> None:
    if target is not None and pick_target().name.split("-")[0] != "x86":
        pytest.skip("for x86")
    with load(path, target=target) as model:
        for tokens in (2, 5, 16):
            check(model, 3, tokens)


def test_threads_do_not_change_a_bit(path: Path) -> None:
    found = []
    for threads in (1, 2, 3):
        with load(path, threads=threads) as model:
            found.append((model.logits(IDS), model.logits(IDS[:1]), model.logits(IDS[:7])))
    for one in found[1:]:
        for a, b in zip(found[0], one, strict=True):
            assert np.array_equal(a, b)


class _Reads:
    """Counts the bytes of files that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_bytes, self.calls, real = 0, 0, os.preadv

        def preadv(fd: int, buffers: list, offset: int) -> int:
            done = real(fd, buffers, offset)
            self.n_bytes += done
            self.calls += 1
            return done

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads cannot be counted")
def test_changing_the_budget_reads_the_difference(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stack(path)
    everything = len(found)
    with load(path) as model:
        fixed = sum(model.prepared.parts.values()) - found.n_bytes(everything)
        reads = _Reads(monkeypatch)

        def change(count: int) -> tuple[int, np.ndarray]:
            reads.n_bytes = reads.calls = 0
            model.memory = fixed + found.n_bytes(count)
            assert model.prepared.blocks == count
            assert reads.calls <= 1
            return reads.n_bytes, np.concatenate([model.logits(IDS), model.logits(IDS[:1])])

        _, all_logits = change(everything)
        n, fewer = change(everything - 1)
        assert n == 0 and not np.array_equal(fewer, all_logits)
        n, again = change(everything)
        assert n == found.n_bytes(everything) - found.n_bytes(everything - 1)
        assert np.array_equal(again, all_logits)
        n, least = change(found.least)
        assert n == 0
        for count in range(found.least + 1, found.least + 4):  # block by block
            n, _ = change(count)
            assert n == found.n_bytes(count) - found.n_bytes(count - 1)
        n, _ = change(everything - 1)
        assert n == found.n_bytes(everything - 1) - found.n_bytes(found.least + 3)
        _, back = change(found.least)
        assert np.array_equal(back, least)
        _, some = change(found.least + 7)
    with load(path, memory=fixed) as model:  # which takes less for activations
        model.memory = sum(model.prepared.parts.values()) + (
            found.n_bytes(found.least + 7) - found.n_bytes(model.prepared.blocks)
        )
        assert np.array_equal(model.logits(IDS), some[: len(IDS)])


def test_what_fewer_blocks_have_read_is_read_again(path: Path) -> None:
    """What is kept of a text belongs to the blocks that it was read with."""
    found = stack(path)
    with load(path) as model:
        everything = sum(model.prepared.parts.values())
        few = everything - found.n_bytes(len(found)) + found.n_bytes(found.least)
        fresh, logits = model.likeliest(IDS, 12), model.logits(IDS)
        for before, after in ((few, everything), (everything, few), (few, everything)):
            model.memory = before
            model.likeliest(IDS, 12)
            model.memory = after
            if after == everything:
                assert model.likeliest(IDS, 12) == fresh
                model.memory = before
                model.likeliest(IDS, 12)
                model.memory = after
                between = model.logits_between(IDS, len(IDS) - 1, len(IDS))
                np.testing.assert_array_equal(between, logits[-1:])
            else:
                assert len(model.blocks) == found.least
                small = model.likeliest(IDS, 12)
                model.forget()
                assert model.likeliest(IDS, 12) == small


def test_too_little_memory_names_the_least(path: Path) -> None:
    with pytest.raises(BudgetError, match="blocks") as refused:
        load(path, memory="60MB")
    needed = refused.value.needed_bytes
    with load(path, memory=needed) as model:
        assert model.prepared.blocks == stack(path).least
    with pytest.raises(BudgetError):
        load(path, memory=needed - 4096)
    with load(path) as model:
        before = model.logits(IDS)
        with pytest.raises(BudgetError, match="keeps its context of 64 tokens and its chunks of"):
            model.memory = "60MB"
        assert np.array_equal(model.logits(IDS), before)


def _rewritten(path: Path, to: Path, entries: list[Entry]) -> Path:
    """The file with other descriptions; what the bytes are does not matter, they are zeros."""
    header, _, size = build_header(open_model(path), entries)
    with open(to, "wb") as file:
        file.write(header)
        file.truncate(size)
    return to


def _entries(path: Path) -> list[Entry]:
    return [
        Entry(i.name, i.type, i.shape, i.n_bytes, i.type.removeprefix("tiled "))
        if i.type.startswith("tiled ")
        else Entry(i.name, i.type, i.shape, i.n_bytes)
        for i in open_model(path).tensors.values()
    ]


def test_stacks_that_make_no_sense_are_refused(path: Path, tmp_path: Path) -> None:
    good = _entries(path)
    blocks = [i for i, e in enumerate(good) if ".block" in e.name]
    first, second = blocks[0], blocks[len(blocks) // LEVELS]
    plain = Entry("blk.0.attn_q.weight", "F32", (64, 64), 64 * 64 * 4)
    other = good[first]._replace(format="bitstack_k3", type=tiled_type("bitstack_k3"))

    def swapped(a: int, b: int) -> list[Entry]:
        entries = list(good)
        entries[a], entries[b] = entries[b], entries[a]
        return entries

    def put(at: int, entry: Entry) -> list[Entry]:
        return [*good[:at], entry, *good[at + 1 :]]

    cases: list[tuple[list[Entry], type[Exception], str]] = [
        (good[:first] + good[first + 1 :], ModelFileError, "comes before block 0"),
        (swapped(first, second), ModelFileError, "comes before block 0"),
        (swapped(second - 1, second + 1), ModelFileError, "second blocks|comes before block 0"),
        ([*good, plain], ModelFileError, "whole, too"),
        (put(first, other), UnsupportedError, "bitstack_k3"),
        (put(first, good[first]._replace(name="no.such.block0")), ModelFileError, "of no matrix"),
        (put(first, good[first]._replace(n_bytes=4096)), ModelFileError, "4,096 bytes"),
        (put(first, good[first]._replace(shape=(32, 64))), ModelFileError, "shape"),
        ([*good[: first + 3], plain._replace(name="x", shape=(64,), n_bytes=256),
          *good[first + 3 :]], ModelFileError, "does not lie behind"),
    ]  # fmt: skip
    assert load(_rewritten(path, tmp_path / "good.gguf", good)).prepared.blocks == len(blocks)
    for i, (entries, error, message) in enumerate(cases):
        with pytest.raises(error, match=message):
            load(_rewritten(path, tmp_path / f"{i}.gguf", entries))


def test_a_stack_is_neither_exported_nor_stacked_again(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stacks"):
        export(path, pick_target(), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="a stack already"):
        write_stack(path, tmp_path / "again.gguf")
    for options in (
        {},
        {"format": "q4_0"},
        {"format": "bitstack", "method": "rtn"},
        {"evaluate": TEXT},
    ):
        with pytest.raises(UnsupportedError, match="a stack already: take its source"):
            compress(path, tmp_path / "again.gguf", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_plans_and_listings_know_stacks(path: Path) -> None:
    found = stack(path)
    listed = describe_model(path)
    assert listed["parameters"] == describe_model(STORIES)["parameters"]
    kinds = {row["type"]: row for row in listed["types"]}
    assert kinds[f"tiled bitstack_k{RANK}"]["tensors"] == len(found)
    assert kinds[f"tiled bitstack_k{RANK}"]["loads_as"] == "kernel"
    whole = plan_model(path, context=64)
    assert whole.blocks == whole.blocks_in_file == len(found) and whole.all_in_memory
    assert whole.predicted_tok_s is not None and not whole.notices()
    less = plan_model(path, memory=whole.peak_bytes - 1, context=64, measure=False)
    assert found.least <= less.blocks <= len(found)


def test_threads_write_the_same_file(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "s.gguf"
    write_stack(STORIES, again, rank=RANK, levels=LEVELS, n_threads=3)
    assert again.read_bytes() == path.read_bytes()


def test_the_command_writes_a_stack(tmp_path: Path) -> None:
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside. " * 8
    done = compress(
        STORIES, tmp_path / "s.gguf", format="bitstack", calibrate=text, calibrate_tokens=512
    )
    with load(done.path) as model:
        assert model.format == "bitstack_k1" and len(model.blocks) == 16 * 30
        assert repr(model.blocks) == "<480 blocks of 30 matrices, 497 kB>"
        assert repr(model.blocks[-1]).startswith("<block 15 of blk.")
        assert "".join(model.generate("Once upon a time", raw=True, max_tokens=8)).strip()
    assert not list(tmp_path.glob(".s*"))
    with pytest.raises(UnsupportedError, match="--method search"):
        compress(STORIES, tmp_path / "t.gguf", format="bitstack", method="search")


def test_the_rank_can_be_chosen(path: Path, tmp_path: Path) -> None:
    found = stack(
        by_command(
            tmp_path / "s.gguf", "--format", "bitstack", "--method", "rtn", "--rank", str(RANK)
        )
    )
    assert {one.shape.rank for one in found.blocks} == {RANK}
    ours = {one.info.name: one.info.n_bytes for one in stack(path).blocks}
    assert ours.items() <= {one.info.name: one.info.n_bytes for one in found.blocks}.items()
    for rank in (0, -1, 3, 32):
        with pytest.raises(UnsupportedError, match=f"--rank is one of 1, 2, 4, 8, 16, not {rank}$"):
            compress(STORIES, tmp_path / "t.gguf", format="bitstack", method="rtn", rank=rank)
    with pytest.raises(UnsupportedError, match="--rank is for --format bitstack"):
        compress(STORIES, tmp_path / "t.gguf", format="q4_0", rank=2)


def by_command(target: Path, *options: str) -> Path:
    """A file written by the command."""
    assert cli.main(["compress", str(STORIES), str(target), *options]) == 0
    return target


TEXT = (
    "Once upon a time there was a little girl called Lily. She liked to play in the park with her "
    "dog. One day the dog ran after a big red ball, and Lily could not find it. She was very sad. "
) * 20


class _Stop(Exception):
    """Instead of Ctrl-C."""


@pytest.mark.parametrize("where", ["decomposing", "writing", "windows"])
def test_what_was_interrupted_goes_on(where: str, tmp_path: Path) -> None:
    options = {"format": "bitstack", "calibrate": TEXT, "calibrate_tokens": 256, "threads": 1}
    options |= {"evaluate": TEXT, "evaluate_tokens": 512}
    whole = compress(STORIES, tmp_path / "whole.gguf", **options)  # type: ignore[arg-type]
    seen: list[tuple[int, int | None]] = []

    def stop(done: int, total: int | None, what: str) -> None:
        if what == where:
            seen.append((done, total))
            if total is not None and done >= total // 2:
                raise _Stop

    target = tmp_path / "s.gguf"
    with pytest.raises(_Stop):
        compress(STORIES, target, progress=stop, **options)  # type: ignore[arg-type]
    assert not target.exists() and list(tmp_path.glob(".s.gguf*.part"))
    told: list[str] = []
    again: list[tuple[int, str]] = []
    done = compress(
        STORIES, target, notice=told.append,
        progress=lambda done, total, what: again.append((done, what)), **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert any("going on after" in line for line in told)
    decomposed = [n for n, what in again if what == "decomposing"]
    assert len(decomposed) == (15 if where == "decomposing" else 0)
    assert target.read_bytes() == whole.path.read_bytes()
    assert done.price == whole.price
    assert not list(tmp_path.glob(".s*"))


def test_other_options_begin_anew(tmp_path: Path) -> None:
    target, other = tmp_path / "s.gguf", tmp_path / "other.gguf"

    def stop(done: int, total: int | None, what: str) -> None:
        if what == "decomposing" and done == 5:
            raise _Stop

    with pytest.raises(_Stop):
        compress(STORIES, target, format="bitstack", method="rtn", threads=1, progress=stop)
    options = {"calibrate": TEXT, "calibrate_tokens": 256}
    told: list[str] = []
    compress(STORIES, target, format="bitstack", notice=told.append, **options)  # type: ignore[arg-type]
    assert sum("begun anew" in line for line in told) == 1
    compress(STORIES, other, format="bitstack", **options)  # type: ignore[arg-type]
    assert target.read_bytes() == other.read_bytes()


def test_a_price_begins_nothing_anew(tmp_path: Path) -> None:
    """Blocks do not depend on it, nor tensors of the file."""
    target, wanted = tmp_path / "s.gguf", tmp_path / "wanted.gguf"
    priced = {"evaluate": TEXT, "evaluate_tokens": 512}
    write = partial(compress, STORIES, format="bitstack", method="rtn", threads=1)

    def stop(done: int, total: int | None, what: str) -> None:
        if (what, done) == where:
            raise _Stop

    where = "decomposing", 5
    with pytest.raises(_Stop):
        write(target, progress=stop)
    where = "windows", 1
    told: list[str] = []
    with pytest.raises(_Stop):
        write(target, progress=stop, notice=told.append, **priced)
    assert len(told) == 1 and "resuming what was interrupted" in told[0]
    assert "going on after 5 of 30 matrices, which are in" in told[0]
    write(target, notice=told.append)
    assert "going on after 30 of 30 matrices" in told[1]
    assert len(told) == 3 and "tensors, which are in" in told[2]
    write(wanted)
    assert target.read_bytes() == wanted.read_bytes()


def test_blocks_go_when_another_format_is_written(tmp_path: Path) -> None:
    target = tmp_path / "s.gguf"

    def stop(done: int, total: int | None, what: str) -> None:
        if (what, done) == ("decomposing", 5):
            raise _Stop

    def measured() -> Path:
        with pytest.raises(_Stop), PartialFile(tmp_path / "s.gguf.losses", "key", 8) as losses:
            losses.finish(1)
            raise _Stop
        assert losses.path.exists()
        return losses.path

    fcntl = pytest.importorskip("fcntl")
    tried = measured()
    with pytest.raises(_Stop):
        compress(STORIES, target, format="bitstack", method="rtn", threads=1, progress=stop)
    assert not tried.exists()  # nothing is tried without --sort perplexity
    (left,) = tmp_path.glob(".*.part")
    assert left.stat().st_size > 10_000
    assert measured() == tried
    with left.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HeadraceError, match="another process is writing"):
            compress(STORIES, target, format="q4_0")
    assert left.exists()
    told: list[str] = []
    compress(STORIES, target, format="q4_0", notice=told.append)
    assert [line for line in told if str(left) in line and "was of other options" in line]
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_fills_up_leaves_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, full, real = tmp_path / "s.gguf", list[int](), os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    def fill(done: int, total: int | None, what: str) -> None:
        if what == "writing":
            full.append(done)

    monkeypatch.setattr("headrace.partial_file.os.pwrite", pwrite)
    with pytest.raises(HeadraceError, match=r"No space left on device; what is decomposed stays"):
        compress(STORIES, target, format="bitstack", method="rtn", threads=1, progress=fill)
    assert len(list(tmp_path.glob(".s.gguf.blocks*"))) == len(list(tmp_path.iterdir())) == 2
    full.clear()
    told: list[str] = []
    compress(STORIES, target, format="bitstack", method="rtn", threads=1, notice=told.append)
    assert len(told) == 1 and "going on after 30 of 30 matrices" in told[0]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("sort", ["error", "perplexity"])
def test_the_disk_is_asked_before_the_work(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort: Sort
) -> None:
    """It must have room for the blocks, and for the file or one to try blocks in."""
    needed = path.stat().st_size + sum(8 + one.info.n_bytes for one in stack(path).blocks)
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("headrace.partial_file.shutil.disk_usage", lambda _: usage)

    def working(done: int, total: int | None, what: str) -> None:
        raise _Stop

    def measure(trial: Path, losses: PartialFile) -> None:
        check()
        losses.write(0, np.full((LEVELS - 1) * stack(path).least, np.nan).view(np.uint8))
        losses.finish((LEVELS - 1) * stack(path).least)

    def check() -> None:
        taken.append(sum(one.stat().st_size for one in tmp_path.iterdir()))

    taken = list[int]()
    write = partial(
        write_stack, STORIES, tmp_path / "s.gguf", rank=RANK, levels=LEVELS, progress=working,
        measure=measure if sort == "perplexity" else None,
    )  # fmt: skip
    with pytest.raises(HeadraceError, match=r"free, and s.gguf takes .* until the order"):
        write()
    assert not list(tmp_path.iterdir())
    usage.free = needed
    with pytest.raises(_Stop):
        write()
    write(progress=None, check=check)
    assert needed <= max(taken) < needed + 10_000  # journals and losses are small
    assert len(taken) == (1 if sort == "error" else 2)


def test_the_price_of_levels_stands_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = compress(
        STORIES, tmp_path / "s.gguf", format="bitstack", calibrate=TEXT, calibrate_tokens=1024,
        evaluate=TEXT, evaluate_tokens=512,
    ).path  # fmt: skip
    price = price_of(open_model(path))
    assert price is not None and price["tokens"] == 255
    assert [one["level"] for one in price["levels"]] == [1, 2, 3, 4, 6, 8, 12]
    divergences = [one["kl_divergence"] for one in price["levels"]] + [price["kl_divergence"]]
    assert divergences == sorted(divergences, reverse=True) and divergences[0] > divergences[-2] > 0
    # It is what `compare` says of a budget with these blocks.
    with load_wide(STORIES) as source, load_wide(path) as model:
        found = stack(path)
        fixed = sum(model.prepared.parts.values()) - found.n_bytes(len(found))
        for one in price["levels"][1::3]:
            model.memory = fixed + found.n_bytes(one["level"] * found.least)
            again = measure(source, model, TEXT, context=512, chunks=1)
            assert again["kl_divergence"] == pytest.approx(one["kl_divergence"], rel=1e-6)
    _shown_with_levels_between(path, price, capsys)


def _shown_with_levels_between(
    path: Path, price: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 16 levels those that were not measured lie between those that were, and it says so."""
    listed = describe_model(path)["price"]
    assert {**listed, "levels": 0} == {**price, "levels": 0}
    rows = {one["level"]: one for one in listed["levels"]}
    assert [*rows] == [*range(1, 17)]
    for one in price["levels"]:
        assert rows[one["level"]].items() >= {**one, "how": "measured"}.items()
    assert rows[16]["kl_divergence"] == price["kl_divergence"]
    sizes = [one["weights_bytes"] for one in listed["levels"]]
    assert sizes == sorted(sizes) and sizes[-1] < path.stat().st_size
    found = [one["kl_divergence"] for one in listed["levels"]]
    assert found == sorted(found, reverse=True)
    five = rows[5]
    assert five["how"] == "interpolated"
    halfway = (rows[4]["kl_divergence"] * rows[6]["kl_divergence"]) ** 0.5  # by bytes, about
    assert five["kl_divergence"] == pytest.approx(halfway, rel=0.02)
    assert rows[4]["top_agreement"] <= five["top_agreement"] <= rows[6]["top_agreement"]
    show(listed, False)
    shown = capsys.readouterr().out
    for command in ("plan", "inspect"):
        assert cli.main([command, str(path)]) == 0
        assert f"\nprice\n{shown}" in capsys.readouterr().out
    whole, blocks = plan_model(path, context=64, measure=False), stack(path)
    assert whole.price_in_memory is None
    fixed = whole.peak_bytes - blocks.n_bytes(len(blocks))
    for count, how in ((4 * 30, "measured"), (4 * 30 + 7, "interpolated")):
        with load(path) as model:
            model.memory = fixed + blocks.n_bytes(count)
            plan = model.plan
        here = plan.price_in_memory
        assert here is not None and (here["blocks"], here["how"]) == (count, how)
        assert rows[5]["kl_divergence"] < here["kl_divergence"] <= rows[4]["kl_divergence"]
        ratio = f"{here['perplexity_ratio']:.3g}"
        assert f"(perplexity {ratio} times the source's on the text" in plan.notices()[0]
        assert how in plan.notices()[0]


def test_below_what_was_measured_there_is_no_price(path: Path) -> None:
    rates = {"kl_divergence": 0.0, "top_agreement": 1.0, "perplexity_ratio": 1.0}
    price = {**rates, "levels": [{"level": 2, **rates, "kl_divergence": 0.5}]}
    blocks = stack(path)
    assert price_at(price, blocks, 2 * blocks.least - 1) is None
    exact = price_at(price, blocks, 2 * blocks.least)
    assert exact is not None and exact["how"] == "measured" and exact["kl_divergence"] == 0.5
    between = price_at(price, blocks, 3 * blocks.least)  # towards 0 in a straight line
    assert between is not None and between["kl_divergence"] == pytest.approx(0.25, rel=0.01)


def load_wide(path: Path) -> Model:
    return headrace.load(path, context=512)


def test_too_little_memory_to_decompose_in(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="--memory"):
        compress(STORIES, tmp_path / "s.gguf", format="bitstack", method="rtn", memory=110_450_000)
    assert not list(tmp_path.iterdir())
