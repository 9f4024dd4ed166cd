"""Write a GGUF model of a given shape with random weights, for measuring speed.

    python make_synthetic.py 7b-q4_0.gguf --layers 32 --width 4096 --ffn 11008 --heads 32 \
        --kv-heads 32 --vocab 49152 --type q4_0

Llama architecture, untied output head; with --experts a mixture whose routing is uniform:

    python make_synthetic.py 8x7b-q4_0.gguf --ffn 14336 --kv-heads 8 --experts 8

The vocabulary is synthetic: a byte-level BPE whose merges
build every token, so that any text can be tokenised. Rows are quantised as they are written: memory
stays under 300 MB whatever the size of the file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

CHUNK = 1 << 22  # weights quantised at a time
# Random fields within each block, and a scale: the K-quants have no quantiser in the gguf package,
# and a file of 39 GB would take it half an hour.
# Name: (offsets of F16 fields, and what each is multiplied by to give weights of about unit size).
RANDOM_BLOCKS = {
    "Q4_0": ((0,), (1 / 4.6,)),
    "Q2_K": ((80, 82), (1 / 14, 1.5 / 14)),
    "Q3_K": ((108,), (1 / 42,)),
    "Q4_K": ((0, 2), (1 / 258, 7.5 / 258)),
    "Q5_K": ((0, 2), (1 / 516, 7.5 / 258)),
    "Q6_K": ((208,), (1 / 1400,)),
    "IQ2_XXS": ((0,), (1 / 70,)),
    "IQ2_XS": ((0,), (1 / 70,)),
    "IQ2_S": ((0,), (1 / 70,)),
    "IQ3_XXS": ((0,), (1 / 160,)),
    "IQ3_S": ((0,), (1 / 170,)),
    "IQ1_S": ((0,), (1 / 8,)),
}
TYPES = {
    t.name.lower(): t
    for t in gguf.GGMLQuantizationType
    if t.name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *RANDOM_BLOCKS)
}


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges: 3 special tokens, 256 bytes, then pairs and triples."""
    specials, symbols = ["<unk>", "<s>", "</s>"], byte_symbols()
    if size < len(specials) + len(symbols):
        raise SystemExit(f"--vocab {size}: at least {len(specials) + len(symbols)} are needed")
    letters = [symbols[b] for b in b" etaoinshrdlcumwfgypbvk"] + [symbols[b] for b in b"ETAOINSH"]
    tokens, merges = [*specials, *symbols], []
    level = letters
    while len(tokens) < size:
        longer = []
        for left in level:
            for right in letters:
                if len(tokens) < size:
                    merges.append(f"{left} {right}")
                    longer.append(left + right)
                    tokens.append(left + right)
        level = longer
    return tokens, [3] * len(specials) + [1] * (size - len(specials)), merges


