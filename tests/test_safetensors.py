"""Safetensors directories: the same model as its GGUF file, in memory and streamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_directory as hf
import ml_dtypes
import numpy as np
import pytest
from reference_llama import ReferenceLlama
from safetensors.numpy import load_file, save_file
from test_families import Golden, check_close, rounding
from test_streaming import check as check_streamed
from test_streaming import small_pieces  # noqa: F401  # a fixture

import headrace
from headrace import cli
from headrace.compress import compress
from headrace.errors import ModelFileError, ModelNotFoundError, UnsupportedError
from headrace.families import describe
from headrace.loaders import huggingface
from headrace.loaders.expert_tensors import as_matrix
from headrace.loaders.huggingface import read_directory
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import open_model
from headrace.memory_plan import plan_model
from headrace.sparse.expand import expand, expand_scaled, plan_expansion
from headrace.sparse.registry import FORMATS

SPLIT = "model-00002-of-00003.safetensors"


def logits(path: Path, ids: list[int], **options: Any) -> np.ndarray:
    with headrace.load(path, threads=2, **options) as model:
        return np.concatenate([model.logits(ids), model.logits(ids[:1]), model.logits(ids[:3])])


# --- the same model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf.FAMILIES)
def test_families_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", name, shards=3)
    golden = Golden(name)
    with (
        headrace.load(folder, activations="f32", threads=2) as model,
        headrace.load(hf.FAMILIES[name], activations="f32", threads=2) as other,
    ):
        found = model.logits(golden.prompt)
        check_close(found[golden.positions], golden.logits, rounding(model))
        # The order of rows within a head changes no sum; Llama 3's divisors are rounded otherwise.
        expected = other.logits(golden.prompt)
        assert np.abs(found - expected).max() <= (1e-4 if name == "llama3" else 0)
        generation = model.generate(golden.prompt, max_tokens=len(golden.continuation))
        generation.text()
        assert generation.ids == golden.continuation[: len(generation.ids)]


def test_every_model_type_has_been_run() -> None:
    run = {json.loads(p.with_suffix(".json").read_text())["config"]["model_type"]
           for p in hf.FAMILIES.values()}  # fmt: skip
    # MoE++ is none of transformers' (test_moepp.py).
    assert run | {"gemma3", "moepp"} == set(huggingface.names())


@pytest.mark.parametrize("name", hf.FAMILIES)
def test_keys_and_names_are_those_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    model = open_model(hf.family_directory(tmp_path / "m", name))
    other = open_model(hf.FAMILIES[name])
    shapes: dict[str, tuple[int, ...]] = {}
    for name, t in other.tensors.items():
        if "_exps." in name:
            names = [name.replace("_exps.", f".{e}.") for e in range(t.shape[0])]
            shapes |= dict.fromkeys(names, t.shape[1:])
        elif name != "rope_freqs.weight":
            shapes[name] = as_matrix(t).shape
    assert {k: t.shape for k, t in model.tensors.items()} == shapes
    architecture = other.metadata["general.architecture"]
    for key, value in other.metadata.items():
        if key.startswith(f"{architecture}.") and "vocab_size" not in key:
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
            assert model.metadata[key] == wanted, key


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_types_are_streamed_bit_for_bit(dtype: str, shards: int, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "llama2", dtype=dtype, shards=shards)
    check_streamed(folder)


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_families_are_streamed_bit_for_bit(name: str, tmp_path: Path) -> None:
    check_streamed(hf.family_directory(tmp_path / "m", name))


def test_weights_may_lie_at_odd_places(tmp_path: Path) -> None:
    """Behind a tensor of an odd number of bytes, which no kernel reads."""
    folder = hf.family_directory(tmp_path / "m", "llama2", dtype="F32")
    path = folder / "model.safetensors"
    ids = Golden("llama2").prompt
    expected = logits(folder, ids)
    tensors = load_file(path)
    raw = {n: ("F32", x.shape, x.tobytes()) for n, x in tensors.items()}
    odd = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("U8", (3,), b"abc"), **raw}
    path.write_bytes(safetensors_bytes(odd))
    assert {t.offset % 4 for t in open_model(folder).tensors.values()} != {0}
    assert np.array_equal(logits(folder, ids), expected)
    check_streamed(folder)


def safetensors_bytes(tensors: dict[str, tuple[str, Any, bytes]]) -> bytes:
    """A file with tensors in this order, its header not aligned."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [at, at + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(d for *_, d in tensors.values())


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    return hf.smollm2_directory(folder, smollm2_path, "BF16", 2)


