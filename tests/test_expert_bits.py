"""Experts of several widths: those that matter least get fewer bits, within a bound that holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compress import STORIES, TEXT, _Stop

import headrace
from headrace import cli
from headrace.compress import compress
from headrace.errors import BudgetError, UnsupportedError
from headrace.expert_bits import RoundedExperts, choose_widths
from headrace.expert_trial import Trial, last_windows
from headrace.families import describe
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import format_name, open_model
from headrace.placing import dense, place
from headrace.rounding import Rounder
from headrace.rows import raw_rows
from headrace.sparse.registry import FORMATS

EXPERTS, LAYERS = 4, 5
OPTIONS: dict[str, Any] = {"method": "search", "calibrate": TEXT, "calibrate_tokens": 600}
WIDTHS = {"i2_g64": 2, "i4_g32": 4, "q8_0": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K in 4 experts of 32, of which 2 are active, and a shared part."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    cut: dict[str, Any] = {"experts": EXPERTS, "active": 2, "shared": 0.25}
    return compress(STORIES, path, to_moe=True, calibrate=TEXT, calibrate_tokens=600, **cut).path


def widths_of(path: Path) -> dict[tuple[int, int], int]:
    """The width of each expert's gate."""
    model = open_model(path)
    found = {}
    for layer, mixture in describe(model).mixtures().items():
        for e, one in enumerate(mixture.each):
            names = [format_name(model.tensors[m.name].type) for m in one.matrices()]
            assert names[0] == names[1]
            found[layer, e] = WIDTHS[str(names[0])]
    return found


def loss_of(path: Path) -> float:
    """Of the windows that experts are measured on."""
    model = open_model(path)
    windows = last_windows(model, describe(model), TEXT)
    with headrace.load(path, context=windows.context, logits_rows=windows.scored) as loaded:
        return Trial(loaded, windows)._base


def test_the_bound_holds_and_fewer_bits_come_with_larger_ones(source: Path, tmp_path: Path) -> None:
    base, means = loss_of(source), []
    for i, loss in enumerate((0.001, 0.02, 0.1, 1e6)):
        path = tmp_path / f"{i}.gguf"
        done = compress(source, path, expert_bits=(2, 4, 8), expert_loss=loss, **OPTIONS)
        assert any(line.startswith("experts: ") for line in done.remarks)
        means.append(np.mean(list(widths_of(path).values())))
        # Where it was measured, experts were multiplied by float32 activations, here by 8 bits.
        assert np.exp(loss_of(path) - base) - 1 <= loss + 0.003
        others = open_model(path).tensors
        assert format_name(others["blk.0.ffn_up_shexp.weight"].type) == "f32"
    assert means == sorted(means, reverse=True)
    assert 4 < means[0] <= 8
    assert means[-1] == 2
    assert 2 < means[2] < 4  # a bound between the widths mixes them


class Measured:
    """A model that loses what its experts' widths say: `cost` of each expert at 2 bits."""

    def __init__(self, cost: dict[tuple[int, int], float], upper: float) -> None:
        self.cost, self.upper = cost, upper
        self.now: dict[tuple[int, int], int] = {}

    def put(self, name: str, weights: np.ndarray) -> None:
        layer, e = map(int, name.split("."))
        self.now[layer, e] = int(weights)

    def rise(self) -> float:
        assert set(self.now) == set(self.cost)
        low = sum(cost for one, cost in self.cost.items() if self.now[one] == 2)
        return low + (0 if set(self.now.values()) == {8} else self.upper)

    divergence = rise


class Known:
    """Rounded experts whose errors are as they are said."""

    def __init__(self, errors: dict[tuple[int, int], float], widths: tuple[int, ...]) -> None:
        self.experts, self.widths, self.errors = dict.fromkeys(errors, ()), widths, errors

    def error(self, one: tuple[int, int], width: int, read: Callable[..., bytes]) -> float:
        return self.errors[one] if width == 2 else 0.0

    def matrices(self, one: tuple[int, int], width: int, read: Callable[..., bytes]) -> list:
        return [(f"{one[0]}.{one[1]}", np.array(width))]


