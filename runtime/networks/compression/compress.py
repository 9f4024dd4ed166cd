"""Write a smaller ONNX file, which onnxruntime runs as well.

Weights become zero where they matter least, products those of 8-bit integers, or both; or weights
of matrices become integers of 4 bits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from headrace.atomic_file import whole_file
from headrace.errors import HeadraceError, UnsupportedError
from headrace.loaders.onnx_model import open_onnx
from headrace.networks.compression import four_bits
from headrace.networks.compression.bias_correction import correct
from headrace.networks.compression.dynamic_int8 import quantised_products
from headrace.networks.compression.float_model import check, simplified
from headrace.networks.compression.price import price
from headrace.networks.compression.pruning import PATTERNS, prune
from headrace.networks.compression.qdq import Quantiser
from headrace.networks.compression.ranges import ranges
from headrace.networks.compression.samples import Sample, read_samples
from headrace.networks.compression.sparse_layers import LEAST, SparseLayer, own_biases, zeros
from headrace.networks.network import Network

KEEP = "keep"  # float32 as it is
DYNAMIC = "int8-dynamic"  # products of rows, by the range that their input has
FORMATS = (KEEP, "int8", DYNAMIC, *four_bits.FORMATS)
# Calls that are looked at, at most: a text has fewer rows than an image has pixels.
SAMPLES, TEXTS, EVALUATED = 64, 256, 256


@dataclass(frozen=True)
class CompressedNetwork:
    """What was written; sizes in bytes.

    Attributes:
        integer_nodes: nodes that integers compute, by operator.
        samples: calls that it was calibrated with.
        sparse_layers: products of which weights were left out.
        sparsity: share of their weights that is zero now.
        four_bits: products whose weights have 4 bits.
        price: how far it is from its source, if that was asked for; see `price.price`.
    """

    path: Path
    source_bytes: int
    size_bytes: int
    integer_nodes: dict[str, int]
    samples: int
    sparse_layers: int = 0
    sparsity: float = 0.0
    four_bits: int = 0
    price: dict[str, Any] | None = None


def compress_network(
    src: Path, dst: Path, *, format: str = KEEP, calibrate: Path | None = None,
    sparsity: float | None = None, pattern: str | None = None, ends: bool = False,
    force: bool = False, evaluate: Path | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> CompressedNetwork:  # fmt: skip
    """Prune or quantise a network after training.

    Args:
        src: of float32, with constant weights.
        dst: the file to write; it gets its name when it is whole.
        format: of `FORMATS`.
        calibrate: inputs: see `read_samples`. Without them the smallest weights are left out, and
            those of 4 bits are rounded to nearest.
        sparsity: share of the weights of 1x1 convolutions and matrices that is left out.
        pattern: outputs whose weights of an input are left out together: "1x1", "4x1" (4) or
            "group" (16).
        ends: leave out weights of the last layer as well.
        force: replace a file of that name.
        evaluate: other inputs, to say how far it is from its source.
        notice: is told what happens.

    Raises:
        ModelFileError, ModelNotFoundError: `src` is no usable model.
        UnsupportedError: another format, nothing to quantise, or onnxruntime does not run it.
        HeadraceError: the inputs do not fit, or the file cannot be written.
    """
    _check(format, sparsity, pattern, ends, calibrate)
    _check_target(dst, force)
    model = open_onnx(src)
    if dst.exists() and any(dst.samefile(one) for one in model.files):
        raise HeadraceError(f"{dst} is a file of the model to be read; write to another")
    source_bytes = sum(one.stat().st_size for one in model.files)
    with Network(model, threads=1) as network:
        texts = all(port.kind in ("INT64", "INT32") for port in network.inputs)
        most = TEXTS if texts else SAMPLES
        given = None if calibrate is None else read_samples(calibrate, network.inputs, most)
        others = [] if evaluate is None else read_samples(evaluate, network.inputs, EVALUATED)
    source = simplified(onnx.load(src))
    written = onnx.ModelProto()
    written.CopyFrom(source)
    if given is not None:
        own_biases(written)
    layers: list[SparseLayer] = []
    if sparsity is not None:
        rows = PATTERNS[pattern or "1x1"]
        layers = prune(written, sparsity, rows, given, ends=ends, notice=notice)
        if not layers:
            raise UnsupportedError(
                f"{src} has no 1x1 convolutions or matrices of float32 with constant weights of "
                f"their own and {LEAST} channels or more, but for its last layer (--ends sparse)"
            )
    left = zeros(layers) if layers else 0.0
    counts: Counter[str] = Counter()
    if format == "int8" and given is not None:
        written, counts = _quantised(src, written, given, notice)
    if format == DYNAMIC:
        written, counts = quantised_products(onnx.shape_inference.infer_shapes(written))
        if not counts:
            raise UnsupportedError(f"{src} has no matrices of float32 that multiply rows")
    small = four_bits.quantise(written, format, given, notice) if format in four_bits.FORMATS else 0
    if format in four_bits.FORMATS and not small:
        raise UnsupportedError(
            f"{src} has no matrices of float32 with constant weights of their own and {LEAST} "
            "channels or more"
        )
    written.producer_name = "headrace"
    check(written)
    with whole_file(dst) as file:
        file.write(written.SerializeToString(deterministic=True))
    return CompressedNetwork(
        dst, source_bytes, dst.stat().st_size, dict(counts.most_common()),
        len(given or ()), len(layers), left, small,
        price(source, written, others) if others else None,
    )  # fmt: skip


def _quantised(
    src: Path, model: Any, given: list[Sample], notice: Callable[[str], None]
) -> tuple[Any, Counter[str]]:
    quantiser = Quantiser(model)
    if not quantiser.products():
        raise UnsupportedError(f"{src} has no products of float32 with constant weights")
    notice(f"ranges of {len(quantiser.chosen.values)} values, of {len(given)} inputs")
    found = ranges(model, quantiser.chosen.values, given)
    notice(f"biases of {len(quantiser.products())} products")
    written = correct(quantiser, found, given)
    return written, Counter(quantiser.nodes[i].op_type for i in quantiser.chosen.nodes)


def _check(
    format: str, sparsity: float | None, pattern: str | None, ends: bool, calibrate: Path | None
) -> None:
    if format not in FORMATS:
        raise UnsupportedError(f"ONNX files become {', '.join(FORMATS)}, not {format!r}")
    if format == KEEP and sparsity is None:
        raise HeadraceError(
            "nothing to do: give --format int8, int8-dynamic or i4_g32, or --sparsity 0.7"
        )
    if format in four_bits.FORMATS and sparsity is not None:
        raise HeadraceError(f"--format {format} and --sparsity do not go together; take one")
    if format == DYNAMIC and sparsity is None and calibrate is not None:
        raise HeadraceError(
            f"--format {DYNAMIC} looks at no inputs but with --sparsity: leave out --calibrate"
        )
    if format == "int8" and calibrate is None:
        raise HeadraceError(
            "--format int8 needs inputs to --calibrate with: a folder of .npy or .npz files, each "
            "an input (or several) as the network takes it"
        )
    if sparsity is None and (pattern is not None or ends):
        raise HeadraceError("--pattern and --ends say which weights --sparsity leaves out: give it")
    if sparsity is not None and not 0 < sparsity < 1:
        raise HeadraceError(f"--sparsity is the share of weights to leave out, not {sparsity}")
    if pattern is not None and pattern not in PATTERNS:
        raise HeadraceError(f"--pattern is one of {', '.join(PATTERNS)}, not {pattern!r}")


def _check_target(target: Path, force: bool) -> None:
    if target.suffix.lower() != ".onnx":
        raise HeadraceError(f"{target}: an ONNX file becomes an ONNX file; name it so")
    if target.is_dir() or not target.parent.is_dir():
        raise HeadraceError(f"{target} cannot be written: name a file in a folder that exists")
    if os.path.lexists(target) and not (force and target.is_file()):
        advice = "use --force to replace it" if target.is_file() else "name another"
        raise HeadraceError(f"{target} exists; {advice}")
