"""Make and check the small random models in `families/`.

For each family: `<name>.gguf`, as llama.cpp's converter would write it (matrices F16, vectors
F32), `<name>.json` with transformers' config and names of tensors, and `<name>.npz` with `ids`,
`positions`, `logits` (float32, one row per position) and `continuation` (16 greedy ids). The
reference is transformers on the CPU in float32 with eager attention. Matrices are rounded to F16
before it runs, so the file holds them exactly.

    python make_goldens.py make     # needs torch, transformers, gguf, numpy
    python make_goldens.py check    # needs llama-cpp-python, numpy: compares with llama.cpp
    python make_goldens.py stories DIR    # stories260K.gguf from llama2.c's two files in DIR

Made with Python 3.11, torch 2.13.0+cpu, transformers 5.23.0, gguf 0.19.0, numpy 2.4.6; checked
with llama-cpp-python 0.3.36. `check` prints two differences from the reference: matrices and KV
cache expanded to F32, and the file as it is (llama.cpp rounds activations and KV to F16).
Gemma's stay up to 4e-3 apart in F32 (5e-6 with `ffn_down` zeroed): llama.cpp looks gelu up in a
table of F16 values.
llama.cpp ignores `llama.attention.sliding_window`, so for mistral `check` compares with
`unwindowed`, the same reference without the window.
"""

import argparse
import ctypes
import json
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "families"
PROMPT_TOK, NEW_TOK, CONTEXT_TOK = 56, 16, 256
MIN_MARGIN = 0.05  # between the two best logits of every greedy step
ROUTER_MARGIN = 0.02  # between the last expert that a token takes and the first that it does not


@dataclass(frozen=True)
class Family:
    """How to build one golden: the transformers model type, its config, and GGUF's names for it."""

    model_type: str
    arch: str
    tokenizer: str  # "spm", "gemma" or a `tokenizer.ggml.pre` of a byte-level BPE
    config: dict[str, Any] = field(default_factory=dict)
    permute: bool = False  # q and k rows reordered for interleaved rope pairs


