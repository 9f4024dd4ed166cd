"""Whole small models with one thing wrong: one typed error each, before anything large is taken.

(Files whose structure is broken are the subject of test_gguf_hostile.py.)
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from reference_llama import ReferenceLlama
from test_families import FLOAT16, WORST, rounding

import headrace
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.memory import Arena
from headrace.memory_plan import plan_model
from headrace.model import Model
from headrace.peak import peak_rss_bytes
from headrace.planning import prepare

DEADLINE_S = 2.0  # most take 2 ms; the machine may be busy
MEMORY_BYTES = 8 << 20
Type = gguf.GGUFValueType
Quant = gguf.GGMLQuantizationType


@dataclass
class Spec:
    """A small llama model: metadata by key, with their types, and tensors by name."""

    keys: dict[str, tuple[Any, Type]] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    types: dict[str, Quant] = field(default_factory=dict)  # of tensors, where not F32
    architecture: Any = "llama"

    def set(self, key: str, value: Any, kind: Type = Type.UINT32) -> None:
        self.keys[key if "." in key and key.startswith(("tok", "gen")) else f"llama.{key}"] = (
            value, kind,
        )  # fmt: skip

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        del writer.kv_data[0]["general.architecture"]
        keys = dict(self.keys)
        if isinstance(self.architecture, str):
            keys = {"general.architecture": (self.architecture, Type.STRING), **keys}
        elif self.architecture is not None:
            keys = {"general.architecture": (self.architecture, Type.UINT32), **keys}
        for key, (value, kind) in keys.items():
            if kind == Type.ARRAY:
                sub = Type.STRING if isinstance(value[0], str) else Type.INT32
                if isinstance(value[0], float):
                    sub = Type.FLOAT32
                writer.add_key_value(key, value, kind, sub)
            else:
                writer.add_key_value(key, value, kind)
        for name, values in self.tensors.items():
            kind = self.types.get(name)
            if kind is None:
                writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
            elif kind in (Quant.I32, Quant.I64, Quant.F64):
                size = {Quant.I32: "i4", Quant.I64: "i8", Quant.F64: "f8"}[kind]
                writer.add_tensor(name, np.ascontiguousarray(values, size))
            else:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def tiny(
    width: int = 64, heads: int = 4, kv_heads: int = 2, inner: int = 96, vocabulary: int = 80,
    layers: int = 2, head: int | None = None,
) -> Spec:  # fmt: skip
    """A good model with random weights."""
    rng = np.random.default_rng(0)
    spec = Spec()
    spec.set("block_count", layers)
    spec.set("context_length", 128)
    spec.set("embedding_length", width)
    spec.set("feed_forward_length", inner)
    spec.set("attention.head_count", heads)
    spec.set("attention.head_count_kv", kv_heads)
    spec.set("attention.layer_norm_rms_epsilon", 1e-5, Type.FLOAT32)
    if head is not None:
        spec.set("attention.key_length", head)
        spec.set("attention.value_length", head)
    head = head or width // heads
    tokens = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(vocabulary - 3))]
    spec.set("tokenizer.ggml.model", "llama", Type.STRING)
    spec.set("tokenizer.ggml.tokens", tokens, Type.ARRAY)
    spec.set("tokenizer.ggml.scores", [0.0] * vocabulary, Type.ARRAY)
    spec.set("tokenizer.ggml.token_type", [2, 3, 3] + [1] * (vocabulary - 3), Type.ARRAY)
    spec.set("tokenizer.ggml.bos_token_id", 1)
    spec.set("tokenizer.ggml.eos_token_id", 2)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns)) * (1.5 / columns**0.5)
        spec.tensors[f"{name}.weight"] = values.astype(np.float32)

    def norm(name: str) -> None:
        spec.tensors[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(width)).astype(np.float32)

    matrix("token_embd", vocabulary, width)
    for i in range(layers):
        block = f"blk.{i}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", heads * head, width)
        matrix(f"{block}.attn_k", kv_heads * head, width)
        matrix(f"{block}.attn_v", kv_heads * head, width)
        matrix(f"{block}.attn_output", width, heads * head)
        matrix(f"{block}.ffn_gate", inner, width)
        matrix(f"{block}.ffn_up", inner, width)
        matrix(f"{block}.ffn_down", width, inner)
    norm("output_norm")
    matrix("output", vocabulary, width)
    return spec


Change = Callable[[Spec], object]


def key(name: str, value: Any, kind: Type = Type.UINT32) -> Change:
    return lambda spec: spec.set(name, value, kind)


def no_key(name: str) -> Change:
    return lambda spec: spec.keys.pop(f"llama.{name}")


def no_tensor(name: str) -> Change:
    return lambda spec: spec.tensors.pop(name)


def shape(name: str, *wanted: int) -> Change:
    return lambda spec: spec.tensors.__setitem__(name, np.ones(wanted, np.float32))


def coded(name: str, kind: Quant) -> Change:
    return lambda spec: spec.types.__setitem__(name, kind)


def architecture(value: Any) -> Change:
    return lambda spec: setattr(spec, "architecture", value)


NAN, INF = float("nan"), float("inf")
EPS = "attention.layer_norm_rms_epsilon"
# What is wrong, how to make it so, what the message must name besides the file.
CASES: dict[str, tuple[Change, str]] = {
    **{f"no {n}": (no_tensor(n), n) for n in (
        "token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight",
        "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_output.weight",
        "blk.0.ffn_norm.weight", "blk.1.ffn_gate.weight", "blk.1.ffn_down.weight",
    )},
    **{f"no {n}": (no_key(n), f"llama.{n}") for n in (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    )},
    "rows of q": (shape("blk.0.attn_q.weight", 60, 64), "blk.0.attn_q.weight"),
    "columns of k": (shape("blk.0.attn_k.weight", 32, 32), "blk.0.attn_k.weight"),
    "transposed": (shape("blk.1.ffn_down.weight", 96, 64), "blk.1.ffn_down.weight"),
    "width of the embedding": (shape("token_embd.weight", 80, 96), "token_embd.weight"),
    "embedding is a vector": (shape("token_embd.weight", 5120), "token_embd.weight"),
    "embedding of 3 dimensions": (shape("token_embd.weight", 2, 40, 64), "token_embd.weight"),
    "rows of the head": (shape("output.weight", 96, 64), "output.weight"),
    "length of a norm": (shape("blk.1.ffn_norm.weight", 32), "blk.1.ffn_norm.weight"),
    "norm is a matrix": (shape("output_norm.weight", 1, 64), "output_norm.weight"),
    "length of a bias": (shape("blk.0.attn_q.bias", 63), "blk.0.attn_q.bias"),
    "length of a QK norm": (shape("blk.0.attn_q_norm.weight", 8), "blk.0.attn_q_norm.weight"),
    "rope factors": (shape("rope_freqs.weight", 3), "rope_freqs.weight"),
    "one expert matrix more": (key("expert_count", 8), "llama.expert_used_count"),
    "no architecture": (architecture(None), "general.architecture"),
    "architecture is a number": (architecture(7), "general.architecture"),
    "unknown architecture": (architecture("mamba9"), "mamba9"),
    "architecture is a path": (architecture("../llama"), "../llama"),
    "architecture is a helper": (architecture("common"), "common"),
    "architecture is empty": (architecture(""), "architecture"),
    "architecture is long": (architecture("x" * 5000), "architecture"),
    "another architecture's keys": (architecture("qwen2"), "qwen2.block_count"),
    "no layers": (key("block_count", 0), "llama.block_count"),
    "a layer more": (key("block_count", 3), "blk.2."),
    "1,024 layers": (key("block_count", 1024), "blk.2."),
    "billions of layers": (key("block_count", 4_000_000_000), "llama.block_count"),
    "layers are text": (key("block_count", "2", Type.STRING), "llama.block_count"),
    "layers are a float": (key("block_count", 2.0, Type.FLOAT32), "llama.block_count"),
    "layers are yes": (key("block_count", True, Type.BOOL), "llama.block_count"),
    "no heads": (key("attention.head_count", 0), "llama.attention.head_count"),
    "3 heads": (key("attention.head_count", 3), "heads"),
    "4 heads, 3 KV heads": (key("attention.head_count_kv", 3), "KV heads"),
    "more KV heads than heads": (key("attention.head_count_kv", 8), "KV heads"),
    "8 heads in tensors of 4": (
        key("attention.head_count", 8), "blk.0.attn_k.weight",
    ),
    "more heads than width": (key("attention.head_count", 128), "heads have no width"),
    "huge number of heads": (key("attention.head_count", 1 << 31), "attention.head_count"),
    "negative heads": (
        key("attention.head_count", -4, Type.INT32), "llama.attention.head_count",
    ),
    "heads of one layer too many": (
        key("attention.head_count", [4, 4, 4], Type.ARRAY), "llama.attention.head_count",
    ),
    "heads of text": (
        key("attention.head_count", ["4", "4"], Type.ARRAY), "llama.attention.head_count",
    ),
    "heads that differ": (
        key("attention.head_count_kv", [2, 4], Type.ARRAY), "llama.attention.head_count_kv",
    ),
    "keys wider than values": (key("attention.value_length", 8), "values"),
    "wide heads": (key("attention.key_length", 5000), "llama.attention.key_length"),
    "no width": (key("embedding_length", 0), "llama.embedding_length"),
    "huge width": (key("embedding_length", 1 << 31), "llama.embedding_length"),
    "another width": (key("embedding_length", 128), "token_embd.weight"),
    "no inner width": (key("feed_forward_length", 0), "llama.feed_forward_length"),
    "another inner width": (key("feed_forward_length", 64), "blk.0.ffn_gate.weight"),
    "no context": (key("context_length", 0), "llama.context_length"),
    "endless context": (
        key("context_length", 1 << 62, Type.UINT64), "llama.context_length",
    ),
    "odd rotation": (key("rope.dimension_count", 7), "rotated"),
    "rotation wider than a head": (key("rope.dimension_count", 32), "rotated"),
    "yarn": (key("rope.scaling.type", "yarn", Type.STRING), "yarn"),
    "longrope": (key("rope.scaling.type", "longrope", Type.STRING), "longrope"),
    "scaling is a number": (key("rope.scaling.type", 1), "llama.rope.scaling.type"),
    "window is negative": (
        key("attention.sliding_window", -1, Type.INT32), "llama.attention.sliding_window",
    ),
    **{f"{n} is {v}": (key(n, v, Type.FLOAT32), f"llama.{n}") for n, values in (
        (EPS, (NAN, INF, -1e-5)),
        ("rope.freq_base", (NAN, INF, -INF, 0.0, -10000.0)),
        ("rope.scaling.factor", (NAN, INF, 0.0, -2.0)),
    ) for v in values},
    "integers as weights": (coded("blk.0.ffn_up.weight", Quant.I32), "blk.0.ffn_up.weight"),
    "wide integers": (coded("blk.1.attn_v.weight", Quant.I64), "blk.1.attn_v.weight"),
    "integers as a norm": (coded("blk.0.ffn_norm.weight", Quant.I32), "blk.0.ffn_norm.weight"),
}  # fmt: skip


def outcome(path: Path, monkeypatch: pytest.MonkeyPatch) -> HeadraceError | None:
    """Load and use a file within bounds of time and memory; what came of it."""
    taken: list[int] = []
    make = Arena.__init__

    def watched(self: Arena, sizes: dict[str, int], **options: Any) -> None:
        taken.append(sum(sizes.values()))
        make(self, sizes, **options)

    monkeypatch.setattr(Arena, "__init__", watched)
    resident = peak_rss_bytes()
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with headrace.load(path, threads=2) as model:
            model.tokenize("abc")
        return None
    except HeadraceError as error:
        seconds = time.perf_counter() - begin
        peak = tracemalloc.get_traced_memory()[1]
        assert seconds < DEADLINE_S
        assert peak < MEMORY_BYTES
        assert peak_rss_bytes() - resident < 4 * MEMORY_BYTES  # modules may be loaded on the way
        assert sum(taken) < MEMORY_BYTES
        return error
    finally:
        tracemalloc.stop()
        monkeypatch.undo()


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile what the good model needs, so that no case waits for it."""
    path = tiny().write(tmp_path_factory.mktemp("good") / "m.gguf")
    with headrace.load(path, threads=2) as model:
        model.tokenize("abc")