def test_smollm2_from_a_directory(smollm2: Path, smollm2_path: Path) -> None:
    with (
        headrace.load(smollm2, context=256) as model,
        headrace.load(smollm2_path, context=256, activations="f32") as source,
    ):
        assert model.format == "bf16"
        question = [{"role": "user", "content": "What is the capital of France?"}]
        ids = source.tokenize_chat(question)
        assert model.tokenize_chat(question) == ids
        # The directory's weights are the file's, rounded to 8 bits.
        one, two = model.logits(ids, last=1)[0], source.logits(ids, last=1)[0]
        assert np.corrcoef(one, two)[0, 1] > 0.999
        assert "Paris" in model.generate("What is the capital of France?", max_tokens=12).text()


def test_stories_from_a_directory_are_the_references(tmp_path: Path) -> None:
    source = hf.DATA / "stories260K.gguf"
    keys = hf.fields(source)
    tensors = hf.checkpoint(source, hf.llama_names(keys["llama.block_count"], tied=True))
    hf.write_weights(tmp_path, tensors)
    hf.write_tokenizer(tmp_path, keys)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    hf.write_json(tmp_path, "config.json", config)
    reference = ReferenceLlama(source)
    with headrace.load(tmp_path, threads=2) as model:
        generation = model.generate("Once upon a time", raw=True, max_tokens=100)
        text = generation.text()
        ids = model.tokenize("Once upon a time") + generation.ids
        assert reference.first_departure(ids, len(ids) - len(generation.ids)) is None, text
        check_close(model.logits(ids), reference.logits(ids), rounding(model))


# --- configs --------------------------------------------------------------------------------------


def test_configs_of_older_transformers(tmp_path: Path) -> None:
    """Rope in `rope_theta`, `rope_scaling` and `rope_local_base_freq`."""

    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        if "full_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        key = "type" if kind == "linear" else "rope_type"
        config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
        for gone in ("layer_types", "_sliding_window_pattern", "head_dim"):
            if gone != "head_dim" or config["model_type"] == "llama":
                config.pop(gone, None)

    for name in ("llama3", "llama_linear", "gemma3_scaled", "qwen3"):
        new = open_model(hf.family_directory(tmp_path / "new" / name, name))
        old = open_model(hf.family_directory(tmp_path / "old" / name, name, change=older))
        mine = {k: v for k, v in new.metadata.items() if not k.startswith("tokenizer.")}
        assert {k: old.metadata[k] for k in mine} == mine


def test_llama_with_relu(tmp_path: Path) -> None:
    def relu(config: dict[str, Any]) -> None:
        config["hidden_act"] = "relu"

    path = hf.family_directory(tmp_path / "relu", "llama2", change=relu)
    f = describe(open_model(path)).layers[0].feed_forward
    assert f.activation == "relu"


def test_gemma3_with_images_gives_its_text_model(tmp_path: Path) -> None:
    text = hf.family_directory(tmp_path / "text", "gemma3")
    ids = Golden("gemma3").prompt
    expected = logits(text, ids)
    tensors = load_file(text / "model.safetensors")
    config = json.loads((text / "config.json").read_text())
    for i, rename in enumerate(
        (lambda n: f"language_model.{n}", lambda n: n.replace("model.", "model.language_model.", 1))
    ):
        folder = tmp_path / str(i)
        shutil.copytree(text, folder)
        images = "vision_tower.x.weight" if i == 0 else "model.vision_tower.x.weight"
        renamed = {rename(name): x for name, x in tensors.items()}
        save_file({**renamed, images: np.zeros(3, np.float32)}, folder / "model.safetensors")
        hf.write_json(folder, "config.json", {"model_type": "gemma3", "text_config": config})
        assert np.array_equal(logits(folder, ids), expected)


def test_a_tied_head_is_the_embedding_even_if_there_is_another(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "qwen2")
    expected = logits(folder, [5, 6, 7])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = np.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    assert np.array_equal(logits(folder, [5, 6, 7]), expected)


