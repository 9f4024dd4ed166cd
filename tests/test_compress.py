"""Compressing into other formats: what is written, and what happens when it is interrupted."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_directory as hf
import numpy as np
import pytest
from test_tiled import VOCABULARY, write_model

import headrace
from headrace import cli
from headrace.calibration import LayerInputs
from headrace.compress import compress
from headrace.errors import BudgetError, HeadraceError, ModelFileError, UnsupportedError
from headrace.families import describe
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import format_name, open_model
from headrace.placing import place
from headrace.price import price_of
from headrace.recipe import WRITTEN
from headrace.rows import read_tiled
from headrace.sparse.gptq import gptq, inverse_factor, output_errors
from headrace.sparse.registry import FORMATS

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
TEXT = (
    "Once upon a time there was a little girl called Lily. She liked to play in the park with her "
    "dog. One day the dog ran after a big red ball, and Lily could not find it. She was very sad. "
) * 20
GRIDS = sorted(name for name, fmt in FORMATS.items() if fmt.grid is not None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "s.gguf", ["F32"])


def raw_of(path: Path, only: str | None = None) -> dict[str, tuple[str, np.ndarray]]:
    """Format and raw rows of each matrix, as a pass reads them."""
    model = open_model(path)
    found = {}
    with TensorReader() as reader:
        for p in place(model, describe(model), "q8"):
            if only in (None, p.matrix.name):
                tiled = np.concatenate(list(read_tiled(reader, p)))
                fmt = p.format
                shape = -1, p.matrix.columns // fmt.block, fmt.tile_block_bytes
                found[p.matrix.name] = fmt.name, fmt.untile(tiled.reshape(shape), p.matrix.rows)
    return found


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {name: FORMATS[fmt].decode(raw) for name, (fmt, raw) in raw_of(path).items()}


# --- formats and methods --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_each_format_is_what_its_encoder_makes(source: Path, tmp_path: Path, name: str) -> None:
    path = compress(source, tmp_path / "m.gguf", format=name, ends=name, method="rtn").path
    expected, fmt = weights_of(source), FORMATS[name]
    for tensor, (found, raw) in raw_of(path).items():
        assert found == name
        assert raw.tobytes() == fmt.encode(expected[tensor]).tobytes(), tensor


def test_ends_have_a_format_of_their_own(source: Path, tmp_path: Path) -> None:
    def ends(path: Path, **options: Any) -> set[str]:
        found = raw_of(compress(path, tmp_path / "m.gguf", force=True, **options).path)
        return {found[f"{name}.weight"][0] for name in ("token_embd", "output")}

    assert ends(source, format="q4_0") == {"q8_0"}
    assert ends(source, format="q4_0", ends="q5_0") == {"q5_0"}
    assert ends(source, format="q4_0", ends="keep") == {"f32"}
    assert ends(source) == {"f32"}
    small = write_model(tmp_path / "s.gguf", ["Q4_0"])
    assert ends(small, format="q8_0") == {"q4_0"}  # has no more than 8.5 bits


def test_splits_of_floats_that_suit_each_matrix(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", ["F32"])
    rng = np.random.default_rng(3)
    powers = np.exp2(rng.integers(-3, 4, 1 << 16)) * rng.choice([-1, 1], 1 << 16)
    kinds = {
        "e2m1": ("blk.0.attn_q.weight", rng.standard_normal(1 << 16)),
        "e1m2": ("blk.0.attn_output.weight", rng.uniform(-1, 1, 1 << 16)),
        "e3m0": ("blk.1.attn_q.weight", powers),
    }
    model = open_model(path)
    with path.open("rb+") as file:
        for name, values in kinds.values():
            info = model.tensors[name]
            assert info.n_bytes == 4 * len(values)
            file.seek(info.offset)
            file.write(values.astype(np.float32).tobytes())
    made = compress(path, tmp_path / "a.gguf", format="llm_fp4").path
    found = raw_of(made)
    for split, (name, _) in kinds.items():
        assert found[name][0] == f"{split}_g128"
    ids = list(range(1, 40))
    with headrace.load(made) as coded, headrace.load(made, activations="f32") as floats:
        y, x = coded.logits(ids), floats.logits(ids)
    assert np.corrcoef(y.ravel(), x.ravel())[0, 1] > 0.999


def test_rows_that_no_format_of_a_choice_divides(tmp_path: Path) -> None:
    """stories260K has rows of 64 and 172 weights."""
    for name in ("llm_fp4", "i4_auto"):
        done = compress(STORIES, tmp_path / f"{name}.gguf", format=name)
        assert any("rows of 172 get" in line for line in done.remarks)


def test_group_sizes_that_suit_each_matrix(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", ["F32"])
    uneven = "blk.1.ffn_up.weight"
    info = open_model(path).tensors[uneven]
    rng = np.random.default_rng(3)
    with path.open("rb+") as file:  # runs of 32 weights that differ in size
        sizes = np.repeat(np.exp(rng.standard_normal(info.n_bytes // 128)), 32)
        file.seek(info.offset)
        file.write((sizes * rng.standard_normal(len(sizes))).astype(np.float32).tobytes())
    found = raw_of(compress(path, tmp_path / "a.gguf", format="i4_auto").path)
    names = {name: fmt for name, (fmt, _) in found.items() if name.startswith("blk.")}
    assert names.pop(uneven) == "i4_g32"
    assert set(names.values()) == {"i4_g128"}
    with pytest.raises(HeadraceError, match="i4_auto is for --format alone"):
        compress(path, tmp_path / "b.gguf", ends="i4_auto")


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    done = compress(STORIES, tmp_path / "m.gguf", format="q4_k", method="rtn")
    by_columns = {
        info.shape[-1]: format_name(info.type)
        for name, info in open_model(done.path).tensors.items()
        if name.startswith("blk.") and len(info.shape) == 2
    }
    for columns, name in by_columns.items():
        fmt = FORMATS[str(name)]
        assert columns % fmt.block == 0
        assert fmt.bits_per_weight >= FORMATS["q4_k"].bits_per_weight
        for other in FORMATS.values():
            fits = columns % other.block == 0
            if fits and other.bits_per_weight >= FORMATS["q4_k"].bits_per_weight:
                assert fmt.bits_per_weight <= other.bits_per_weight
    assert set(by_columns) == {64, 172}
    assert any("5 matrices with rows of 172 get" in line for line in done.remarks)
    assert any("30 matrices with rows of 64 get" in line for line in done.remarks)


def test_what_has_the_format_is_copied(tmp_path: Path) -> None:
    small = write_model(tmp_path / "s.gguf", ["Q4_0"])
    kept = compress(small, tmp_path / "keep.gguf").path
    again = compress(small, tmp_path / "q4_0.gguf", format="q4_0", method="search").path
    assert kept.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["q4_0", "q4_1"])
def test_searched_scales_are_better_than_the_encoder(name: str, tmp_path: Path) -> None:
    exact = weights_of(STORIES)
    errors = {}
    for method in ("rtn", "search"):
        path = compress(STORIES, tmp_path / method, format=name, method=method).path  # type: ignore
        found = weights_of(path)
        errors[method] = sum(
            float(((found[n] - w) ** 2).sum()) for n, w in exact.items() if "down" not in n
        )
    assert errors["search"] < 0.97 * errors["rtn"]


def test_gptq_is_nearer_to_the_model_than_the_encoder(tmp_path: Path) -> None:
    text = TEXT[: len(TEXT) // 2]
    price = {}
    for method, options in (("rtn", {}), ("gptq", {"calibrate": TEXT})):
        done = compress(
            STORIES,
            tmp_path / method,
            format="q4_0",
            evaluate=text,
            **options,  # type: ignore
        )
        assert done.price is not None
        price[method] = done.price["kl_divergence"]
    assert 0 < price["gptq"] < 0.8 * price["rtn"]


def quick(name: str) -> bool:
    """One of our own formats stands for those that are made alike."""
    return FORMATS[name].ggml_type is not None or name in ("i4a_g64", "i2_g64")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if quick(name) else [pytest.mark.slow])
        for name in GRIDS
        if FORMATS[name].block <= 64
    ],
)
def test_every_grid_can_be_rounded_to_by_gptq(name: str, tmp_path: Path) -> None:
    path = compress(STORIES, tmp_path / "m.gguf", format=name, calibrate=TEXT).path
    found = raw_of(path)
    assert found["blk.0.attn_q.weight"][0] == name
    exact, rounded = weights_of(STORIES), weights_of(path)
    q = "blk.0.attn_q.weight"
    assert np.abs(rounded[q] - exact[q]).max() < np.abs(exact[q]).max()
    with headrace.load(path, threads=1, context=64) as model:
        assert np.isfinite(model.logits([1, 5, 9])).all()


def test_a_directory_of_safetensors_is_a_source(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "gemma3", dtype="BF16", shards=2)
    done = compress(
        folder, tmp_path / "m.gguf", format="q4_0", calibrate=TEXT, calibrate_tokens=500,
        evaluate=TEXT, evaluate_tokens=500,
    )  # fmt: skip
    assert done.price is not None
    assert 0 < done.price["kl_divergence"] < 0.5
    assert price_of(open_model(done.path)) == done.price


# --- the price tag --------------------------------------------------------------------------------


def test_the_price_stands_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    path = str(tmp_path / "m.gguf")
    command = [
        "compress",
        str(STORIES),
        path,
        "--format",
        "q4_0",
        "--evaluate",
        str(text),
        "--json",
    ]
    assert cli.main(command) == 0
    price = json.loads(capsys.readouterr().out)["price"]
    assert price_of(open_model(path)) == price
    assert cli.main(["compare", str(STORIES), path, str(text), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    for name in ("kl_divergence", "top_agreement", "perplexity_ratio", "tokens"):
        assert price[name] == pytest.approx(compared[name], rel=1e-6)
    for command in (["inspect", path, "--json"], ["plan", path, "--json"]):
        assert cli.main(command) == 0
        assert json.loads(capsys.readouterr().out)["price"] == price
    # It belongs to that file alone.
    assert price_of(open_model(compress(path, tmp_path / "again.gguf").path)) is None


# --- interrupted, refused -------------------------------------------------------------------------


class _Stop:
    """Interrupts when so many bytes are written."""

    def __init__(self, share: float) -> None:
        self.share, self.seen = share, list[int]()

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if what == "writing" and total:
            self.seen.append(done)
            if done > self.share * total:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose inputs go together closely, with groups of weights that differ in size."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tied") / "tied.gguf"
    path.write_bytes(STORIES.read_bytes())
    two = rng.standard_normal((512, 2)) @ rng.standard_normal((2, 64))
    size = np.exp(2 * rng.standard_normal((64, 2))).repeat(32, axis=1)
    new = {
        "token_embd": two * np.exp(1.5 * rng.standard_normal(64)) + rng.random((512, 64)) / 100,
        "blk.0.attn_q": rng.standard_normal((64, 64)) * size,
    }
    with path.open("rb+") as file:
        for name, values in new.items():
            info = open_model(path).tensors[f"{name}.weight"]
            assert info.n_bytes == 4 * values.size
            file.seek(info.offset)
            file.write(values.astype("<f4").tobytes())
    return path


@pytest.mark.parametrize("name", ["i4a_g32", "s24_g32", "gqs_g16"])
def test_rows_that_gptq_makes_worse_are_counted(name: str, tied: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = compress(
        tied, tmp_path / "m.gguf", format=name, calibrate=TEXT, calibrate_tokens=512,
        notice=said.append,
    )  # fmt: skip
    told = re.search(r"^(\d+) rows rounded to nearest, as what gptq moves.*", done.remarks[-1])
    assert told is not None
    assert int(told[1]) > 5
    assert told[0] in said


def test_remarks_are_of_the_whole_after_an_interruption(tied: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "q4_0", "calibrate": TEXT, "calibrate_tokens": 512}
    whole = compress(tied, tmp_path / "whole.gguf", **options).remarks
    assert "rows rounded to nearest" in whole[-1]
    with pytest.raises(KeyboardInterrupt):
        compress(tied, tmp_path / "m.gguf", progress=_Stop(0.7), **options)
    assert compress(tied, tmp_path / "m.gguf", **options).remarks == whole


def test_a_calibration_with_fewer_tokens_than_inputs_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "q4_0", "calibrate": TEXT, "force": True}
    for tokens, told in ((48, True), (512, False)):
        said: list[str] = []
        compress(
            STORIES, tmp_path / "m.gguf", calibrate_tokens=tokens, notice=said.append, **options
        )
        assert any("48 tokens, fewer than the 64 inputs" in line for line in said) == told


def test_progress_ends_with_all(tmp_path: Path) -> None:
    last = _Stop(2)
    done = compress(STORIES, tmp_path / "m.gguf", format="q4_0", progress=last)
    assert last.seen[-1] == done.size_bytes


def test_a_window_is_the_least_that_is_evaluated(tmp_path: Path) -> None:
    said: list[str] = []
    compress(
        STORIES, tmp_path / "m.gguf", format="q4_0", evaluate=TEXT, evaluate_tokens=100,
        notice=said.append,
    )  # fmt: skip
    assert any("windows of 512 tokens, of which one is the least" in line for line in said)


def test_no_row_is_further_off_than_rounded_to_nearest(tied: Path, tmp_path: Path) -> None:
    """GPTQ alone makes some of these worse."""
    fmt, name = FORMATS["q4_0"], "blk.0.attn_q.weight"
    grid = fmt.grid
    assert grid is not None
    done = compress(tied, tmp_path / "m.gguf", format="q4_0", calibrate=TEXT, calibrate_tokens=512)
    model = open_model(tied)
    with LayerInputs(model, describe(model), TEXT, 512, 1, None) as inputs:
        of_queries = inputs.of(name)
        assert of_queries is not None
        h, importance = of_queries.h.copy(), of_queries.importance
    source = weights_of(compress(tied, tmp_path / "f.gguf").path)[name]
    scales = grid.fit(source, importance)
    nearest = output_errors(h, fmt.decode(grid.round(source, scales)) - source)
    alone = fmt.decode(gptq(source, grid, inverse_factor(h), scales))
    assert (output_errors(h, alone - source) > 1.01 * nearest).any()
    assert (output_errors(h, weights_of(done.path)[name] - source) <= 1.0001 * nearest).all()


@pytest.mark.parametrize("options", [{}, {"calibrate": TEXT}])
def test_what_was_interrupted_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = compress(STORIES, tmp_path / "whole.gguf", format="q4_0", **options).path
    path = tmp_path / "m.gguf"
    first = _Stop(0.5)
    with pytest.raises(KeyboardInterrupt):
        compress(STORIES, path, format="q4_0", progress=first, **options)
    assert not path.exists()
    said: list[str] = []
    rest = _Stop(2)
    compress(STORIES, path, format="q4_0", progress=rest, notice=said.append, **options)
    assert path.read_bytes() == whole.read_bytes()
    assert min(rest.seen) > max(first.seen)
    assert any("going on after" in line for line in said)
    there = "calibration: statistics of 5 of 5 layers on this text are there from before"
    assert (there in said) == bool(options)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_other_options_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        compress(STORIES, path, format="q4_0", progress=_Stop(0.5))
    assert len(list(tmp_path.iterdir())) == 2
    said: list[str] = []
    compress(STORIES, path, format="q4_1", notice=said.append)
    assert any("begun anew" in line for line in said)
    assert (
        path.read_bytes() == compress(STORIES, tmp_path / "n.gguf", format="q4_1").path.read_bytes()
    )


@pytest.mark.parametrize("before", [{}, {"evaluate": TEXT}])
def test_a_price_begins_nothing_anew(tmp_path: Path, before: dict[str, Any]) -> None:
    after = {} if before else {"evaluate": TEXT}
    path = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        compress(STORIES, path, format="q4_0", progress=_Stop(0.5), **before)
    said: list[str] = []
    done = compress(STORIES, path, format="q4_0", notice=said.append, **after)
    assert "going on after" in said[-1] and "anew" not in "".join(said)
    whole = compress(STORIES, tmp_path / "whole.gguf", format="q4_0", **after)
    assert path.read_bytes() == whole.path.read_bytes()
    assert (done.price is None) == (not after)


def test_a_price_on_the_text_of_the_calibration_is_warned_of(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibrate_tokens": 128, "evaluate_tokens": 512, "force": True}
    for other, lines in ((TEXT, 1), (TEXT + "The end.", 0)):
        said: list[str] = []
        compress(
            STORIES, tmp_path / "m.gguf", format="q4_0", calibrate=TEXT, evaluate=other,
            notice=said.append, **options,
        )  # fmt: skip
        assert sum("take another one" in line for line in said) == lines


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"format": "q4_0", "evaluate": TEXT[:1000]}, "--evaluate"),
        ({"format": "bitstack", "method": "rtn", "evaluate": TEXT[:1000]}, "--evaluate"),
        ({"format": "bitstack", "calibrate": TEXT[:1000], "sort": "perplexity"}, "--sort"),
    ],
)
def test_a_text_is_looked_at_before_the_work(
    tmp_path: Path, options: dict[str, Any], option: str
) -> None:
    def working(done: int, total: int | None, what: str) -> None:
        raise AssertionError(what)

    with pytest.raises(HeadraceError, match=rf"{option}.* less than one window of 512"):
        compress(STORIES, tmp_path / "m.gguf", progress=working, **options)
    assert not list(tmp_path.iterdir())


def test_a_damaged_journal_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for damage in (b"", b"{", b"[1]", b'{"key": 1, "done": 3}', b'{"done": true}'):
        with pytest.raises(KeyboardInterrupt):
            compress(STORIES, path, format="q4_0", progress=_Stop(0.5))
        (journal,) = tmp_path.glob(".*.json")
        journal.write_bytes(damage)
        compress(STORIES, path, format="q4_0")
        assert (
            path.read_bytes()
            == compress(STORIES, tmp_path / "n.gguf", format="q4_0", force=True).path.read_bytes()
        )
        path.unlink()


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def another(done: int, total: int | None, what: str) -> None:
        with pytest.raises(HeadraceError, match="another process is writing"):
            compress(STORIES, path, format="q4_0")

    compress(STORIES, path, format="q4_0", progress=another)
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    real = os.pwrite

    def pwrite(fd: int, data: Any, at: int) -> int:
        nonlocal written
        written += len(data)
        if written > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    monkeypatch.setattr("headrace.partial_file.os.pwrite", pwrite)
    with pytest.raises(HeadraceError, match="No space left"):
        compress(STORIES, tmp_path / "m.gguf", format="q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_readonly(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(HeadraceError, match="Permission denied"):
            compress(STORIES, tmp_path / "m.gguf", format="q8_0")
    finally:
        tmp_path.chmod(0o700)


def test_a_link_in_the_place_of_the_part(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        compress(STORIES, path, format="q4_0", progress=_Stop(0.5))
    (part,) = tmp_path.glob(".*.part")
    precious = tmp_path / "precious"
    part.rename(precious)
    before = precious.read_bytes()
    part.symlink_to(precious)
    compress(STORIES, path, format="q4_0")
    assert precious.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "q9"}, "there is no format 'q9'"),
        ({"format": "iq3_s"}, "iq3_s is read, not written; --format takes: keep"),
        ({"format": "../q4_0"}, "there is no format"),
        ({"format": "q4_0", "ends": "x"}, "there is no format 'x'"),
        ({"ends": "bitstack"}, "bitstack is for --format alone; --ends takes: keep, bf16, e1m2"),
        ({"ends": "i4_auto"}, r"i4_auto is for --format alone; (?!.*(_auto|gqs|bitstack|llm))"),
        ({"format": "q4_0", "calibrate_tokens": 512}, "--calibrate-tokens is for --calibrate"),
        ({"format": "q4_0", "evaluate_tokens": 512}, "--evaluate-tokens is for --evaluate"),
        ({"format": "q4_0", "method": "best"}, "there is no method 'best'"),
        ({"format": "q4_0", "method": "gptq"}, "needs a text"),
        ({"format": "f16", "method": "search"}, "rounds to"),
        ({"format": "f16", "calibrate": TEXT}, "rounds to"),
        ({"method": "search"}, "rounds to"),
        ({"calibrate": TEXT}, "changes nothing"),
        ({"format": "q4_0", "method": "rtn", "calibrate": TEXT}, "changes nothing"),
        ({"format": "q4_0", "calibrate": "Once"}, "too short"),
        ({"format": "q4_0", "calibrate": TEXT, "calibrate_tokens": 16}, "too short"),
        ({"format": "q4_0", "calibrate": TEXT, "memory": 110_450_000}, "of memory beside"),
        ({"format": "q4_0", "evaluate": "Once"}, "less than one window"),
    ],
)
def test_hostile_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match=message):
        compress(STORIES, tmp_path / "m.gguf", **options)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["calibrate_tokens", "evaluate_tokens", "threads"])
def test_counts(name: str, tmp_path: Path) -> None:
    for wrong, error in ((0, ValueError), (-1, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=name):
            compress(STORIES, tmp_path / "m.gguf", **{name: wrong})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Any]:
    """Makes a model whose first key matrix has a certain weight."""

    def make(value: float) -> Path:
        path = write_model(tmp_path / "odd.gguf", ["F32"])
        info = open_model(path).tensors["blk.0.attn_k.weight"]
        with path.open("rb+") as file:
            file.seek(info.offset)
            file.write(np.float32(value).tobytes())
        return path

    yield make


def test_weights_that_cannot_be_rounded(odd: Any, tmp_path: Path) -> None:
    for value, method in ((np.nan, "rtn"), (np.inf, "search"), (-np.inf, "rtn")):
        for format in ("q4_0", "gqs_g32", "i4_auto"):
            said = f"'blk.0.attn_k.weight': row 0, column 0 is {value}, no finite number"
            with pytest.raises(ModelFileError, match=rf"odd\.gguf, tensor {said}"):
                compress(odd(value), tmp_path / "m.gguf", format=format, method=method)
    for method in ("rtn", "search"):
        with pytest.raises(UnsupportedError, match=r"attn_k.*beyond what q4_0 holds"):
            compress(odd(3e38), tmp_path / "m.gguf", format="q4_0", method=method)
    assert VOCABULARY == 300


# What the own encoder of a format of the table cannot hold: one weight among small ones, and all.
@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1e6, ["i4_g32", "i4_g128", "i4a_g64", "i4_dual", "e2m1_g16", "nvfp4", "nvint4", "q4_0"]),
        (1e7, ["i2_g64", "i3_g64", "i4a_g16", "e3m0_g128", "iq4_nl", "i4_auto", "llm_fp4"]),
        (1e38, ["i1_g64", "q6_k", "q8_0", "gqs_g32", "bitstack"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_weight_beyond_a_format(
    size: float, names: list[str], method: str, odd: Any, tmp_path: Path
) -> None:
    source = odd(size)
    for name in names:
        fmt = FORMATS.get(name)
        if name == "bitstack" or (method == "search" and fmt is not None and fmt.grid is None):
            chosen: Any = "rtn" if name == "bitstack" else None
        else:
            chosen = method
        with pytest.raises(UnsupportedError, match=r"odd\.gguf.*attn_k.*is beyond what"):
            compress(source, tmp_path / "m.gguf", format=name, method=chosen)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.filterwarnings("error")
def test_large_weights_that_a_format_holds(odd: Any, tmp_path: Path) -> None:
    for name in ("e3m0_g128", "q8_0", "gqs_g32", "bitstack"):
        compress(odd(1e6), tmp_path / "m.gguf", format=name, method="rtn", force=True)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "bitstack", "method": "rtn"},
        {"format": "bitstack", "calibrate": TEXT},
        {"format": "q4_0", "calibrate": TEXT},
        {"format": "gqs_g32", "calibrate": TEXT},
        {"to_moe": True, "calibrate": TEXT, "experts": 2, "active": 1, "shared": 0.2},
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_number_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    """Also where what layers compute is looked at first."""
    path = tmp_path / "odd.gguf"
    shutil.copy(STORIES, path)
    info = open_model(path).tensors["blk.1.attn_k.weight"]
    for value in (np.nan, -np.inf):
        with path.open("rb+") as file:
            file.seek(info.offset + 4 * (2 * info.shape[1] + 5))
            file.write(np.float32(value).tobytes())
        said = f"'blk.1.attn_k.weight': row 2, column 5 is {value}, no finite number"
        with pytest.raises(ModelFileError, match=rf"odd\.gguf, tensor {said}"):
            compress(path, tmp_path / "m.gguf", **options)


def test_the_least_memory(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        compress(source, tmp_path / "m.gguf", format="q4_0", memory=1_000_000)
    whole = compress(source, tmp_path / "a.gguf", format="q4_0").path
    small = compress(source, tmp_path / "b.gguf", format="q4_0", memory=117_250_000, threads=1)
    assert whole.read_bytes() == small.path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"format": "q4_0"},
        {"format": "q4_0", "calibrate": TEXT},
        {"format": "gqs_g32", "calibrate": TEXT},
        {"format": "bitstack", "method": "rtn"},
        {"format": "bitstack", "calibrate": TEXT},
        {"format": "bitstack", "method": "rtn", "evaluate": TEXT, "evaluate_tokens": 512},
        {"format": "bitstack", "calibrate": TEXT, "sort": "perplexity"},
        {"format": "q4_0", "evaluate": TEXT, "evaluate_tokens": 512},
        {"format": "gqs_g32", "calibrate": TEXT, "evaluate": TEXT, "evaluate_tokens": 512},
    ],
)
def test_the_least_memory_is_named_before_the_work(tmp_path: Path, options: dict[str, Any]) -> None:
    def working(done: int, total: int | None, what: str) -> None:
        raise AssertionError(what)

    def refused(memory: int) -> BudgetError:
        with pytest.raises(BudgetError, match=r"Allow at least 1\d\d MB \(--memory\)") as caught:
            compress(STORIES, path, memory=memory, progress=working, **fixed, **options)
        return caught.value

    path = tmp_path / "m.gguf"
    fixed: dict[str, Any] = {"threads": 2}
    if "calibrate" in options:
        fixed["calibrate_tokens"] = 272
    least = refused(1).needed_bytes
    assert refused(least - 1).needed_bytes == least
    assert not list(tmp_path.iterdir())
    compress(STORIES, path, memory=least, **fixed, **options)