def test_the_good_model_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    assert outcome(path, monkeypatch) is None
    check_against_the_reference(path)


@pytest.mark.parametrize("case", CASES)
def test_one_thing_wrong(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, named = CASES[case]
    spec = tiny()
    change(spec)
    path = spec.write(tmp_path / "m.gguf")
    error = outcome(path, monkeypatch)
    assert isinstance(error, ModelFileError), f"{case}: {error!r}"
    message = str(error)
    assert str(path) in message
    assert named in message
    assert len(message) < 1000
    message.encode()
    with pytest.raises(type(error)):  # the plan of a file that cannot be loaded is no answer
        plan_model(path, measure=False)


def test_what_is_unsupported_says_so(tmp_path: Path) -> None:
    for change in (architecture("mamba9"), key("rope.scaling.type", "yarn", Type.STRING),
                   coded("blk.0.ffn_up.weight", Quant.I32)):  # fmt: skip
        spec = tiny()
        change(spec)
        with pytest.raises(UnsupportedError):
            headrace.load(spec.write(tmp_path / "m.gguf"))


def test_a_vocabulary_larger_than_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny()
    for name in ("token_embd.weight", "output.weight"):
        spec.tensors[name] = spec.tensors[name][:79]
    path = spec.write(tmp_path / "m.gguf")
    error = outcome(path, monkeypatch)
    assert error is not None and str(path) in str(error)
    assert "80" in str(error) and "79" in str(error)


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.1])
def test_a_file_cut_after_its_header_was_read(keep: float, tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    prepared = prepare(path, context=None, threads=2, target=None)
    header = prepared.file.header_bytes
    before = path.stat().st_size
    os.truncate(path, header + int((before - header) * keep))
    with pytest.raises(ModelFileError, match=f"cut or grew from {before:,} bytes") as caught:
        Model(prepared, None)
    assert str(path) in str(caught.value)
    assert f"{path.stat().st_size:,} bytes" in str(caught.value)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    prepared = prepare(path, context=None, threads=2, target=None)
    path.unlink()
    with pytest.raises(HeadraceError, match=r"m\.gguf"):
        Model(prepared, None)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.0.attn_v.weight", "output_norm.weight", "output.weight"]
)
def test_weights_that_are_no_numbers(name: str, value: float, tmp_path: Path) -> None:
    """Found at the first token: never a crash, a hang or an invented answer."""
    spec = tiny()
    spec.tensors[name] = spec.tensors[name].copy()
    spec.tensors[name][...] = value
    with headrace.load(spec.write(tmp_path / "m.gguf"), threads=2) as model:
        for sampling in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}):
            for prompt in ([5], list(range(3, 40))):
                with pytest.raises(HeadraceError, match="finite"):
                    model.generate(prompt, max_tokens=3, **sampling).text()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, NAN])