def chosen(loss: float, upper: float = 0.0, widths: tuple[int, ...] = (2, 4, 8)) -> dict:
    """The choice among 6 x 8 experts that cost 1, 2, 3 ... thousandths, in another order."""
    rng = np.random.default_rng(7)
    costs = rng.permutation(np.arange(1, 49)) / 1000
    cost = {(i // 8, i % 8): float(c) for i, c in enumerate(costs)}
    # Errors compare experts of one layer only; between layers the measurement does.
    scale = rng.lognormal(sigma=3, size=6)
    known = Known({one: c * scale[one[0]] for one, c in cost.items()}, widths)
    found, rise = choose_widths(known, lambda at, n: b"", Measured(cost, upper), loss)  # type: ignore[arg-type]
    trial = Measured(cost, upper)
    trial.now = found
    assert trial.rise() == pytest.approx(rise)
    return {one: (cost[one], width) for one, width in found.items()}


def test_what_matters_least_gets_fewer_bits() -> None:
    found = chosen(0.3)
    low = sorted(cost for cost, width in found.values() if width == 2)
    assert low == [i / 1000 for i in range(1, 24)]  # 1 + 2 + .. + 23 = 276, with 24 it were 300
    assert {width for _, width in found.values()} == {2, 4}


def test_bounds_beyond_which_all_are_alike() -> None:
    assert {width for _, width in chosen(10.0).values()} == {2}
    assert {width for _, width in chosen(0.0005).values()} == {4}
    assert {width for _, width in chosen(0.0005, upper=0.01).values()} == {8}
    assert {width for _, width in chosen(0.0005, 0.01, (2, 4)).values()} == {4}  # best there is
    assert {width for _, width in chosen(0.5, 0.01, (2, 8)).values()} == {2, 8}


def test_rounded_experts_are_those_of_the_file(source: Path, tmp_path: Path) -> None:
    """What is measured is what is written: the bytes that wait are decoded to the file's."""
    path = compress(source, tmp_path / "m.gguf", format="i4_g32", method="rtn").path
    with TensorReader() as reader:
        file, exact = ({p.matrix.name: dense(p) for p in place(m, describe(m), "q8")}
                       for m in map(open_model, (path, source)))  # fmt: skip
        model = open_model(source)
        one = describe(model).mixtures()[1].each[2]
        matrices = [exact[m.name] for m in one.matrices()]
        rounded = RoundedExperts({(1, 2): matrices}, (4,), "rtn")
        data = np.zeros(rounded.size, np.uint8)

        def write(at: int, some: np.ndarray) -> None:
            data[at : at + some.size] = some

        class Inputs:
            def of(self, name: str) -> None:
                return None

        rounded.make(Rounder(reader, 1, None), reader, Inputs(), write, 0, lambda n: None)  # type: ignore[arg-type]
        found = rounded.matrices((1, 2), 4, lambda at, n: data[at : at + n].tobytes())
        for (name, weights), p in zip(found, matrices, strict=True):
            assert name == p.matrix.name
            written = replace(file[name], format=FORMATS["f32"])
            raw = raw_rows(reader, written, 0, p.matrix.rows).view(np.float32)
            assert np.array_equal(weights, raw[: p.matrix.rows])
        assert rounded.error((1, 2), 4, lambda at, n: data[at : at + n].tobytes()) > 0


def test_what_was_interrupted_goes_on(source: Path, tmp_path: Path) -> None:
    options = {"expert_bits": (2, 4), "expert_loss": 0.1, **OPTIONS}
    whole = compress(source, tmp_path / "whole.gguf", **options).path
    path, said = tmp_path / "m.gguf", list[str]()

    def stop(done: int, total: int | None, what: str) -> None:
        if what == "measuring experts":
            raise KeyboardInterrupt

    for progress in (stop, _Stop(0.5)):
        with pytest.raises(KeyboardInterrupt):
            compress(source, path, progress=progress, notice=said.append, **options)
    compress(source, path, notice=said.append, **options)
    assert sum("going on after 20 of 20 experts" in line for line in said) == 2
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_experts_that_few_tokens_chose(source: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "method": "gptq", "calibrate_tokens": 120}
    done = compress(source, tmp_path / "m.gguf", expert_bits=(2, 4), expert_loss=0.1, **options)
    assert any("chosen by fewer tokens" in line for line in done.remarks)
    assert set(widths_of(done.path).values()) <= {2, 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expert_bits": (5,)}, "2, 3, 4, 8"),
        ({"expert_bits": ()}, "2, 3, 4, 8"),
        ({"expert_bits": (2, 4), "calibrate": None, "method": None}, "needs a text"),
        ({"expert_bits": (2, 4), "expert_loss": -0.1}, "--expert-loss"),
        ({"expert_bits": (2, 4), "expert_loss": float("nan")}, "--expert-loss"),
        ({"expert_loss": 0.1, "format": "q4_0"}, "for --expert-bits"),
        ({"expert_bits": (2, 4), "to_moe": True, "method": None}, "mixture already"),
    ],
)
def test_options_that_do_not_fit(
    source: Path, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {"calibrate": TEXT, "method": "search"} | options
    with pytest.raises(UnsupportedError, match=words):
        compress(source, tmp_path / "m.gguf", **given)
    assert not list(tmp_path.iterdir())


def test_dense_models_have_no_experts(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mixtures of experts"):
        compress(STORIES, tmp_path / "m.gguf", expert_bits=(2, 4), **OPTIONS)


def test_a_source_that_does_not_fit_is_refused_early(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        compress(source, tmp_path / "m.gguf", expert_bits=(2, 4), memory=90 << 20, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_the_command(source: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "m.gguf"
    text.write_text(TEXT)
    words = ["compress", str(source), str(out), "--expert-bits", "4,8", "--expert-loss", "0.5"]
    assert cli.main([*words, "--method", "search", "--calibrate", str(text)]) == 0
    assert set(widths_of(out).values()) == {4}
    assert cli.main(["compress", str(source), str(out), "--expert-bits", "few"]) != 0
