"""Group-sparse matrices: what is coded is read back; pruning, threads, and hostile bytes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import call

from headrace.errors import ModelFileError
from headrace.memory import Arena
from headrace.sparse import gqs, gqs_kernels, gqs_pruning
from headrace.sparse.gptq import DAMPING, inverse_factor
from headrace.targets.cache import KernelStore
from headrace.targets.compiler import compile_kernel
from headrace.targets.host import pick_target
from headrace.targets.target import all_targets

ROWS, COLUMNS = 13, 11


def _example(group: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((ROWS, COLUMNS * group)).astype(np.float32)
    keep = rng.random((ROWS, COLUMNS)) < 0.5
    keep[0], keep[1], keep[-1] = True, False, False
    return w, keep, gqs.pack_weights(w, keep, group)


def encode(
    w: np.ndarray, rate: float, group: int, *,
    mean_square: np.ndarray | None = None, hessian: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """A whole matrix pruned and coded, as `headrace.pruning` does it some rows at a time."""
    both, cost = None, mean_square
    if hessian is not None:
        h = hessian.astype(np.float32)
        both = gqs_pruning.Hessian(h, inverse_factor(h))
        cost = gqs_pruning.group_costs(both.upper, group)
    keep = gqs_pruning.kept(gqs_pruning.scores(w, group, cost), group, rate)
    return gqs.pack(gqs_pruning.encode_rows(w, keep, group, both)[0], group)


@pytest.mark.parametrize("group", gqs.GROUPS)
def test_what_is_stored_is_what_was_kept(group: int) -> None:
    w, keep, raw = _example(group)
    found = gqs.unpack(raw, *w.shape, group)
    column = np.nonzero(keep)[1]
    assert np.array_equal(found.counts, keep.sum(axis=1))
    assert np.array_equal(found.columns, column)
    assert np.array_equal(gqs.pack(found, group), raw)
    decoded = gqs.decode(raw, *w.shape, group).reshape(ROWS, COLUMNS, group)
    assert not decoded[~keep].any()
    kept = w.reshape(ROWS, COLUMNS, group)[keep]
    step = np.ptp(kept, axis=1) / 15
    # Half a step for the code, the rest for a scale and an offset that are whole numbers.
    assert (np.abs(decoded[keep] - kept).max(axis=1) < step * 1.1).all()


@pytest.mark.parametrize(("group", "least"), [(16, 21.5), (32, 20.0), (64, 18.8)])
def test_noise_of_four_bits(group: int, least: float) -> None:
    w = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32)
    raw = encode(w, 0, group)
    noise = ((gqs.decode(raw, *w.shape, group) - w) ** 2).mean()
    assert 10 * np.log10((w**2).mean() / noise) > least
    # 4 bits and 32 / group, and 8 bytes a row and a unit's alignment
    assert 8 * len(raw) / w.size < 4 + 32 / group + 0.08


@pytest.mark.parametrize("extreme", [0.0, 1e-30, 1e30, np.inf])
def test_extreme_weights(extreme: float) -> None:
    w = np.zeros((2, 64), np.float32)
    w[0, :16] = 7.25 if np.isinf(extreme) else extreme
    w[1, 16:32] = np.linspace(-1, 1, 16) * (1e-38 if np.isinf(extreme) else extreme)
    raw = gqs.pack_weights(w, np.ones((2, 4), bool), 16)
    assert np.abs(gqs.decode(raw, 2, 64, 16) - w).max() <= np.abs(w).max() / 14


def test_a_hessian_lowers_the_error_of_the_outputs() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((512, 32)) @ rng.standard_normal((32, 512))  # inputs that go together
    x = (x + rng.standard_normal(x.shape)) * np.exp(rng.standard_normal(512))
    w = rng.standard_normal((48, 512)).astype(np.float32)

    def error(**how: np.ndarray) -> float:
        raw = encode(w, 0.5, 16, **how)
        assert gqs.unpack(raw, *w.shape, 16).counts.sum() <= 48 * 32 / 2
        return float((((gqs.decode(raw, *w.shape, 16) - w) @ x.T) ** 2).mean())

    magnitude, inputs = error(), error(mean_square=(x**2).mean(axis=0))
    with_hessian = error(hessian=x.T @ x)
    assert inputs < 0.9 * magnitude
    assert with_hessian < 0.7 * inputs


def test_what_stays_has_the_least_error() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 96)) * 30
    x += rng.standard_normal(x.shape)
    h = (x.T @ x).astype(np.float32)
    w = rng.standard_normal((5, 96)).astype(np.float32)
    stays = rng.random(w.shape) < 0.5
    stays[3], stays[4] = False, True
    damped = h + DAMPING * np.diag(h).mean() * np.eye(96)

    def error(values: np.ndarray) -> np.ndarray:
        return np.einsum("ri,ij,rj->r", values - w, damped, values - w)

    exact = np.zeros_like(w)
    for row, keep in enumerate(stays):
        exact[row, keep] = np.linalg.solve(damped[np.ix_(keep, keep)], damped[keep] @ w[row])
    found = gqs_pruning.refit(w, stays, h)
    assert not found[~stays].any()
    assert np.allclose(found[4], w[4], atol=1e-3)
    least, cut = error(exact), error(np.where(stays, w, 0))
    assert (error(found)[:3] < 1.05 * least[:3]).all()
    assert (least[:3] < 0.2 * cut[:3]).all()
    assert not gqs_pruning.refit(w, stays, np.zeros_like(h))[~stays].any()  # inputs that never came


def test_rates() -> None:
    score = np.random.default_rng(1).random((6, 20)).astype(np.float32)
    assert gqs_pruning.kept(score, 16, 0).all()
    assert not gqs_pruning.kept(score, 16, 1).any()
    keep = gqs_pruning.kept(score, 16, 0.3)
    # 2.5 units a row: 10 units are 70%, and only a row that keeps all has one that is not full.
    assert gqs_pruning.n_units(6, 320, 16, 0.3) == 10
    counts = keep.sum(axis=1)
    assert (-(-counts // 8)).sum() == 10
    assert ((counts % 8 == 0) | (counts == 20)).all()
    for row, some in zip(score, keep, strict=True):
        assert row[some].min(initial=1) >= row[~some].max(initial=0)
    with pytest.raises(ValueError, match="0 to 1"):
        gqs_pruning.kept(score, 16, 1.5)


@pytest.mark.parametrize("group", gqs.GROUPS)
def test_the_size_follows_from_the_rate(group: int) -> None:
    w = np.random.default_rng(2).standard_normal((9, 576)).astype(np.float32)
    for rate in (0.0, 0.01, 0.37, 0.5, 0.99):
        raw = encode(w, rate, group)
        units = gqs_pruning.n_units(9, 576, group, rate)
        assert len(raw) == gqs.units_offset(9) + units * gqs.unit_bytes(group)
        kept = gqs.unpack(raw, 9, 576, group).counts.sum() * group / w.size
        assert kept == 1 if rate == 0 else kept <= 1 - rate


def _with(raw: np.ndarray, at: int, value: int) -> np.ndarray:
    changed = raw.copy()
    changed[at] = value
    return changed


def test_hostile_bytes_are_refused() -> None:
    _, _, raw = _example(16)
    begin = gqs.units_offset(ROWS)
    unit, row0 = gqs.unit_bytes(16), 2  # 11 groups: two units, the second filled up from place 3
    inputs = begin + 16
    cases = {
        "has 0 to": _with(raw, 4, 200),
        "begin at unit 0": _with(raw, 0, 1),
        "units take": raw[:-1],
        "begin with": raw[: begin - 1],
        "not finite": _with(_with(raw, 4 * ROWS + 7, 0x7F), 4 * ROWS + 6, 0xC0),
        "must be zero": _with(raw, begin - 1, 1),
        "above 127": _with(raw, begin, 128),
        "does not begin": _with(raw, inputs + 1, 1),
        "order of their inputs": _with(raw, inputs + 2, 0),
        "follows the filling": _with(raw, begin + unit + 16 + 2 * 5, 4 * 10),
    }
    assert gqs.unpack(raw, ROWS, 176, 16).counts[0] == 11
    assert raw[4] == row0
    for message, changed in cases.items():
        with pytest.raises(ModelFileError, match=message):
            gqs.unpack(changed, ROWS, 176, 16)


@pytest.mark.parametrize("group", gqs.GROUPS)
def test_any_byte_may_be_wrong(group: int) -> None:
    """Whatever is accepted leads no kernel outside of a row's inputs or of the units."""
    _, _, raw = _example(group)
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(300):
        changed = _with(raw, rng.integers(len(raw)), rng.integers(256))
        try:
            found = gqs.unpack(changed, ROWS, COLUMNS * group, group)
        except ModelFileError:
            refused += 1
            continue
        assert (found.columns < COLUMNS).all()
        assert found.counts.max() <= COLUMNS
    assert refused > 10