def test_rope_factors_that_cannot_be(value: float, tmp_path: Path) -> None:
    spec = tiny()
    spec.tensors["rope_freqs.weight"] = np.full(8, value, np.float32)
    path = spec.write(tmp_path / "m.gguf")
    with pytest.raises(HeadraceError), headrace.load(path, threads=2) as model:
        model.generate([5, 6, 7], max_tokens=3).text()


# --- unusual, but right -------------------------------------------------------------------------


def check_against_the_reference(path: Path) -> None:
    """Logits of a prompt read at once, in pieces and one by one."""
    ids = [int(i) for i in np.random.default_rng(1).integers(3, 80, 50)]
    expected = ReferenceLlama(path).logits(ids)
    with headrace.load(path, threads=2, activations="f32") as model:
        allowed = 2 * WORST * expected.std()  # wide scores: few heads make a token
        assert np.abs(model.logits(ids) - expected).max() < allowed * rounding(model)
        for pieces in (10, 1):
            rows = []
            for start in range(0, len(ids), pieces):
                model.read_tokens(ids[start : start + pieces], start)
                rows.append(model._logits().copy())
            error = np.abs(np.array(rows) - expected[pieces - 1 :: pieces]).max()
            assert error < allowed * (FLOAT16 if pieces == 1 else rounding(model)), pieces


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 48, "heads": 3, "kv_heads": 1, "inner": 40},
        {"width": 40, "heads": 2, "kv_heads": 2, "inner": 24},
        {"width": 36, "heads": 6, "kv_heads": 3, "inner": 100, "vocabulary": 81},
        {"heads": 5, "kv_heads": 1, "head": 12},
        {"heads": 1, "kv_heads": 1},
        {"layers": 1, "inner": 1},
    ],
    ids=str,
)
def test_sizes_that_fill_no_block(sizes: dict[str, int], tmp_path: Path) -> None:
    spec = tiny(**sizes)
    if "head" in sizes:
        spec.set("rope.dimension_count", sizes["head"])
    path = spec.write(tmp_path / "m.gguf")
    check_against_the_reference(path)


