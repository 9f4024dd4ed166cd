"""Decode of a ReLU model beside the same one in clusters of neurons, under the same budgets.

    python examples/benchmarks/neuron_clusters.py FOLDER --share 0.4 0.6 0.8

Writes a random llama gated by ReLU into FOLDER, if it is not there, in which a tenth of the neurons
fires for a token: a neuron's chance is 0.6 exp(-6 u), u being its rank of all, so that a quarter of
them have four fifths of what fires, as in real models (PowerInfer, 2312.12456). Which do is
independent from neuron to neuron and from token to token: the worst case for clusters and for the
cache. Then both are compressed to --format, and answer the same tokens in turn.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from make_synthetic import add_metadata, vocabulary

import headrace
from headrace.compress import compress
from headrace.planning import bounds, prepare

CONTEXT, WARM = 512, 32
CONSTANT = 4.0  # the first channel of all hidden states, which holds gates down


def chances(neurons: int) -> np.ndarray:
    """How often each neuron is to fire."""
    return 0.6 * np.exp(-6 * (np.arange(neurons) + 0.5) / neurons)


def thresholds(shares: np.ndarray) -> np.ndarray:
    """What a number of the normal distribution is above with these chances."""
    sample = np.sort(np.random.default_rng(0).standard_normal(1 << 20))
    return np.quantile(sample, 1 - shares)


def write_dense(to: Path, a: argparse.Namespace) -> None:
    """Write the source, in float16."""
    rng, width = np.random.default_rng(0), a.width
    writer = gguf.GGUFWriter(to, "llama")
    add_metadata(writer, a)
    writer.add_string("llama.feed_forward_activation", "relu")

    def matrix(name: str, values: np.ndarray) -> None:
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def vector(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    def random(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        values = rng.standard_normal((rows, columns), np.float32)
        values *= scale * columns**-0.5
        return values

    def quiet(rows: int, columns: int) -> np.ndarray:
        values = random(rows, columns, 0.3)  # what tokens are stays what most inputs are
        values[0] = 0
        return values

    embedding = random(a.vocab, width, width**0.5)
    embedding[:, 0] = CONSTANT
    matrix("token_embd", embedding)
    usual = CONSTANT / (1 + CONSTANT**2 / width) ** 0.5  # of the first channel behind a norm
    for i in range(a.layers):
        block = f"blk.{i}"
        for name in ("attn_norm", "ffn_norm"):
            vector(f"{block}.{name}")
        for name, rows in (("q", width), ("k", width), ("v", width)):
            matrix(f"{block}.attn_{name}", random(rows, width))
        matrix(f"{block}.attn_output", quiet(width, width))
        gate = random(a.ffn, width)
        gate[:, 0] = -rng.permutation(thresholds(chances(a.ffn))) / usual
        matrix(f"{block}.ffn_gate", gate)
        matrix(f"{block}.ffn_up", random(a.ffn, width))
        matrix(f"{block}.ffn_down", quiet(width, a.ffn))
    vector("output_norm")
    matrix("output", random(a.vocab, width))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text(size: int, tokens: int) -> str:
    """A text of about so many tokens of the vocabulary, all equally likely."""
    words = [word.replace("Ġ", " ") for word in vocabulary(size)[0][300:]]
    return "".join(words[i] for i in np.random.default_rng(1).integers(0, len(words), tokens))


@dataclass(frozen=True)
class Found:
    """What decoding took for a token; bytes were read from the file."""

    seconds: float
    stall_s: float
    n_bytes: float
    hit_rate: float | None


def measure(path: Path, memory: int, tokens: int, vocab: int) -> Found:
    """Decode tokens that come one by one, none of which has to do with those before."""
    ids = np.random.default_rng(2).integers(300, vocab, WARM + tokens).tolist()
    with headrace.load(path, context=CONTEXT, memory=memory, threads=2) as model:
        model.read_tokens(ids[:1], 0)
        for i in range(1, WARM):
            model.read_tokens([ids[i]], i)
        stalled, before, began = model.stall_s, model.expert_counts, time.perf_counter()
        for i in range(WARM, WARM + tokens):
            model.read_tokens([ids[i]], i)
        seconds, stalled = time.perf_counter() - began, model.stall_s - stalled
        residency, n_bytes, hits = model.residency, 0.0, None
        if residency is not None:
            n_bytes += residency.streamed_bytes
        if before is not None and model.expert_counts is not None:
            counts = model.expert_counts.since(before)
            n_bytes += counts.read_bytes / tokens
            hits = counts.hit_rate
    return Found(seconds / tokens, stalled / tokens, n_bytes, hits)


def main() -> None:
    """Parse the command line, make the files, measure in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=6144)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--clusters", type=int, default=96, help="of a layer")
    parser.add_argument("--calibrate-tokens", type=int, default=4096)
    parser.add_argument("--format", default="i4_g32")
    parser.add_argument("--share", type=float, nargs="+", default=[0.4, 0.6, 0.8],
                        help="of the weights that the dense model keeps")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="take the best of so many")
    a = parser.parse_args()
    a.heads = a.kv_heads = a.width // 64
    a.head_size, a.context, a.experts, a.type = 64, 2048, 0, "f16"
    a.folder.mkdir(exist_ok=True)
    source, cut = a.folder / "dense-f16.gguf", a.folder / "clusters-f16.gguf"
    dense, clusters = (a.folder / f"{name}-{a.format}.gguf" for name in ("dense", "clusters"))
    if not source.exists():
        write_dense(source, a)
    if not cut.exists():
        compress(source, cut, neuron_clusters=a.clusters, calibrate_tokens=a.calibrate_tokens,
                 calibrate=text(a.vocab, 2 * a.calibrate_tokens), notice=print)  # fmt: skip
    for before, after in ((source, dense), (cut, clusters)):
        if not after.exists():
            compress(before, after, format=a.format, ends=a.format)
    least, most = bounds(dense, context=CONTEXT)
    fired = prepare(clusters, context=CONTEXT, threads=2, target=None).fired
    assert fired is not None
    weights = prepare(dense, context=CONTEXT, threads=2, target=None).read_bytes
    print(
        f"{weights / 1e6:.0f} MB of weights, {fired.neurons:.1%} of the neurons and "
        f"{np.mean([one.mean() for one in fired.clusters]):.1%} of the clusters fire"
    )
    print(f"{'budget':>8} {'weights':>9} {'read':>19} {'hits':>7} {'ms/token':>18} {'stalled':>15}")
    for share in a.share:
        memory = int(most - (1 - share) * weights)
        if memory < least:
            raise SystemExit(f"--share {share} is below the least that works")
        best: dict[Path, Found] = {}
        for _ in range(a.rounds):
            for path in (dense, clusters):
                found = measure(path, memory, a.tokens, a.vocab)
                if path not in best or found.seconds < best[path].seconds:
                    best[path] = found
        d, c = best[dense], best[clusters]
        hits = "" if c.hit_rate is None else f"{c.hit_rate:.1%}"
        n_bytes = f"{d.n_bytes / 1e6:6.1f} to {c.n_bytes / 1e6:5.1f} MB"
        seconds = f"{1e3 * d.seconds:6.2f} to {1e3 * c.seconds:6.2f}"
        stalls = f"{1e3 * d.stall_s:6.2f} to {1e3 * c.stall_s:6.2f}"
        print(f"{memory / 1e6:5.0f} MB {share:8.0%} {n_bytes:>19} {hits:>7} {seconds} {stalls}")


if __name__ == "__main__":
    main()
