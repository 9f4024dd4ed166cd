"""Each model family against an independent implementation, in all the ways to read a prompt.

`data/families` has a small random model of each family and what transformers makes of it in
float32 (see `data/make_goldens.py`); stories260K runs against `reference_llama.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from reference_llama import ReferenceLlama
from targets_here import TARGETS, best

import headrace
from headrace import families
from headrace.loaders.gguf import read_gguf
from headrace.model import Model
from headrace.planning import prepare

DATA = Path(__file__).parent / "data"
PATHS = {path.stem: path for path in sorted((DATA / "families").glob("*.gguf"))}
WINDOWED = {
    "mistral": "llama.attention.sliding_window",
    "gemma2": "gemma2.attention.sliding_window",
    "gemma3": "gemma3.attention.sliding_window",
    "gemma3_scaled": "gemma3.attention.sliding_window",
}

# What rounding does to logits, as a share of their standard deviation. Keys and values are kept as
# float16: each is off by up to 2**-11 of itself, which a few layers of random weights pass on
# without much loss or gain, so the root mean square of the errors stays below 2**-10. Long prompts
# on targets with bfloat16 products round queries, keys, probabilities and values to 2**-9, four
# operands instead of two.
FLOAT16 = 2.0**-10
BFLOAT16 = 2.0**-8 * 2**0.5
WORST = 8.0  # the largest of some ten thousand errors, in units of the bound of their rms


class Golden:
    """What transformers says of one model."""

    def __init__(self, name: str) -> None:
        with np.load(PATHS[name].with_suffix(".npz")) as arrays:
            self.prompt: list[int] = arrays["ids"].tolist()
            self.continuation: list[int] = arrays["continuation"].tolist()
            self.positions = arrays["positions"]
            self.logits = arrays["logits"]


def rounding(model: Model) -> float:
    return BFLOAT16 if TARGETS[model.target].bf16_dot else FLOAT16


def check_close(found: np.ndarray, expected: np.ndarray, unit: float) -> None:
    """Compare logits; the message has the worst cell."""
    assert found.shape == expected.shape
    error = np.abs(found.astype(np.float64) - expected) / expected.std()
    worst = np.unravel_index(error.argmax(), error.shape)
    rms = float(np.sqrt(np.square(error).mean()))
    assert rms <= unit, f"rms {rms:.2e} of the deviation, allowed {unit:.2e}"
    assert error[worst] <= WORST * unit, (
        f"worst {worst}: found {found[worst]}, expected {expected[worst]}, "
        f"off by {error[worst]:.2e} of the deviation, allowed {WORST * unit:.2e}"
    )


def one_by_one(model: Model, ids: list[int], pieces: Callable[[int], int]) -> np.ndarray:
    """Logits after each piece of a prompt, read piece by piece; `pieces` gives their lengths."""
    model.forget()
    rows, start = [], 0
    while start < len(ids):
        n = min(pieces(start), len(ids) - start)
        model.read_tokens(ids[start : start + n], start)
        rows.append((start + n - 1, model._logits().copy()))
        start += n
    out = np.full((len(ids), model.vocabulary), np.nan, np.float32)
    for row, values in rows:
        out[row] = values
    return out


TARGET_PARAMS = [pytest.param(name, id=name, marks=best(name)) for name in TARGETS]


@pytest.fixture(
    scope="module",
    params=[pytest.param((f, t), id=f"{f}-{t}", marks=best(t)) for f in PATHS for t in TARGETS],
)
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Golden]]:
    name, target = request.param
    with headrace.load(PATHS[name], activations="f32", threads=2, target=target) as model:
        yield model, Golden(name)


def test_every_family_has_a_golden() -> None:
    found = {read_gguf(path).metadata["general.architecture"] for path in PATHS.values()}
    # What `headrace compress` cuts is compared with the dense model (test_to_moe.py,
    # test_clusters.py), and layers that no model of transformers has with numpy (test_moepp.py,
    # test_switch.py).
    made = {"headrace_moe", "headrace_clusters", "headrace_moepp", "headrace_switch"}
    assert found == set(families.names()) - made


def test_logits_equal_transformers(loaded: tuple[Model, Golden]) -> None:
    model, golden = loaded
    logits = model.logits(golden.prompt)
    check_close(logits[golden.positions], golden.logits, rounding(model))


def test_token_by_token_equals_transformers(loaded: tuple[Model, Golden]) -> None:
    model, golden = loaded
    logits = one_by_one(model, golden.prompt, lambda _: 1)
    check_close(logits[golden.positions], golden.logits, FLOAT16)


def test_greedy_ids_equal_transformers(loaded: tuple[Model, Golden]) -> None:
    """The goldens' best token leads by 0.05 at each step, more than rounding can make up."""
    model, golden = loaded
    ids = list(golden.prompt)
    for expected in golden.continuation:
        second, first = np.sort(model.logits(ids, last=1)[0])[-2:]
        lead = 0.05 - 2 * WORST * FLOAT16 * golden.logits.std()
        if not TARGETS[model.target].bf16_dot:
            assert first - second > lead
        ids.append(int(model.logits(ids, last=1)[0].argmax()))
        assert ids[-1] == expected, len(ids)
    generation = model.generate(golden.prompt, max_tokens=len(golden.continuation))
    generation.text()
    n = len(generation.ids)  # fewer where the reference ran over an end of text
    assert generation.ids == golden.continuation[:n]
    assert n == len(golden.continuation) or generation.stats.finish_reason == "eos"