def test_relu_between_gate_and_down(tmp_path: Path) -> None:
    spec = tiny()
    silu = ReferenceLlama(spec.write(tmp_path / "silu.gguf")).logits([5, 6, 7])
    spec.set("feed_forward_activation", "relu", Type.STRING)
    path = spec.write(tmp_path / "relu.gguf")
    assert not np.allclose(ReferenceLlama(path).logits([5, 6, 7]), silu, rtol=0.1)
    check_against_the_reference(path)
    spec.set("feed_forward_activation", "tanh", Type.STRING)
    with pytest.raises(UnsupportedError, match="feed_forward_activation is 'tanh', expected one"):
        headrace.load(spec.write(tmp_path / "tanh.gguf"))


@pytest.mark.parametrize("rotated", [0, 8])
def test_heads_rotated_in_part(rotated: int, tmp_path: Path) -> None:
    spec = tiny()
    spec.set("rope.dimension_count", rotated)
    with headrace.load(spec.write(tmp_path / "m.gguf"), threads=2) as model:
        ids = list(range(3, 43))
        whole = model.logits(ids)
        assert np.isfinite(whole).all()
        turned = model.logits(ids[:20][::-1] + ids[20:])[-1]
        if rotated == 0:  # nothing tells the order of what came before, in the first layer at least
            model.read_tokens([ids[0]])
            assert np.allclose(model._logits(), whole[0], atol=1e-3)
        assert not np.array_equal(turned, whole[-1])


def test_every_matrix_of_another_type(tmp_path: Path) -> None:
    """One norm then makes two kinds of activations."""
    spec = tiny(inner=128)
    kinds = [Quant.Q8_0, Quant.F16, Quant.Q4_0, Quant.BF16, Quant.Q5_0, Quant.F32, Quant.Q4_1]
    matrices = [name for name, values in spec.tensors.items() if values.ndim == 2]
    for i, name in enumerate(matrices):
        spec.types[name] = kinds[i % len(kinds)]
    path = spec.write(tmp_path / "m.gguf")
    check_against_the_reference(path)
    ids = list(range(3, 50))
    expected = ReferenceLlama(path).logits(ids)
    with headrace.load(path, threads=3) as model:
        assert np.abs(model.logits(ids) - expected).max() / expected.std() < 0.3
        for i, token in enumerate(ids):
            model.read_tokens([token], i)
        assert np.abs(model._logits() - expected[-1]).max() / expected.std() < 0.3