@pytest.mark.parametrize("group", gqs.GROUPS)
def test_threads_change_no_bit(group: int) -> None:
    rng = np.random.default_rng(11)
    rows, n = 300, 1024
    w = rng.standard_normal((rows, n)).astype(np.float32)
    w *= np.exp(rng.standard_normal((rows, 1)))  # some rows keep all groups, some none
    score = gqs_pruning.scores(w, group)
    raw = gqs.pack_weights(w, score > np.median(score), group)
    x = gqs_kernels.code_x16(rng.standard_normal((1, n)).astype(np.float32))
    arena = Arena({"raw": len(raw), "x": x.nbytes})
    arena.view("raw")[: len(raw)] = raw
    arena.view("x")[: x.nbytes] = x[0]
    name, at = f"gemm_gqs_g{group}", arena.address("raw")
    kernel = gqs_kernels.kernel_named(name)
    store = KernelStore(pick_target())
    address = store.load([kernel])[name]
    bias, one = np.zeros(rows, np.float32), np.ones(1, np.int64)
    expected = gqs_kernels.multiply(raw, rows, n, group, x)
    for n_threads in (1, 2, 3, 4, 400):
        y = np.full((1, rows), np.nan, np.float32)
        slots = [
            at, at + 4 * rows + 4, at + gqs.units_offset(rows), arena.address("x"), y, rows, one,
            0, y.strides[0], bias, x.strides[0],
        ]  # fmt: skip
        call(address, slots, n_threads)
        assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("target", ["x86-64-v4-bf16", "aarch64-neon"])