def blocks(rng: np.random.Generator, kind: gguf.GGMLQuantizationType, rows: int, cols: int,
           std: float) -> np.ndarray:  # fmt: skip
    """Some rows of random weights, in the bytes of their type."""
    if kind.name not in RANDOM_BLOCKS:
        weights = rng.standard_normal((rows, cols), np.float32)
        weights *= std
        return gguf.quantize(weights, kind).view(np.uint8)
    weights_in, bytes_in = gguf.GGML_QUANT_SIZES[kind]
    out = rng.integers(0, 256, (rows * cols // weights_in, bytes_in), np.uint8)
    for offset, scale in zip(*RANDOM_BLOCKS[kind.name], strict=True):
        value = np.full((len(out), 1), std * scale, np.float16)
        out[:, offset : offset + 2] = value.view(np.uint8)
    return out.reshape(rows, -1)


def matrix(rng: np.random.Generator, kind: gguf.GGMLQuantizationType, rows: int,
           cols: int) -> Iterator[np.ndarray]:  # fmt: skip
    """The bytes of one matrix in chunks of rows; unit inputs give outputs of about unit size."""
    step = max(1, CHUNK // cols)
    for at in range(0, rows, step):
        yield blocks(rng, kind, min(step, rows - at), cols, cols**-0.5)


def shapes(a: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes, in the order of the file."""
    head = a.head_size or a.width // a.heads
    q, kv = a.heads * head, a.kv_heads * head
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (a.vocab, a.width)}
    for i in range(a.layers):
        out |= {
            f"blk.{i}.attn_norm.weight": (a.width,),
            f"blk.{i}.attn_q.weight": (q, a.width),
            f"blk.{i}.attn_k.weight": (kv, a.width),
            f"blk.{i}.attn_v.weight": (kv, a.width),
            f"blk.{i}.attn_output.weight": (a.width, q),
            f"blk.{i}.ffn_norm.weight": (a.width,),
        }
        if a.experts:
            out |= {
                f"blk.{i}.ffn_gate_inp.weight": (a.experts, a.width),
                f"blk.{i}.ffn_gate_exps.weight": (a.experts, a.ffn, a.width),
                f"blk.{i}.ffn_up_exps.weight": (a.experts, a.ffn, a.width),
                f"blk.{i}.ffn_down_exps.weight": (a.experts, a.width, a.ffn),
            }
            continue
        out |= {
            f"blk.{i}.ffn_gate.weight": (a.ffn, a.width),
            f"blk.{i}.ffn_up.weight": (a.ffn, a.width),
            f"blk.{i}.ffn_down.weight": (a.width, a.ffn),
        }
    return out | {"output_norm.weight": (a.width,), "output.weight": (a.vocab, a.width)}


def add_metadata(writer: gguf.GGUFWriter, a: argparse.Namespace) -> None:
    """Write the keys of the model and of its vocabulary."""
    head = a.head_size or a.width // a.heads
    writer.add_name(f"synthetic {a.layers}x{a.width}")
    writer.add_context_length(a.context)
    writer.add_embedding_length(a.width)
    writer.add_block_count(a.layers)
    writer.add_feed_forward_length(a.ffn)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(a.vocab)
    if a.experts:
        writer.add_expert_count(a.experts)
        writer.add_expert_used_count(a.active)
    name = f"MOSTLY_{TYPES[a.type].name}"
    by_name = {"MOSTLY_F32": "ALL_F32"} | {f"MOSTLY_Q{k}_K": f"MOSTLY_Q{k}_K_S" for k in (3, 4, 5)}
    writer.add_file_type(gguf.LlamaFileType[by_name.get(name, name)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens, types, merges = vocabulary(a.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def write(a: argparse.Namespace) -> None:
    """Write the header, then stream the tensors behind it."""
    kind, f32 = TYPES[a.type], gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(None, "llama")
    add_metadata(writer, a)
    sizes = {}
    for name, shape in shapes(a).items():
        t = f32 if len(shape) == 1 or "_inp." in name else kind
        weights_in, bytes_in = gguf.GGML_QUANT_SIZES[t]
        if shape[-1] % weights_in:
            raise SystemExit(f"{name} {shape}: rows are no multiple of {t.name}'s {weights_in}")
        sizes[name] = int(np.prod(shape)) // weights_in * bytes_in
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=t)
    writer.write_header_to_file(Path(a.out))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(a.seed)
    with open(a.out, "ab") as file:
        pad = writer.data_alignment
        file.write(bytes(-file.tell() % pad))
        for name, shape in shapes(a).items():
            if "_inp." in name:  # routers choose all experts equally often
                # Random codes are not zero on average, which all hidden states come to share:
                # a router that sees it sends every token to the same experts.
                router = rng.standard_normal(shape, np.float32)
                file.write((router - router.mean(axis=1, keepdims=True)).data)
            elif len(shape) > 1:
                for chunk in matrix(rng, kind, int(np.prod(shape[:-1])), shape[-1]):
                    file.write(chunk.data)
            else:
                file.write(np.ones(shape, np.float32).data)
            file.write(bytes(-sizes[name] % pad))


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the GGUF file to write")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-size", type=int, help="width / heads if left out")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--type", choices=sorted(TYPES), default="q4_0")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture, in each layer")
    parser.add_argument("--active", type=int, default=2, help="experts of a token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