@pytest.mark.parametrize("pieces", [2, 7, 16, 17, 40])
def test_prompts_in_pieces(loaded: tuple[Model, Golden], pieces: int) -> None:
    """Pieces of up to 16 tokens run another program than long ones."""
    model, golden = loaded
    ids = golden.prompt + golden.continuation
    whole = model.logits(ids)
    cut = one_by_one(model, ids, lambda _: pieces)
    rows = ~np.isnan(cut[:, 0])
    assert rows[-1]
    # Two results, each as far from the truth as rounding allows.
    check_close(cut[rows], whole[rows], 2 * rounding(model))


@pytest.mark.parametrize("name", PATHS)
def test_small_chunks_equal_one_chunk(name: str) -> None:
    """Long prompts are cut into chunks by memory: one that is cut reads the same."""
    golden = Golden(name)
    ids = golden.prompt + golden.continuation
    prepared = prepare(PATHS[name], context=None, threads=2, target=None, activations="f32")
    small = replace(prepared, shape=replace(prepared.shape, chunk=32))
    with (
        Model(prepared, None) as one,
        Model(small, None) as many,
    ):
        whole, cut = one.logits(ids), many.logits(ids)
        assert np.array_equal(cut, whole)
        check_close(cut[golden.positions], golden.logits, rounding(one))
        last = many.logits(ids, last=41)  # begins inside a chunk
        assert np.array_equal(last, cut[-41:])


def with_number(path: Path, key: str, value: int, to: Path) -> Path:
    """A copy of a model file with another value of a uint32 key."""
    raw = bytearray(path.read_bytes())
    name = key.encode()
    at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    assert struct.unpack_from("<I", raw, at)[0] == 4  # uint32
    struct.pack_into("<I", raw, at + 4, value)
    to.write_bytes(raw)
    return to


