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
from headrace.expert_bits import PARTS, Part, RoundedExperts, choose_widths
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
WIDTHS = {"i2_g64": 2, "i4_g64": 4, "q8_0": 8}


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
    """A model that loses what its parts' widths say: `cost` of each one at 2 bits."""

    def __init__(self, cost: dict[Part, float], upper: float) -> None:
        self.cost, self.upper = cost, upper
        self.now: dict[Part, int] = {}

    def put(self, name: str, weights: np.ndarray) -> None:
        layer, e, kind = name.split(".")
        self.now[int(layer), int(e), kind] = int(weights)

    def rise(self) -> float:
        assert set(self.now) == set(self.cost)
        low = sum(cost for one, cost in self.cost.items() if self.now[one] == 2)
        return low + (0 if set(self.now.values()) == {8} else self.upper)

    divergence = rise


class Known:
    """Rounded experts whose errors are as they are said; gate and up have twice down's bytes."""

    def __init__(self, errors: dict[Part, float], widths: tuple[int, ...]) -> None:
        self.parts, self.widths, self.errors = dict.fromkeys(errors, ()), widths, errors

    def n_bytes(self, one: Part, width: int) -> int:
        return width * (2 if one[2] == PARTS[0] else 1)

    def remark(self, one: Part, width: int, read: Callable[..., bytes]) -> tuple[float, int, bool]:
        return self.errors[one] if width == 2 else 0.0, 0, False

    def matrices(self, one: Part, width: int, read: Callable[..., bytes]) -> list:
        return [(".".join(map(str, one)), np.array(width))]