@pytest.mark.parametrize("group", gqs.GROUPS)
def test_places_are_loaded_and_not_taken_out_of_vectors(
    group: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM does that where a vector around them was read before: a third of the time of G 16."""
    monkeypatch.setenv("HEADRACE_DEBUG", "2")
    monkeypatch.setenv("HEADRACE_DUMP", str(tmp_path))
    name, built_for = f"gemm_gqs_g{group}", all_targets()[target]
    compile_kernel(gqs_kernels.kernel_named(name).build(built_for), built_for, name)
    text = (tmp_path / target / f"{name}.ll").read_text()
    # for one token and for several, which some targets multiply in more than one go
    assert len(re.findall(r" = load i16,", text)) >= 2 * gqs.UNIT // group
    assert not re.findall(r" = extractelement <\d+ x i(?:16|32|64)>", text)


@pytest.mark.parametrize("columns", [64, 192, 256, 320, 576])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_short_rows_lose_is_known(columns: int, rate: float) -> None:
    score = np.random.default_rng(0).random((48, columns // 32)).astype(np.float32)
    gone = 1 - gqs_pruning.kept(score, 32, rate).mean()
    assert gqs_pruning.left_out(48, columns, 32, rate) == pytest.approx(gone)
    assert gone >= rate - 0.01 and (columns < 256 or columns % 128 or gone < rate + 0.02)
