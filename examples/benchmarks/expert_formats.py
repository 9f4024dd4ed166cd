"""What each format costs the experts of a mixture, where they are used: a table for Markdown.

python examples/benchmarks/expert_formats.py moe.gguf text.txt --layers 4 16 26 --every 4

The share of the output of experts (in squares, on tokens that chose them, and were not fitted to)
that is lost when gate and up are rounded, or down. For what `headrace compress --to-moe` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from headrace.calibration import LayerInputs
from headrace.calibration_pass import Read, units_of
from headrace.families import describe
from headrace.kernels.experts import ONE_EACH, choose
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import open_model
from headrace.rows import float_matrix
from headrace.sparse.format import Floats
from headrace.sparse.gptq import gptq, inverse_factor
from headrace.sparse.registry import FORMATS
from headrace.team import default_threads

_NAMES = ("q4_1", "i4a_g32", "i4_g32", "iq4_nl", "i4a_g64", "i4_g64", "i3_g64", "i2_g64")
_FITTED = 0.75  # of the tokens; the others say what is lost
_READ = 2  # the place in `Unit.readers` of the gate and up that all tokens take


def inner(gate: Floats, up: Floats, x: Floats) -> Floats:
    """What down reads: float32 [tokens, neurons]."""
    a = x @ gate.T
    found: Floats = a / (1 + np.exp(-a)) * (x @ up.T)
    return found


def rounded(name: str, w: Floats, h: Floats, method: str) -> Floats:
    """The weights as a format and a method leave them; `h`: X^T X of the inputs."""
    fmt = FORMATS[name]
    assert fmt.grid is not None
    seen = np.maximum(np.diag(h), 0)
    scales = fmt.grid.fit(w, seen / max(float(seen.max()), np.finfo(np.float32).tiny))
    raw = fmt.grid.round(w, scales)
    if method == "gptq":
        raw = gptq(w, fmt.grid, inverse_factor(h), scales)
    return fmt.decode(raw)


def main() -> None:
    """Parse the command line, run the text, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 26])
    parser.add_argument("--every", type=int, default=4, help="of so many experts, the first")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--formats", nargs="+", default=_NAMES)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    model = open_model(options.model)
    decoder = describe(model)
    mixtures, units = decoder.mixtures(), units_of(decoder)
    lost: dict[tuple[str, str, str], list[float]] = {}
    inputs = LayerInputs(
        model, decoder, options.text.read_text(), options.tokens, options.threads, None,
        watched=True,
    )  # fmt: skip
    with inputs, TensorReader() as reader:
        for layer in sorted(options.layers):
            windows: dict[int, Floats] = {}

            def see(window: int, place: int, read: Read, to: dict[int, Floats] = windows) -> None:
                if place == _READ:
                    to[window] = read().T.copy()

            at = next(i for i, u in enumerate(units) if u.index == layer and u.expert is None)
            inputs.watch(at, 0, see)
            x, mixture = np.concatenate([windows[i] for i in sorted(windows)]), mixtures[layer]
            router, bias = float_matrix(model, reader, mixture.router)
            chosen, _ = choose(x @ router.T + bias, mixture.active, ONE_EACH)
            fitted = int(_FITTED * len(x))
            for e, one in list(enumerate(mixture.each))[:: options.every]:
                weights = [float_matrix(model, reader, m)[0] for m in (one.gate, one.up, one.down)]
                gate, up, down = (np.ascontiguousarray(w) for w in weights)
                taken = np.nonzero((chosen == e).any(axis=1))[0]
                seen, kept = x[taken[taken < fitted]], x[taken[taken >= fitted]]
                z, z_kept = inner(gate, up, seen), inner(gate, up, kept)
                h, h_z, whole = seen.T @ seen, z.T @ z, z_kept @ down.T
                for name in options.formats:
                    for method in ("search", "gptq"):
                        gate_, up_ = (rounded(name, w, h, method) for w in (gate, up))
                        down_ = rounded(name, down, h_z, method)
                        for part, out in (
                            ("gate and up", inner(gate_, up_, kept) @ down.T),
                            ("down", z_kept @ down_.T),
                        ):
                            share = np.square(out - whole).sum() / np.square(whole).sum()
                            lost.setdefault((name, part, method), []).append(float(share))
    print("| format | bits | gate and up: `search` | `gptq` | down: `search` | `gptq` |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.formats:
        shares = [
            f"{np.mean(lost[name, part, method]):.2%}"
            for part in ("gate and up", "down")
            for method in ("search", "gptq")
        ]
        print(f"| {name} | {FORMATS[name].bits_per_weight:.2f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