def chosen(
    loss: float, upper: float = 0.0, widths: tuple[int, ...] = (2, 4, 8), over: int | None = None
) -> dict[Part, tuple[float, int]]:
    """The choice among 6 x 4 x 2 parts that cost 1, 2, 3 ... thousandths, in another order."""
    rng = np.random.default_rng(7)
    costs = rng.permutation(np.arange(1, 49)) / 1000
    cost = {(i // 8, i // 2 % 4, PARTS[i % 2]): float(c) for i, c in enumerate(costs)}
    # Errors compare parts of one layer only; between layers the measurement does.
    scale = rng.lognormal(sigma=3, size=6)
    known = Known({one: c * scale[one[0]] for one, c in cost.items()}, widths)
    measured = Measured(cost, upper)
    found = choose_widths(known, lambda at, n: b"", measured, loss, over)  # type: ignore[arg-type]
    trial = Measured(cost, upper)
    trial.now = found.widths
    assert trial.rise() == pytest.approx(found.rise)
    return {one: (cost[one], width) for one, width in found.widths.items()}


def test_what_matters_least_for_its_bytes_gets_fewer_bits() -> None:
    found = chosen(0.3)
    worth = {one: cost / (2 if one[2] == PARTS[0] else 1) for one, (cost, _) in found.items()}
    low = {one for one, (_, width) in found.items() if width == 2}
    spent = sum(found[one][0] for one in low)
    assert 0.25 < spent <= 0.3
    # In the order of what they are worth, but for those that did not fit into what was left.
    for one in set(found) - low:
        assert max(worth[other] for other in low) <= worth[one] or spent + found[one][0] > 0.3
    assert {width for _, width in found.values()} == {2, 4}


class Uneven(Measured):
    """The same, where the half that costs less loses much until the next one is low, too."""

    def rise(self) -> float:
        low = {one for one, width in self.now.items() if width == 2}
        order = sorted(self.cost, key=lambda one: self.cost[one])
        return super().rise() + (0.5 if low >= set(order[:8]) and order[8] not in low else 0)

    divergence = rise


def test_steps_behind_the_first_that_loses_too_much_are_tried() -> None:
    parts = [(layer, e, PARTS[1]) for layer in range(4) for e in range(4)]
    cost = {one: (1 + i) / 1000 for i, one in enumerate(parts)}
    known, measured = Known(cost, (2, 4)), Uneven(cost, 0.0)
    found = choose_widths(known, lambda at, n: b"", measured, 0.1)  # type: ignore[arg-type]
    # Bisection tries 8 of 16 first, which is too much only because the ninth is not among them.
    low = sorted(round(1000 * cost[one]) for one, width in found.widths.items() if width == 2)
    assert low == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]
    assert found.rise == pytest.approx(0.097)


class Halving(Measured):
    """The same, where two bits more take away fifteen sixteenths of what a part loses at 2."""

    def rise(self) -> float:
        return sum(cost * 4.0 ** (2 - self.now[one]) for one, cost in self.cost.items())

    divergence = rise


class KnownHalving(Known):
    """What `Halving` measures."""

    def remark(self, one: Part, width: int, read: Callable[..., bytes]) -> tuple[float, int, bool]:
        return self.errors[one] * 4.0 ** (2 - width), 0, False


def test_parts_that_matter_very_differently_get_all_widths() -> None:
    rng = np.random.default_rng(3)
    parts = [(layer, e, kind) for layer in range(4) for e in range(8) for kind in PARTS]
    drawn = rng.lognormal(sigma=2, size=(4, len(parts) // 4))
    drawn /= drawn.sum(axis=1, keepdims=True)  # layers that hardly lose are taken to lose something
    errors = dict(zip(parts, drawn.ravel().tolist(), strict=True))
    bound = 0.1 * sum(errors.values())

    def chosen_of(widths: tuple[int, ...]) -> tuple[dict[Part, int], int]:
        known, measured = KnownHalving(errors, widths), Halving(errors, 0.0)
        found = choose_widths(known, lambda at, n: b"", measured, bound)  # type: ignore[arg-type]
        again = Halving(errors, 0.0)
        again.now = found.widths
        assert found.rise == pytest.approx(again.rise()) and found.rise <= bound
        return found.widths, sum(known.n_bytes(one, w) for one, w in found.widths.items())

    mixed, n_bytes = chosen_of((2, 3, 4))
    assert set(mixed.values()) == {2, 3, 4}
    _, of_two = chosen_of((3, 4))
    assert n_bytes < 0.96 * of_two

    def gain(one: Part, width: int) -> float:  # for each byte more
        more = 2 if one[2] == PARTS[0] else 1
        return errors[one] * (4.0 ** (2 - width) - 4.0 ** (1 - width)) / more

    # No bit that was saved is worth more than one that was not.
    spent = [gain(one, width - 1) for one, width in mixed.items() if width > 2]
    saved = [gain(one, width) for one, width in mixed.items() if width < 4]
    assert max(saved) <= min(spent)


def test_a_bound_over_all_experts_at_a_width() -> None:
    # All at 4 bits lose half; a bound over the source of that has room for none below.
    assert {width for _, width in chosen(0.5, 0.5, (2, 4)).values()} == {4}
    low = [cost for cost, width in chosen(0.1, 0.5, (2, 4), over=4).values() if width == 2]
    assert 0.1 < sum(low) <= 0.15  # 1.5 x 1.1 = 1.65
    assert {width for _, width in chosen(0.0, 0.0, (2, 4), over=2).values()} == {2}


def test_bounds_beyond_which_all_are_alike() -> None:
    assert {width for _, width in chosen(10.0).values()} == {2}
    assert {width for _, width in chosen(0.0005).values()} == {4}
    assert {width for _, width in chosen(0.0005, upper=0.01).values()} == {8}
    assert {width for _, width in chosen(0.0005, 0.01, (2, 4)).values()} == {4}  # best there is
    assert {width for _, width in chosen(0.5, 0.01, (2, 8)).values()} == {2, 8}


def test_rounded_experts_are_those_of_the_file(source: Path, tmp_path: Path) -> None:
    """What is measured is what is written: the bytes that wait are decoded to the file's."""
    formats = {"gate": "i4_g64", "up": "i4_g64", "down": "i4_g32"}  # rows of down have 32 weights
    paths = {
        name: compress(source, tmp_path / name, format=name, method="rtn").path
        for name in set(formats.values())
    }
    with TensorReader() as reader:
        exact, *files = ({p.matrix.name: dense(p) for p in place(m, describe(m), "q8")}
                         for m in map(open_model, (source, *paths.values())))  # fmt: skip
        written_as = dict(zip(paths, files, strict=True))
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

            sums = of

        rounded.make(Rounder(reader, 1, None), reader, Inputs(), write, 0, lambda n: None)  # type: ignore[arg-type]

        def read(at: int, n: int) -> bytes:
            return data[at : at + n].tobytes()

        found = [one for kind in PARTS for one in rounded.matrices((1, 2, kind), 4, read)]
        for (name, weights), p in zip(found, matrices, strict=True):
            assert name == p.matrix.name
            kind = next(kind for kind in formats if f"_{kind}." in name)
            written = replace(written_as[formats[kind]][name], format=FORMATS["f32"])
            raw = raw_rows(reader, written, 0, p.matrix.rows).view(np.float32)
            assert np.array_equal(weights, raw[: p.matrix.rows])
        for kind in PARTS:
            error, unmoved, few = rounded.remark((1, 2, kind), 4, read)
            assert error > 0 and unmoved == 0 and few  # nothing was seen of its inputs


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_what_was_interrupted_goes_on(source: Path, tmp_path: Path, method: str) -> None:
    options = {"expert_bits": (2, 4), "expert_loss": 0.1, **OPTIONS, "method": method}
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
        ({"expert_over": 4, "format": "q4_0"}, "for --expert-bits"),
        ({"expert_bits": (2, 4), "expert_over": 8}, "one of --expert-bits"),
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