def set_to(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
BAD_CONFIGS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("llama2", set_to(model_type="t5"), "model_type is 't5'; these are supported"),
    ("llama2", set_to(model_type="../llama"), "model_type is '../llama'"),
    ("llama2", set_to(model_type="common"), "model_type is 'common'"),
    ("llama2", set_to(model_type=None), "model_type is missing"),
    ("llama2", set_to(hidden_act="tanh"), "hidden_act is 'tanh', and only 'silu' or 'swish' or"),
    ("llama2", set_to(hidden_size="64"), "hidden_size is '64', expected int"),
    ("llama2", set_to(num_hidden_layers=True), "num_hidden_layers is True, expected int"),
    ("llama2", set_to(num_hidden_layers=1 << 40), "num_hidden_layers is 1099511627776, beyond"),
    ("llama2", set_to(num_attention_heads=0), "num_attention_heads is 0"),
    ("llama2", set_to(num_attention_heads=5), "5 heads do not divide among 2 KV heads"),
    ("mixtral", set_to(num_local_experts=-1), "num_local_experts is -1, expected at least 1"),
    ("mixtral", set_to(num_local_experts=0), "num_local_experts is 0, expected at least 1"),
    ("mixtral", set_to(num_experts_per_tok=0), "num_experts_per_tok is 0, expected at least 1"),
    ("mixtral", set_to(intermediate_size=-1), "intermediate_size is -1, expected at least 1"),
    ("olmoe", set_to(num_experts="8"), "num_experts is '8', expected int"),
    ("olmoe", set_to(num_experts=1 << 20), "num_experts is 1048576, expected at most 4096"),
    ("olmoe", set_to(num_experts_per_tok=99), "num_experts_per_tok is 99, expected at most"),
    ("qwen2moe", set_to(num_experts_per_tok=-2), "num_experts_per_tok is -2, expected at least"),
    ("qwen2moe", set_to(moe_intermediate_size=0), "moe_intermediate_size is 0, expected at"),
    (
        "qwen2moe", set_to(shared_expert_intermediate_size=-1),
        "shared_expert_intermediate_size is -1, expected at least 1",
    ),
    ("qwen3moe", set_to(num_experts=1 << 60), "num_experts is 1152921504606846976, beyond"),
    ("qwen3moe", set_to(num_experts_per_tok=True), "num_experts_per_tok is True, expected int"),
    ("llama2", set_to(rms_norm_eps=float("1e400")), "no JSON number"),
    ("llama2", set_to(rope_parameters=YARN), "rope_parameters.rope_type is 'yarn', and only"),
    (
        "llama2",
        lambda c: c.update(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_scaling.rope_type is 'dynamic'",
    ),
    ("llama2", set_to(partial_rotary_factor=0.5), "partial_rotary_factor is '0.5'"),
    (
        "llama2",
        set_to(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config.quant_method is 'gptq'; of quantised checkpoints only FP8",
    ),
    ("llama2", set_to(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', expected bool"),
    ("llama2", set_to(num_hidden_layers=1), "no part of a 'llama' model"),
    ("llama3", lambda c: c["rope_parameters"].pop("factor"), "rope_parameters.factor is missing"),
    ("qwen2", set_to(use_sliding_window=True), "use_sliding_window is 'True'"),
    ("gemma3", set_to(layer_types=["full_attention"] * 7), "layer_types is"),
    ("gemma3", set_to(sliding_window_pattern=2), "sliding_window_pattern is '2'"),
    ("gemma2", set_to(query_pre_attn_scalar=-1.0), "query_pre_attn_scalar is -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD_CONFIGS)
def test_bad_configs(name: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", name, change=change)
    with pytest.raises(ModelFileError) as caught:
        headrace.load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_head_is_wanted_where_nothing_ties_it(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "qwen2", change=set_to(tie_word_embeddings=False))
    with pytest.raises(ModelFileError, match=r"no head \('lm_head.weight'\)"):
        headrace.load(folder)


def test_tensors_that_are_not_known_are_refused(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.experts.0.w1.weight", "model.layers.00.mlp.up_proj.weight",
                 "score.weight"):  # fmt: skip
        save_file({**tensors, name: np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
        with pytest.raises(UnsupportedError, match="no part of a 'qwen2' model") as caught:
            headrace.load(folder)
        assert caught.value.tensor == name


# --- FP8 ------------------------------------------------------------------------------------------

FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("name", FLOAT8)
def test_all_numbers_of_float8(name: str) -> None:
    raw = np.arange(256, dtype=np.uint8)[None]
    expected = raw.view(FLOAT8[name]).astype(np.float32)
    fmt = plan_expansion(name)
    assert fmt.name == "f16"
    for target in (fmt, FORMATS["f32"]):
        found = target.decode(expand(raw, name, target))
        assert np.array_equal(found, expected, equal_nan=True)


def float8_directory(
    folder: Path, dtype: str, shape: str, *, shards: int = 1
) -> tuple[Path, dict[str, np.ndarray]]:
    """llama2 with its layers in FP8, and the tensors that it means in float32."""
    hf.family_directory(folder, "llama2", dtype="F32")
    meant, stored = {}, {}
    rng = np.random.default_rng(3)
    for name, x in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            meant[name] = stored[name] = x
            continue
        rows, columns = x.shape
        blocks = {
            "none": None, "one": (), "rows": (rows, 1),
            "blocks": (-(-rows // 48), -(-columns // 40)),
        }[shape]  # fmt: skip
        factor = np.float32(1)
        if blocks is not None:
            scale = rng.uniform(0.01, 0.04, blocks).astype(np.float32)
            suffix = "_scale_inv" if shape == "blocks" else "_scale"
            stored[f"{name}{suffix}"] = scale
            factor = scale
            if shape == "blocks":
                factor = np.repeat(np.repeat(scale, 48, 0), 40, 1)[:rows, :columns]
        codes = (x / factor).astype(FLOAT8[dtype])
        stored[name] = codes
        meant[name] = codes.astype(np.float32) * factor
    config = json.loads((folder / "config.json").read_text())
    if shape != "none":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [48, 40]}
    hf.write_json(folder, "config.json", config)
    (folder / "model.safetensors").unlink()
    hf.write_weights(folder, stored, shards)
    return folder, meant


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("shape", ["none", "one", "rows", "blocks"])
def test_float8_weights(
    dtype: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.rows.PIECE_BYTES", 3000)  # scales of rows in the middle
    monkeypatch.setattr("headrace.sparse.expand.CHUNK_BYTES", 700)
    folder, meant = float8_directory(tmp_path / "m", dtype, shape, shards=2)
    ids = Golden("llama2").prompt
    found = logits(folder, ids)
    plain = hf.family_directory(tmp_path / "plain", "llama2", dtype="F32")
    half = {n: x.astype(np.float16) if "proj" in n else x for n, x in meant.items()}
    hf.write_weights(plain, half)
    expected = logits(plain, ids)
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_scaled_weights_in_float32_are_exact(dtype: str) -> None:
    rng = np.random.default_rng(4)
    values = np.arange(256, dtype=np.uint8).view(FLOAT8[dtype]).astype(np.float32)
    codes = np.flatnonzero(np.isfinite(values)).astype(np.uint8)
    raw = rng.choice(codes, (5, 70))
    scales = rng.uniform(0.5, 2, (5, 3)).astype(np.float32)
    found = FORMATS["f32"].decode(expand_scaled(raw, dtype, FORMATS["f32"], scales, 32))
    wide = np.repeat(scales, 32, axis=1)[:, :70]
    expected = raw.view(FLOAT8[dtype]).astype(np.float32) * wide
    assert np.array_equal(found, expected)
    if len(codes) < 256:
        raw[1, 2] = np.flatnonzero(~np.isfinite(values))[0]
        with pytest.raises(ModelFileError, match="no finite number"):
            expand_scaled(raw, dtype, FORMATS["f32"], scales, 32)


def test_float8_is_compressed_to_float16(tmp_path: Path) -> None:
    folder, _ = float8_directory(tmp_path / "m", "F8_E4M3", "blocks")
    done = compress(folder, tmp_path / "m.gguf")
    ids = Golden("llama2").prompt
    assert np.array_equal(logits(done.path, ids), logits(folder, ids))


def test_bad_scales(tmp_path: Path) -> None:
    folder, _ = float8_directory(tmp_path / "m", "F8_E4M3", "blocks")
    path = folder / "model.safetensors"
    tensors = {n: x for n, x in load_raw(path).items()}
    name = "model.layers.0.self_attn.q_proj.weight"

    def refused(changed: dict[str, Any], message: str, tensor: str) -> None:
        path.write_bytes(safetensors_bytes({k: v for k, v in changed.items() if v is not None}))
        with pytest.raises(ModelFileError, match=message) as caught:
            headrace.load(folder)
        assert caught.value.tensor == tensor

    scales = f"{name}_scale_inv"
    refused({**tensors, scales: ("F32", (7,), bytes(28))}, r"expected one in all.*2 x 2", scales)
    refused({**tensors, scales: ("I8", (2, 2), bytes(4))}, "scales of type I8", scales)
    other = {f"{name}_scale": ("F32", (1,), bytes(4))}
    refused({**tensors, **other}, "two kinds of scales", name)
    lost = "model.norm.weight_scale"
    refused({**tensors, lost: ("F32", (1,), bytes(4))}, "no FP8 matrix 'model.norm.weight'", lost)
    huge = np.full((2, 2), 1e9, np.float32).tobytes()
    refused_late = {**tensors, scales: ("F32", (2, 2), huge)}
    path.write_bytes(safetensors_bytes(refused_late))
    with pytest.raises(UnsupportedError, match="beyond what float16 holds") as caught:
        headrace.load(folder)
    assert caught.value.tensor == "blk.0.attn_q.weight"
    nan = np.full((2, 2), np.nan, np.float32).tobytes()
    path.write_bytes(safetensors_bytes({**tensors, scales: ("F32", (2, 2), nan)}))
    with pytest.raises(ModelFileError, match="or its scale, is no finite number") as refused_too:
        headrace.load(folder)
    assert refused_too.value.tensor == "blk.0.attn_q.weight"


def load_raw(path: Path) -> dict[str, tuple[str, Any, bytes]]:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        a, b = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], data[8 + n + a : 8 + n + b])
    return found


def test_types_that_are_not_read(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "llama2")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="its type is I8; Headrace reads F32, F16, BF16"):
        headrace.load(folder)


# --- commands -------------------------------------------------------------------------------------


def test_commands_take_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(hf.family_directory(tmp_path / "m", "llama2"))
    assert cli.main(["run", folder, "the", "-n", "4", "--raw"]) == 0
    assert "4 tokens" in capsys.readouterr().err
    assert cli.main(["plan", folder, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["architecture"] == "llama" and not plan["expanded"]
    assert plan["model"] == folder
    assert cli.main(["inspect", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["gguf_version"] is None and facts["vocabulary"] == 288
    assert {row["loads_as"] for row in facts["types"]} == {"kernel", "float32 vector"}
    assert cli.main(["inspect", folder]) == 0
    capsys.readouterr()
    bench = ["bench", folder, "-p", "16", "-n", "4", "--runs", "1", "--json"]
    assert cli.main(bench) == 0
    assert json.loads(capsys.readouterr().out)["decode_tok_s"] > 0


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2"])
def test_a_tiled_file_of_a_directory_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", name, dtype="BF16", shards=2)
    done = compress(folder, tmp_path / "m.gguf")
    ids = Golden(name).prompt
    assert np.array_equal(logits(folder, ids), logits(done.path, ids))
    mine, its = open_model(folder).metadata, open_model(done.path).metadata
    for key, value in mine.items():
        assert np.array_equal(its[key], value), key
    again = compress(done.path, tmp_path / "again.gguf").path
    assert again.read_bytes() == done.path.read_bytes()


# --- directories ----------------------------------------------------------------------------------


def test_names_of_a_directory(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "llama2", shards=2)
    assert resolve(folder) == folder
    assert resolve(folder / "model.safetensors.index.json") == folder
    shutil.copy(hf.FAMILIES["qwen2"], folder / "other.gguf")
    with pytest.raises(ModelNotFoundError, match=r"holds 2 models(?s:.*)index\.json"):
        resolve(folder)
    assert resolve(folder / "other.gguf") == folder / "other.gguf"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"without model\.safetensors or"):
        resolve(tmp_path / "empty")
    (folder / "other.gguf").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json: no such file"):
        headrace.load(folder)


def test_files_that_change_while_they_are_streamed(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "llama2", dtype="F32", shards=3)
    whole = plan_model(folder, context=64, measure=False).peak_bytes
    with headrace.load(folder, memory=whole - 1, context=64) as model:
        assert model.streams
        model.logits([1, 2, 3])
        os.truncate(folder / SPLIT, 100)
        with pytest.raises(ModelFileError, match="the file changed") as caught:
            model.logits([1, 2, 3])
        assert caught.value.path == folder / SPLIT


def test_the_vocabulary_is_filled_up(tmp_path: Path) -> None:
    """Embeddings may have more rows than there are tokens."""
    folder = hf.family_directory(tmp_path / "m", "qwen2")
    root = json.loads((folder / "tokenizer.json").read_text())
    gone = next(iter(sorted(root["model"]["vocab"], key=root["model"]["vocab"].get, reverse=True)))
    del root["model"]["vocab"][gone]
    root["model"]["merges"] = [m for m in root["model"]["merges"] if "".join(m) != gone]
    hf.write_json(folder, "tokenizer.json", root)
    model = read_directory(folder)
    with headrace.load(folder) as loaded:
        assert loaded.tokenizer.n_vocab == loaded.vocabulary
        assert loaded.detokenize([loaded.vocabulary - 1]) == f"[PAD{loaded.vocabulary - 1}]"
    assert len(model.metadata["tokenizer.ggml.tokens"]) == loaded.vocabulary