@pytest.mark.parametrize("target", TARGET_PARAMS)
@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_hides_what_lies_before_it(name: str, target: str, tmp_path: Path) -> None:
    golden = Golden(name)
    ids = golden.prompt
    wider = with_number(PATHS[name], WINDOWED[name], 17, tmp_path / "17.gguf")
    none = with_number(PATHS[name], WINDOWED[name], 200, tmp_path / "200.gguf")
    options: dict[str, Any] = {"activations": "f32", "threads": 2, "target": target}
    with (
        headrace.load(PATHS[name], **options) as model,
        headrace.load(wider, **options) as wide,
        headrace.load(none, **options) as open_,
    ):
        scale = golden.logits.std()
        unit = rounding(model)
        for other in (wide, open_):
            one, two = model.logits(ids), other.logits(ids)
            # Nothing is hidden from the first 16 tokens; the next sees one token less.
            check_close(two[:16], one[:16], 2 * unit)
            assert np.abs(two[16:] - one[16:]).max() > 4 * WORST * unit * scale
            slow = one_by_one(other, ids, lambda _: 1)
            check_close(slow, two, 2 * unit)
        if name == "mistral":  # all layers have the window: two of them reach 2 * 15 tokens back
            changed = [(i + 1) % model.vocabulary for i in ids[:20]] + ids[20:]
            assert np.array_equal(model.logits(changed)[-1], model.logits(ids)[-1])
            assert not np.array_equal(open_.logits(changed)[-1], open_.logits(ids)[-1])


def test_mistral_without_its_window(tmp_path: Path) -> None:
    with np.load(PATHS["mistral"].with_suffix(".npz")) as arrays:
        ids, positions, unwindowed = arrays["ids"], arrays["positions"], arrays["unwindowed"]
    none = with_number(PATHS["mistral"], WINDOWED["mistral"], 0, tmp_path / "m.gguf")
    with headrace.load(none, activations="f32", threads=2) as model:
        check_close(model.logits(ids.tolist())[positions], unwindowed, rounding(model))


def recoded(path: Path, kind: gguf.GGMLQuantizationType, to: Path) -> Path:
    """A copy of a model file with its matrices in another type."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.mark.parametrize("target", TARGET_PARAMS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "Q4_1", "F16", "BF16", "F32"])
@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_every_program_with_every_kind_of_activations(
    name: str, kind: str, target: str, tmp_path: Path
) -> None:
    """INT8 activations against float32 ones on the same weights, and float ones bit for bit."""
    path = recoded(PATHS[name], gguf.GGMLQuantizationType[kind], tmp_path / "m.gguf")
    ids = Golden(name).prompt
    with (
        headrace.load(path, threads=2, target=target) as coded,
        headrace.load(path, threads=2, target=target, activations="f32") as plain,
    ):
        assert coded.format == kind.lower()
        unit = 2 * rounding(plain)
        if coded.format in ("f16", "bf16", "f32"):
            assert np.array_equal(coded.logits(ids), plain.logits(ids))
        else:
            # A code is off by up to half of 1/127 of the largest of 32 values, which is 2 to 4
            # times their rms: up to 1% rms for each product, and two layers have eight in a row.
            check_close(coded.logits(ids), plain.logits(ids), 0.01 * 8**0.5 + unit)
            unit += 0 if TARGETS[target].decode_pairs else 0.01 * 8**0.5
        slow = plain.logits(ids)
        check_close(one_by_one(coded, ids, lambda _: 1), slow, unit)
        for pieces in (2, 7, 14):  # short ones; nothing is left over
            cut = one_by_one(coded, ids, lambda _, n=pieces: n)
            rows = ~np.isnan(cut[:, 0])
            check_close(cut[rows], slow[rows], 2 * rounding(plain))


# --- stories260K ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> ReferenceLlama:
    return ReferenceLlama(DATA / "stories260K.gguf")


@pytest.mark.parametrize("target", TARGET_PARAMS)
@pytest.mark.parametrize("prompt", ["", "Once upon a time", "The little dog was"])
def test_stories_greedy_equals_the_reference(
    stories: ReferenceLlama, prompt: str, target: str
) -> None:
    with headrace.load(DATA / "stories260K.gguf", threads=2, target=target) as model:
        ids = model.tokenize(prompt) if prompt else [stories.fields["tokenizer.ggml.bos_token_id"]]
        generation = model.generate(ids, max_tokens=200)
        text = generation.text()
        assert len(generation.ids) == 200 or generation.stats.finish_reason == "eos"
        assert stories.first_departure(ids + generation.ids, len(ids)) is None, text
        logits = model.logits(ids + generation.ids)
        check_close(logits, stories.logits(ids + generation.ids), rounding(model))
