"""FP4 with scales of their own: GGUF files of NVFP4, checkpoints of NVFP4 and MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_directory as hf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_families import Golden
from test_safetensors import load_raw, logits, safetensors_bytes
from test_tiled import logits as logits_of_gguf
from test_tiled import write_model

import headrace
from headrace.compress import compress
from headrace.description import describe_model
from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.gguf import read_gguf
from headrace.sparse.expand import expand, expand_scaled
from headrace.sparse.registry import FORMATS

NAMES = {"modelopt": ("", "_scale_2"), "compressed-tensors": ("_packed", "_global_scale")}
Q = "model.layers.0.self_attn.q_proj.weight"


def float4_directory(folder: Path, method: str) -> tuple[Path, dict[str, np.ndarray]]:
    """llama2 with its layers in NVFP4, and the tensors that it means in float32."""
    hf.family_directory(folder, "llama2", dtype="F32")
    packed, of_all = NAMES[method]
    meant, stored = {}, {}
    for name, x in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            meant[name] = stored[name] = x
            continue
        groups = x.reshape(len(x), -1, 16)
        whole = np.float32(np.abs(x).max() / (6 * 448))
        scale = (np.abs(groups).max(axis=-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
        known = scale.astype(np.float32) * whole
        inverse = np.where(known > 0, 1 / np.where(known > 0, known, 1), 0)[..., None]
        codes = (groups * inverse).astype(ml_dtypes.float4_e2m1fn)
        meant[name] = (codes.astype(np.float32) * known[..., None]).reshape(x.shape)
        bits = codes.view(np.uint8).reshape(x.shape)
        stored[f"{name}{packed}"] = bits[:, ::2] & 15 | (bits[:, 1::2] & 15) << 4
        stored[f"{name}_scale"] = scale
        if method == "modelopt":
            stored[f"{name}{of_all}"] = np.array(whole)
            stored[f"{name.removesuffix('.weight')}.input_scale"] = np.array(np.float32(1))
        else:
            stored[f"{name}{of_all}"] = np.array([1 / whole], np.float32)
            meant[name] = meant[name] / whole / stored[f"{name}{of_all}"]  # nearly 1
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    hf.write_json(folder, "config.json", config)
    (folder / "model.safetensors").unlink()
    hf.write_weights(folder, stored)
    return folder, meant


@pytest.mark.parametrize("method", NAMES)
def test_checkpoints(method: str, tmp_path: Path) -> None:
    folder, meant = float4_directory(tmp_path / "m", method)
    plain = hf.family_directory(tmp_path / "plain", "llama2", dtype="F32")
    hf.write_weights(plain, meant)
    ids = Golden("llama2").prompt
    expected = logits(plain, ids, activations="f32")
    exact = logits(folder, ids, activations="f32")
    assert np.abs(exact - expected).max() < 1e-4 * np.ptp(expected)
    found = logits(folder, ids)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    loads = {row["type"]: row["loads_as"] for row in describe_model(folder)["types"]}
    assert loads["F4_E2M1"] == "expanded to e2m1_g16"
    again = compress(folder, tmp_path / "m.gguf").path
    assert np.array_equal(logits(again, ids), found)


def mxfp4_directory(folder: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """llama2 with its layers in MXFP4, and the tensors that it means in float32."""
    hf.family_directory(folder, "llama2", dtype="F32")
    meant, stored = {}, {}
    for name, x in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            meant[name] = stored[name] = x
            continue
        groups = x.reshape(len(x), -1, 32)
        power = np.floor(np.log2(np.maximum(np.abs(groups).max(axis=-1), 1e-30))) - 2
        known = np.exp2(power)[..., None]
        codes = (groups / known).astype(ml_dtypes.float4_e2m1fn)
        meant[name] = (codes.astype(np.float32) * known).astype(np.float32).reshape(x.shape)
        bits = codes.view(np.uint8).reshape(x.shape)
        packed = bits[:, ::2] & 15 | (bits[:, 1::2] & 15) << 4
        scales = (power + 127).astype(np.uint8)
        if kind == "gpt-oss":
            stem = name.removesuffix(".weight")
            stored[f"{stem}_blocks"] = packed.reshape(*scales.shape, 16)
            stored[f"{stem}_scales"] = scales
        else:
            stored[f"{name}_packed"] = packed
            stored[f"{name}_scale"] = scales.view(ml_dtypes.float8_e8m0fnu)
    config = json.loads((folder / "config.json").read_text())
    method = "mxfp4" if kind == "gpt-oss" else "compressed-tensors"
    config["quantization_config"] = {"quant_method": method}
    hf.write_json(folder, "config.json", config)
    (folder / "model.safetensors").unlink()
    hf.write_weights(folder, stored)
    return folder, meant


@pytest.mark.parametrize("kind", ["gpt-oss", "compressed-tensors"])
def test_mxfp4_checkpoints(kind: str, tmp_path: Path) -> None:
    folder, meant = mxfp4_directory(tmp_path / "m", kind)
    plain = hf.family_directory(tmp_path / "plain", "llama2", dtype="F32")
    hf.write_weights(plain, meant)
    ids = Golden("llama2").prompt
    expected = logits(plain, ids, activations="f32")
    assert np.array_equal(logits(folder, ids, activations="f32"), expected)
    found = logits(folder, ids)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    loads = {row["type"]: row["loads_as"] for row in describe_model(folder)["types"]}
    assert loads["F4_E2M1"] == "expanded to MXFP4"
    again = compress(folder, tmp_path / "m.gguf").path
    assert np.array_equal(logits(again, ids), found)


def test_every_scale_of_mxfp4() -> None:
    exponents = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = np.random.default_rng(0).integers(0, 256, (4, 64 * 16), dtype=np.uint8)
    fmt = FORMATS["mxfp4"]
    f32 = FORMATS["f32"]
    scales = f32.decode(expand(exponents, "F8_E8M0", f32))
    raw = expand_scaled(codes, "F4_E2M1", fmt, scales, 32).reshape(4, 64, 17)
    assert np.array_equal(raw[..., 0], exponents)
    low = codes.reshape(4, 64, 16)[..., :8] & 15  # inputs 0, 2, .. 14
    assert np.array_equal(raw[..., 1:17:2] & 15, low)


def test_bad_mxfp4_checkpoints(tmp_path: Path) -> None:
    folder, _ = mxfp4_directory(tmp_path / "m", "gpt-oss")
    path = folder / "model.safetensors"
    tensors = load_raw(path)
    q = Q.removesuffix(".weight")
    kind, shape, data = tensors[f"{q}_blocks"]

    def refused(changed: dict[str, Any], message: str, tensor: str) -> None:
        path.write_bytes(safetensors_bytes(tensors | changed))
        with pytest.raises((ModelFileError, UnsupportedError), match=message) as caught:
            headrace.load(folder)
        assert caught.value.tensor == tensor

    refused({f"{q}_scales": ("U8", (4,), bytes(4))}, "expected", f"{q}_scales")
    refused({f"{q}_scales": ("F16", (2,), bytes(4))}, "of type F16", f"{q}_scales")
    refused({f"{q}_blocks": (kind, (1, *shape), data)}, "of no matrix", f"{q}_blocks")


def test_bad_checkpoints(tmp_path: Path) -> None:
    folder, _ = float4_directory(tmp_path / "m", "modelopt")
    path = folder / "model.safetensors"
    tensors = load_raw(path)

    def refused(changed: dict[str, Any], message: str, tensor: str) -> None:
        kept = {k: v for k, v in (tensors | changed).items() if v is not None}
        path.write_bytes(safetensors_bytes(kept))
        with pytest.raises((ModelFileError, UnsupportedError), match=message) as caught:
            headrace.load(folder)
        assert caught.value.tensor == tensor

    refused({f"{Q}_scale_2": None}, "without their scale", Q)
    refused({f"{Q}_scale": ("F8_E4M3", (4,), bytes(4))}, "expected", f"{Q}_scale")
    refused({f"{Q}_scale": ("F16", (2,), bytes(4))}, "of type F16", f"{Q}_scale")
    refused({f"{Q}_scale_2": ("F32", (2,), bytes(8))}, "expected", f"{Q}_scale_2")


def test_gguf_files(tmp_path: Path) -> None:
    name = "blk.1.ffn_up"
    scale = np.array([0.0125], np.float32)
    source = write_model(tmp_path / "s.gguf", ["NVFP4"], {f"{name}.scale": scale})
    plain = write_model(tmp_path / "p.gguf", ["F32"])
    given, model = read_gguf(source), read_gguf(plain)
    with plain.open("r+b") as file:  # what the other one means
        for tensor, info in model.tensors.items():
            theirs = given.tensors[tensor]
            if theirs.type == "NVFP4":
                raw = given.read(theirs).reshape(info.shape[0], -1)
                x = FORMATS["nvfp4"].decode(raw)
                x = x * scale if tensor == f"{name}.weight" else x
                file.seek(info.offset)
                file.write(x.astype(np.float32).tobytes())
    expected = logits_of_gguf(plain, activations="f32")
    found = logits_of_gguf(source, activations="f32")
    assert np.abs(found - expected).max() < 1e-5 * np.ptp(expected)
    coded = logits_of_gguf(source)
    assert np.corrcoef(coded.ravel(), expected.ravel())[0, 1] > 0.999
    loads = {(row["type"], row["loads_as"]) for row in describe_model(source)["types"]}
    assert ("NVFP4", "expanded to e2m1_g16") in loads
    assert np.array_equal(logits_of_gguf(compress(source, tmp_path / "c.gguf").path), coded)
    again = logits_of_gguf(compress(source, tmp_path / "n.gguf", format="nvfp4").path)
    assert np.corrcoef(again.ravel(), expected.ravel())[0, 1] > 0.99