def base(**changes: Any) -> dict[str, Any]:
    """The config shared by all families, with changes."""
    return {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT_TOK, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | changes  # fmt: skip


def gemma3(**changes: Any) -> dict[str, Any]:
    """Five layers with the window, one without, one with."""
    return base(
        intermediate_size=32, num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1,
        head_dim=48, query_pre_attn_scalar=48, sliding_window=16, rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ) | changes  # fmt: skip


PARTS = ("gate_proj", "up_proj", "down_proj")
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {
    "llama2": Family("llama", "llama", "spm", base(), permute=True),
    "llama3": Family(
        "llama", "llama", "llama-bpe",
        base(rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }),
        permute=True,
    ),
    "llama_linear": Family(
        "llama", "llama", "llama-bpe",
        base(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        permute=True,
    ),
    "mistral": Family("mistral", "llama", "spm", base(sliding_window=16), permute=True),
    "qwen2": Family("qwen2", "qwen2", "qwen2", base(tie_word_embeddings=True)),
    "qwen3": Family("qwen3", "qwen3", "qwen2", base(head_dim=32, rms_norm_eps=1e-6)),
    "gemma3": Family(
        "gemma3_text", "gemma3", "gemma",
        gemma3(rope_parameters={
            "sliding_attention": LOCAL,
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        }),
    ),
    "gemma3_scaled": Family(
        "gemma3_text", "gemma3", "gemma",
        gemma3(num_hidden_layers=6, final_logit_softcapping=8.0, rope_parameters={
            "sliding_attention": LOCAL | {"rope_theta": 5000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }),
    ),
    "mixtral": Family(
        "mixtral", "llama", "spm",
        base(intermediate_size=32, num_local_experts=8, num_experts_per_tok=2), permute=True,
    ),
    "olmoe": Family(
        "olmoe", "olmoe", "qwen2",
        base(intermediate_size=32, num_experts=8, num_experts_per_tok=3),
    ),
    "qwen2moe": Family(
        "qwen2_moe", "qwen2moe", "qwen2",
        base(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
             shared_expert_intermediate_size=64, qkv_bias=True),
    ),
    "qwen3moe": Family(
        "qwen3_moe", "qwen3moe", "qwen2",
        base(head_dim=32, num_hidden_layers=1, num_experts=20, num_experts_per_tok=4,
             moe_intermediate_size=32, norm_topk_prob=True),
    ),
    "gemma2": Family(
        "gemma2", "gemma2", "gemma",
        gemma3(num_hidden_layers=3, attn_logit_softcapping=3.0, final_logit_softcapping=8.0),
    ),
}  # fmt: skip


# -- vocabularies ------------------------------------------------------------------------------

PAIRS = [
    "t h", "h e", "i n", "e r", "a n", "o n", "a t", "e n", "th e", "o r", "r e", "an d", "in g",
    "o u", "i s", "e d", "a l",
]  # fmt: skip


def bpe_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of a byte-level BPE over printable ASCII."""
    chars = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    merges = [*PAIRS, *(f"Ġ {c}" for c in "taisowbchdf")]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *chars, *(m.replace(" ", "") for m in merges)]
    return tokens, [3] * 4 + [1] * (len(tokens) - 4), merges


def spm_vocabulary(specials: list[str]) -> tuple[list[str], list[int], list[float]]:
    """Tokens, token types and scores of a SentencePiece vocabulary with byte fallback."""
    pieces = ["▁", *"etaoinshrd", *(m.replace(" ", "") for m in PAIRS)]
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    tokens += [f"<extra{i}>" for i in range(-len(tokens) % 32)]
    types = [2 if t == "<unk>" else 3 for t in specials] + [6] * 256 + [1] * len(pieces)
    types += [3] * (len(tokens) - len(types))
    scores = [0.0] * (len(specials) + 256) + [-float(i) for i in range(len(pieces))]
    return tokens, types, scores + [0.0] * (len(tokens) - len(scores))


def vocabulary_size(family: Family) -> int:
    """How many tokens the family's vocabulary has."""
    if family.tokenizer in ("spm", "gemma"):
        return len(spm_vocabulary(["<unk>", "<s>", "</s>"])[0])
    return len(bpe_vocabulary()[0])


def add_vocabulary(writer: Any, family: Family) -> None:
    """Write the tokenizer's keys."""
    if family.tokenizer in ("spm", "gemma"):
        gemma = family.tokenizer == "gemma"
        specials = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
        tokens, types, scores = spm_vocabulary(specials)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_add_space_prefix(not gemma)
        bos, eos, unk = (2, 1, 3) if gemma else (1, 2, 0)
    else:
        tokens, types, merges = bpe_vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(family.tokenizer)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        bos, eos, unk = 1, 2, 0
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(unk)
    writer.add_add_bos_token(family.tokenizer != "qwen2")


# -- reference ---------------------------------------------------------------------------------


def make_model(family: Family, seed: int, **changes: Any) -> Any:
    """A transformers model with random weights, matrices rounded to F16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = vocabulary_size(family)
    config = AutoConfig.for_model(
        family.model_type, vocab_size=size, attn_implementation="eager",
        **(family.config | changes),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=rng)
            if name.endswith("norm.weight"):
                mean = 0 if "gemma" in family.model_type else 1
                if "gemma" in family.model_type and "post" in name:
                    mean = 2  # lets the layers, not the embedding, choose the next token
                p.copy_(noise * 0.2 + mean)
            elif name.endswith("bias"):
                p.copy_(noise * 0.5)
            elif "embed_tokens" in name:  # tied: also the head, so kept small enough for both
                std = 2 / p.shape[1] ** 0.5 if config.tie_word_embeddings else 1.0
                p.copy_((noise * std).half().float())
            else:
                gain = 2.5 if "lm_head" in name else 1.5
                p.copy_((noise * gain / p.shape[-1] ** 0.5).half().float())
    return model


def run(model: Any, ids: list[int]) -> np.ndarray:
    """Logits of all positions."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def router_margin(model: Any, ids: list[int]) -> float:
    """How close a token comes to taking another expert: rounding must not decide that."""
    import torch

    active, least = getattr(model.config, "num_experts_per_tok", 0), [np.inf]

    def look(gate: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits = inputs[0].reshape(-1, inputs[0].shape[-1]) @ gate.weight.T
        high = torch.sort(logits, descending=True).values
        least[0] = min(least[0], float((high[:, active - 1] - high[:, active]).min()))

    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(look) for gate in gates]
    run(model, ids)
    for hook in hooks:
        hook.remove()
    return least[0]


def greedy(model: Any, ids: list[int]) -> tuple[list[int], float]:
    """The greedy continuation, and the least margin between the two best logits on the way."""
    ids, margin = list(ids), np.inf
    for _ in range(NEW_TOK):
        last = run(model, ids)[-1]
        second, first = np.sort(last)[-2:]
        margin = min(margin, float(first - second))
        ids.append(int(last.argmax()))
    return ids[-NEW_TOK:], margin


# -- GGUF --------------------------------------------------------------------------------------


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From halves (x[i], x[i + d/2]) to adjacent pairs, per head: the converter's `permute`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: Any) -> np.ndarray:
    """The divisor of each rope frequency that the converter stores as `rope_freqs.weight`."""
    rope = config.rope_parameters
    dim = config.hidden_size // config.num_attention_heads
    freqs = rope["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = old * freqs / (2 * np.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def add_metadata(writer: Any, family: Family, config: Any) -> None:
    """Write the model's keys, as llama.cpp's converter does for this architecture."""
    import gguf

    writer.add_name(f"headrace golden {family.arch}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if "num_experts_per_tok" in family.config:
        c = family.config
        writer.add_expert_used_count(c["num_experts_per_tok"])
        writer.add_expert_count(c.get("num_experts") or c["num_local_experts"])
        if "moe_intermediate_size" in c:
            writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in c:
            writer.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    if "head_dim" in family.config:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family.arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if family.arch != "gemma2":  # whose converter relies on the default base of 10000
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    local = config.rope_parameters.get("sliding_attention", LOCAL)
    if local != LOCAL:  # older converters never write it: the default is 10000
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if "sliding_window" in family.config:
        writer.add_sliding_window(config.sliding_window)
    if "attn_logit_softcapping" in family.config:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if "final_logit_softcapping" in family.config:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def stored(family: Family, model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as in a checkpoint, where every expert has matrices of its own.

    A tied head is not among them.
    """
    parts = ("w1", "w3", "w2") if family.model_type == "mixtral" else PARTS
    block = "block_sparse_moe" if family.model_type == "mixtral" else "mlp"
    for name, parameter in model.named_parameters():
        x = parameter.detach().numpy()
        stem = name.rpartition(".")[0].replace(".mlp.", f".{block}.")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(x):
                for part, matrix in zip(parts, np.split(both, 2), strict=False):
                    yield f"{stem}.{e}.{part}.weight", matrix
        elif name.endswith("experts.down_proj"):
            for e, matrix in enumerate(x):
                yield f"{stem}.{e}.{parts[2]}.weight", matrix
        else:
            yield name.replace("mlp.gate.", f"{block}.gate."), x


def gguf_name(names: Any, name: str) -> str:
    """GGUF's name of a tensor of a checkpoint; an expert's is that of old GGUF files."""
    found = re.fullmatch(r"model\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
    if found:
        part = {"w1": "gate", "w3": "up", "w2": "down"}.get(found[3], found[3][: -len("_proj")])
        return f"blk.{found[1]}.ffn_{part}.{found[2]}.weight"
    return str(names.get_name(name, try_suffixes=(".weight", ".bias")))


def write_gguf(path: Path, family: Family, model: Any) -> None:
    """Write the model under llama.cpp's tensor names."""
    import gguf

    config = model.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    add_metadata(writer, family, config)
    add_vocabulary(writer, family)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    experts: dict[str, list[np.ndarray]] = {}
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, x in stored(family, model):
        if family.permute and ("q_proj" in name or "k_proj" in name):
            q = "q_proj" in name
            x = permute(x, config.num_attention_heads if q else config.num_key_value_heads)
        if "gemma" in family.arch and name.endswith("norm.weight"):
            x = x + np.float32(1)  # the reference multiplies by 1 + w
        out = gguf_name(names, name)
        if "gate_inp" in out:  # routers are float32, and a shared expert's is a vector
            writer.add_tensor(out, np.ascontiguousarray(x[0] if len(x) == 1 else x))
        elif re.search(r"\.\d+\.weight$", out):
            experts.setdefault(re.sub(r"(ffn_\w+)\.\d+\.", r"\1_exps.", out), []).append(x)
        else:
            writer.add_tensor(out, np.ascontiguousarray(x if x.ndim == 1 else x.astype(np.float16)))
    for name, matrices in experts.items():
        writer.add_tensor(name, np.stack(matrices).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(path: Path, family: Family, model: Any) -> None:
    """Write what config.json has, and GGUF's name of each tensor by that of a checkpoint."""
    import gguf

    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {name: gguf_name(names, name) for name, _ in stored(family, model)}
    config = json.loads(model.config.to_json_string())
    path.write_text(json.dumps({"config": config, "names": found}, indent=1) + "\n")


def make(name: str) -> None:
    """Write one golden, from the first seed whose greedy continuation has clear margins."""
    family = FAMILIES[name]
    for seed in range(1000):
        model = make_model(family, seed)
        size = model.config.vocab_size
        ids = np.random.default_rng(seed).integers(4, size, PROMPT_TOK).tolist()
        if router_margin(model, ids) < ROUTER_MARGIN:
            continue
        continuation, margin = greedy(model, ids)
        routed = router_margin(model, ids + continuation)
        clear = margin > MIN_MARGIN and routed > ROUTER_MARGIN
        if clear and len(set(continuation)) > NEW_TOK // 2:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear margins")
    positions = np.union1d(np.arange(0, PROMPT_TOK, 4), np.arange(PROMPT_TOK - 8, PROMPT_TOK))
    arrays = {"logits": run(model, ids)[positions]}
    if name == "mistral":
        plain = make_model(family, seed, sliding_window=None)
        arrays["unwindowed"] = run(plain, ids)[positions]
        assert np.abs(arrays["unwindowed"] - arrays["logits"]).max() > 0.1
    write_gguf(HERE / f"{name}.gguf", family, model)
    write_config(HERE / f"{name}.json", family, model)
    np.savez(
        HERE / f"{name}.npz",
        ids=np.int32(ids), positions=positions.astype(np.int32),
        continuation=np.int32(continuation), **arrays,
    )  # fmt: skip
    print(f"{name}: seed {seed}, margin {margin:.3f}, logits' std {arrays['logits'].std():.2f}")


# -- stories260K -------------------------------------------------------------------------------


def stories(source: Path) -> None:
    """Write stories260K.gguf from llama2.c's v0 checkpoint and tokenizer."""
    import gguf

    data = np.fromfile(source / "stories260K.bin", np.float32)
    width, ffn, layers, heads, kv_heads, n_vocab, context = data[:7].view(np.int32).tolist()
    kv, at = width // heads * kv_heads, 7
    order = [  # a positive vocabulary size in the header: the head is tied
        ("token_embd", 0, (n_vocab, width)), ("attn_norm", layers, (width,)),
        ("attn_q", layers, (width, width)), ("attn_k", layers, (kv, width)),
        ("attn_v", layers, (kv, width)), ("attn_output", layers, (width, width)),
        ("ffn_norm", layers, (width,)), ("ffn_gate", layers, (ffn, width)),
        ("ffn_down", layers, (width, ffn)), ("ffn_up", layers, (ffn, width)),
        ("output_norm", 0, (width,)),
    ]  # fmt: skip
    writer = gguf.GGUFWriter(HERE.parent / "stories260K.gguf", "llama")
    for name, n, shape in order:
        for i in range(max(n, 1)):
            size = int(np.prod(shape))
            full = f"blk.{i}.{name}.weight" if n else f"{name}.weight"
            writer.add_tensor(full, data[at : at + size].reshape(shape))
            at += size
    assert len(data) - at == context * (width // heads)  # rope tables, which nobody needs
    writer.add_name("stories260K")
    writer.add_license("mit")
    writer.add_source_url("https://huggingface.co/karpathy/tinyllamas")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_llama2c_vocabulary(writer, (source / "tok512.bin").read_bytes(), n_vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_llama2c_vocabulary(writer: Any, data: bytes, n_vocab: int) -> None:
    """Write llama2.c's tokenizer: score, length and bytes of each token, spaces spelled out."""
    tokens, scores, at = [], [], 4
    for _ in range(n_vocab):
        score, size = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + size].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    tokens[:3] = ["<unk>", "<s>", "</s>"]  # which llama2.c surrounds with line feeds
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (n_vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


# -- check against llama.cpp -------------------------------------------------------------------


def llama_cpp_logits(path: Path, ids: list[int], kv_f32: bool) -> np.ndarray:
    """llama.cpp's logits of all positions."""
    import llama_cpp as lc

    model = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
    assert model, path
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = CONTEXT_TOK, 1, 1
    if kv_f32:
        params.type_k = params.type_v = lc.GGML_TYPE_F32
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
    ctx = lc.llama_init_from_model(model, params)
    size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    batch = lc.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert lc.llama_decode(ctx, batch) == 0
    logits = np.ctypeslib.as_array(lc.llama_get_logits(ctx), (len(ids) * size,))
    logits = logits.reshape(len(ids), size).copy()
    lc.llama_free(ctx)
    lc.llama_model_free(model)
    return logits


def check(name: str) -> None:
    """Print the largest differences between llama.cpp and the reference."""
    import llama_cpp as lc

    path, golden = HERE / f"{name}.gguf", np.load(HERE / f"{name}.npz")
    prompt = golden["ids"].tolist()
    ids = prompt + golden["continuation"].tolist()
    want = golden["unwindowed" if name == "mistral" else "logits"]
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "f32.gguf"
        params = lc.llama_model_quantize_default_params()
        params.ftype, params.nthread = lc.LLAMA_FTYPE_ALL_F32, 1
        source, target = str(path).encode(), str(wide).encode()
        assert lc.llama_model_quantize(source, target, ctypes.byref(params)) == 0
        exact = llama_cpp_logits(wide, ids, kv_f32=True)
    plain = llama_cpp_logits(path, ids, kv_f32=False)
    at = golden["positions"]
    same = int((exact[len(prompt) - 1 : -1].argmax(1) == golden["continuation"]).sum())
    agree = f"greedy {same}/{NEW_TOK}" if name != "mistral" else "(without the window)"
    print(
        f"{name:14} {path.stat().st_size:7} B  F32 {np.abs(exact[at] - want).max():.1e}"
        f"  as is {np.abs(plain[at] - want).max():.1e}  range {np.ptp(want):.1f}"
        f"  {agree}"
    )


def main() -> None:
    """Make or check the goldens named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["make", "check", "stories"])
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="name")
    args = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    if args.action == "stories":
        stories(Path(args.names[0]))
        return
    if args.action == "check":
        import llama_cpp as lc

        quiet = lc.llama_log_callback(lambda level, text, data: None)
        lc.llama_log_set(quiet, ctypes.c_void_p(0))
        lc.llama_backend_init()
    for name in args.names:
        make(name) if args.action == "make" else check(name)


if __name__ == "__main__":
    main()
