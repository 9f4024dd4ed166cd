"""An independent forward pass of llama models in plain numpy, to compare the runtime with.

Written from the definition of the architecture: it imports nothing of headrace, and reads the GGUF
file with the gguf package. The whole sequence is computed again for every token; there is no cache.
It covers what `llama` files may carry: grouped heads, tied heads, rope factors, linear rope
scaling, sliding window.

`tests/data/stories260K.gguf` is Andrej Karpathy's stories260K (TinyStories, MIT licence), from
`stories260K/stories260K.bin` and `tok512.bin` of huggingface.co/karpathy/tinyllamas in the v0
format of llama2.c, made by `tests/data/make_goldens.py stories`; all weights F32, no value changed.
llama2.c rotates adjacent pairs, as GGUF's llama does, so q and k are not permuted.

    python tests/reference_llama.py tests/data/stories260K.gguf    # prints a story
"""

import sys
from pathlib import Path

import gguf
import numpy as np


class ReferenceLlama:
    """A llama model in memory, all weights expanded to `dtype`."""

    architecture = "llama"  # of models that differ in their feed-forward, another one

    def __init__(self, path: str | Path, dtype: type = np.float64) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: f.contents() for name, f in reader.fields.items()}
        if self.fields["general.architecture"] != self.architecture:
            raise ValueError(f"{path}: {self.fields['general.architecture']}")
        self.weights = {
            t.name: gguf.dequantize(t.data, t.tensor_type).astype(dtype) for t in reader.tensors
        }
        self.n_layer = self.key("block_count")
        self.n_head = self.key("attention.head_count")
        self.n_kv = self.key("attention.head_count_kv", self.n_head)
        self.eps = self.key("attention.layer_norm_rms_epsilon")
        self.d_head = self.weights["blk.0.attn_q.weight"].shape[0] // self.n_head

    def key(self, name: str, default=None):
        """The value of the metadata key `<architecture>.<name>`."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def rope(self, x: np.ndarray) -> np.ndarray:
        """Rotate adjacent pairs by their position. x: (n_tok, heads, d_head)."""
        base = self.key("rope.freq_base", 10000.0)
        freq = base ** -(np.arange(0, self.d_head, 2) / self.d_head)  # (d_head / 2)
        if self.key("rope.scaling.type") == "linear":
            freq = freq / self.key("rope.scaling.factor")
        if "rope_freqs.weight" in self.weights:
            freq = freq / self.weights["rope_freqs.weight"]
        angle = np.outer(np.arange(len(x)), freq)[:, None]  # (n_tok, 1, d_head / 2)
        cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMS norm over the last axis, times the weight `name`."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[name]

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        """Causal attention of one layer. x: (n_tok, width), normalised."""
        n_tok, w = len(x), self.weights
        q = self.rope((x @ w[layer + "attn_q.weight"].T).reshape(n_tok, self.n_head, -1))
        k = self.rope((x @ w[layer + "attn_k.weight"].T).reshape(n_tok, self.n_kv, -1))
        v = (x @ w[layer + "attn_v.weight"].T).reshape(n_tok, self.n_kv, -1)
        k, v = (np.repeat(t, self.n_head // self.n_kv, axis=1) for t in (k, v))
        q, k, v = (t.transpose(1, 0, 2) for t in (q, k, v))  # (n_head, n_tok, d_head)
        score = q @ k.transpose(0, 2, 1) / np.sqrt(x.dtype.type(self.d_head))
        back = np.subtract.outer(np.arange(n_tok), np.arange(n_tok))  # how far behind the query
        hidden = back < 0
        if window := self.key("attention.sliding_window"):
            hidden |= back >= window  # the window counts the query's own position
        score = np.where(hidden, -np.inf, score)
        p = np.exp(score - score.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = (p @ v).transpose(1, 0, 2).reshape(n_tok, -1)  # (n_tok, n_head * d_head)
        return out @ w[layer + "attn_output.weight"].T

    def feed_forward(self, h: np.ndarray, layer: str) -> np.ndarray:
        """What a layer's feed-forward adds. h: (n_tok, width), normalised."""
        w = self.weights
        gate = h @ w[layer + "ffn_gate.weight"].T
        up = h @ w[layer + "ffn_up.weight"].T
        relu = self.key("feed_forward_activation") == "relu"
        gate = np.maximum(gate, 0) if relu else gate / (1 + np.exp(-gate))
        return (gate * up) @ w[layer + "ffn_down.weight"].T

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits of every position: (n_tok, n_vocab)."""
        w = self.weights
        x = w["token_embd.weight"][np.asarray(ids)]  # (n_tok, width)
        for i in range(self.n_layer):
            layer = f"blk.{i}."
            x = x + self.attention(self.norm(x, layer + "attn_norm.weight"), layer)
            h = self.norm(x, layer + "ffn_norm.weight")
            x = x + self.feed_forward(h, layer)
        head = w.get("output.weight", w["token_embd.weight"])
        return self.norm(x, "output_norm.weight") @ head.T

    def greedy(self, ids: list[int], n_new: int) -> list[int]:
        """The `n_new` most likely tokens after `ids`, one at a time; end tokens do not stop it."""
        out = list(ids)
        for _ in range(n_new):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(ids) :]

    def first_departure(self, ids: list[int], n_prompt: int) -> int | None:
        """Where `ids` first differs from this model's greedy continuation of its first `n_prompt`.

        One pass over `ids` answers what `greedy` needs a pass per token for. None: nowhere.
        """
        best = self.logits(ids[:-1])[n_prompt - 1 :].argmax(-1)
        wrong = np.flatnonzero(best != np.asarray(ids[n_prompt:]))
        return n_prompt + int(wrong[0]) if len(wrong) else None

    def text(self, ids: list[int]) -> str:
        """SentencePiece tokens as text."""
        tokens, types = (self.fields[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
        pieces = [
            bytes([int(tokens[i][3:5], 16)]) if types[i] == 6 else tokens[i].encode() for i in ids
        ]
        return b"".join(pieces).decode(errors="replace").replace("▁", " ")


if __name__ == "__main__":
    model = ReferenceLlama(sys.argv[1])
    print(model.text(model.greedy([model.fields["tokenizer.ggml.bos_token_id"]], 200)))
