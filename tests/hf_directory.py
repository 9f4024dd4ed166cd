"""Model directories as transformers writes them, made from GGUF files.

Names and configs are transformers' own (`data/families/*.json`); queries and keys of llama files
get back the order of rows that checkpoints have, and norms of the Gemmas lose the 1 that GGUF's
converter adds. Files are written by the `safetensors` library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parent / "data"
FAMILIES = {path.stem: path for path in sorted((DATA / "families").glob("*.gguf"))}
SPACE = "\u2581"
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = {**GPT2, "use_regex": False}
SPACES_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From adjacent rotary pairs to halves, the inverse of the converter's `permute`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def checkpoint(path: Path, names: dict[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file in float32 as a checkpoint has them; `names`: theirs to GGUF's."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for name in [name for name in tensors if "_exps." in name]:
        for e, matrix in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps.", f".{e}.")] = matrix
    family = reader.fields["general.architecture"].contents()
    found = {}
    for theirs, ours in names.items():
        x = tensors.pop(ours)
        if family == "llama" and re.search(r"attn_[qk]\.", ours):
            key = "head_count" if "attn_q" in ours else "head_count_kv"
            x = unpermute(x, reader.fields[f"llama.attention.{key}"].contents())
        if "ffn_gate_inp_shexp" in ours:
            x = x[None]
        if family.startswith("gemma") and x.ndim == 1:
            x = x - np.float32(1)
        found[theirs] = np.ascontiguousarray(x)
    assert tensors.keys() <= {"rope_freqs.weight"}, tensors.keys()
    return found


def llama_names(n_layers: int, tied: bool) -> dict[str, str]:
    """Names of a llama of any depth, after those of a small one."""
    small = json.loads((DATA / "families" / "llama2.json").read_text())["names"]
    found = {k: v for k, v in small.items() if "layers" not in k and not (tied and "head" in k)}
    for theirs, ours in small.items():
        if ".layers.0." in theirs:
            for i in range(n_layers):
                found[theirs.replace(".0.", f".{i}.")] = ours.replace(".0.", f".{i}.")
    return found


def write_weights(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """One safetensors file, or several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_json(folder: Path, name: str, value: dict[str, Any]) -> None:
    """A JSON file of the directory."""
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def family_directory(
    folder: Path,
    name: str,
    *,
    dtype: str = "F16",
    shards: int = 1,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A directory of one of the small models of `data/families`, with its tokenizer.

    Matrices get the type; vectors stay float32, as a GGUF file has them. `change` edits the config.
    """
    golden = json.loads((DATA / "families" / f"{name}.json").read_text())
    config = golden["config"]
    if change is not None:
        change(config)
    tensors = {
        theirs: x.astype(DTYPES[dtype]) if x.ndim == 2 else x
        for theirs, x in checkpoint(FAMILIES[name], golden["names"]).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tensors, shards)
    write_json(folder, "config.json", config)
    write_tokenizer(folder, fields(FAMILIES[name]))
    return folder


def smollm2_directory(folder: Path, source: Path, dtype: str, shards: int) -> Path:
    """SmolLM2 in a type of whole numbers of bytes."""
    keys = fields(source)
    names = llama_names(keys["llama.block_count"], tied=True)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: x.astype(DTYPES[dtype]) for n, x in checkpoint(source, names).items()}
    write_weights(folder, tensors, shards)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": keys["llama.embedding_length"],
        "intermediate_size": keys["llama.feed_forward_length"],
        "num_hidden_layers": keys["llama.block_count"],
        "num_attention_heads": keys["llama.attention.head_count"],
        "num_key_value_heads": keys["llama.attention.head_count_kv"],
        "rms_norm_eps": keys["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": keys["llama.rope.freq_base"], "rope_scaling": None,
        "max_position_embeddings": keys["llama.context_length"],
        "tie_word_embeddings": True, "vocab_size": 49152,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    write_json(folder, "config.json", config)
    write_tokenizer(folder, keys)
    return folder


def fields(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# --- tokenizers -----------------------------------------------------------------------------------


def sentencepiece_rules(
    ids: dict[str, int], scores: list[float], skip: set[str]
) -> list[list[str]]:
    """transformers' `generate_merges`: every cut of every piece, best score first."""
    rules = []
    for text, token in ids.items():
        if text in skip:
            continue
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        cuts = [cut for cut in cuts if all(part in ids and part not in skip for part in cut)]
        cuts.sort(key=lambda cut: (ids[cut[0]], ids[cut[1]]))
        rules += [(scores[token], len(a), len(b), a, b) for a, b in cuts]
    rules.sort(key=lambda rule: rule[:3], reverse=True)
    return [[a, b] for *_, a, b in rules]


SPLIT_BY_PRE = {
    "llama-bpe": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    "qwen2": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
}


def tokenizer_json(keys: dict[str, Any], *, style: str = "legacy") -> dict[str, Any]:
    """tokenizer.json of a GGUF file's vocabulary.

    Args:
        style: of SentencePiece: "legacy" as Llama 2's has been, or Metaspace's prepend scheme.
    """
    tokens, types = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    kind, pre = keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]
    added = [
        {
            "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[i] != 4,
        }
        for i, text in enumerate(tokens) if types[i] in (2, 3, 4)
    ]  # fmt: skip
    ids = {text: i for i, text in enumerate(tokens)}
    root: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
    }  # fmt: skip
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": ids,
    }  # fmt: skip
    if kind == "gpt2":
        model["merges"] = [rule.split(" ") for rule in keys["tokenizer.ggml.merges"]]
        root["decoder"] = root["post_processor"] = GPT2
        if pre == "smollm":
            steps = [{"type": "Digits", "individual_digits": True}, GPT2]
        else:
            model["ignore_merges"] = pre == "llama-bpe"
            root["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
            split = {"type": "Split", "pattern": {"Regex": SPLIT_BY_PRE[pre]}}
            steps = [{**split, "behavior": "Isolated", "invert": False}, PLAIN]
        root["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    else:
        skip = {entry["content"] for entry in added} | {f"<0x{byte:02X}>" for byte in range(256)}
        unknown = tokens[keys["tokenizer.ggml.unknown_token_id"]]
        model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
        model["merges"] = sentencepiece_rules(ids, keys["tokenizer.ggml.scores"], skip)
        if not keys.get("tokenizer.ggml.add_space_prefix", True):
            root["normalizer"] = SPACES_REPLACED
            root["pre_tokenizer"] = {
                "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                "invert": False,
            }  # fmt: skip
        elif style == "legacy":
            prepend = {"type": "Prepend", "prepend": SPACE}
            root["normalizer"] = {"type": "Sequence", "normalizers": [prepend, SPACES_REPLACED]}
        else:
            root["pre_tokenizer"] = {
                "type": "Metaspace", "replacement": SPACE, "prepend_scheme": style, "split": False,
            }  # fmt: skip
    if keys.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = tokens[keys["tokenizer.ggml.bos_token_id"]]
        root["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, sequence("A")],
            "pair": [sequence("A"), sequence("B")],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        }  # fmt: skip
    return {**root, "model": model}


def sequence(name: str) -> dict[str, Any]:
    """The place of a text in a template."""
    return {"Sequence": {"id": name, "type_id": "AB".index(name)}}


def write_tokenizer(folder: Path, keys: dict[str, Any], **options: Any) -> None:
    """tokenizer.json and tokenizer_config.json of a GGUF file's vocabulary."""
    write_json(folder, "tokenizer.json", tokenizer_json(keys, **options))
    config: dict[str, Any] = {}
    for name in ("bos", "eos"):
        token = keys.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token"] = keys["tokenizer.ggml.tokens"][token]
    if "tokenizer.chat_template" in keys:
        config["chat_template"] = keys["tokenizer.chat_template"]
    write_json(folder, "tokenizer_config.json", config)
