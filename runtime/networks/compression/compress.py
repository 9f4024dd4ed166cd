"""Write an ONNX file whose products are of 8-bit integers, which onnxruntime runs as well."""

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
from headrace.networks.compression.bias_correction import correct
from headrace.networks.compression.float_model import simplified
from headrace.networks.compression.price import price
from headrace.networks.compression.qdq import Quantiser
from headrace.networks.compression.ranges import ranges
from headrace.networks.compression.samples import read_samples
from headrace.networks.network import Network

FORMATS = ("int8",)
SAMPLES, EVALUATED = 64, 256  # calls that are looked at, at most


@dataclass(frozen=True)
class CompressedNetwork:
    """What was written; sizes in bytes, nodes that integers compute by operator.

    Attributes:
        samples: calls that it was calibrated with.
        price: how far it is from its source, if that was asked for; see `price.price`.
    """

    path: Path
    source_bytes: int
    size_bytes: int
    integer_nodes: dict[str, int]
    samples: int
    price: dict[str, Any] | None = None


def compress_network(
    src: Path, dst: Path, *, format: str, calibrate: Path | None, force: bool = False,
    evaluate: Path | None = None, notice: Callable[[str], None] = lambda text: None,
) -> CompressedNetwork:  # fmt: skip
    """Quantise a network after training.

    Args:
        src: of float32, with constant weights.
        dst: the file to write; it gets its name when it is whole.
        format: "int8".
        calibrate: inputs: see `read_samples`.
        force: replace a file of that name.
        evaluate: other inputs, to say how far it is from its source.
        notice: is told what happens.

    Raises:
        ModelFileError, ModelNotFoundError: `src` is no usable model.
        UnsupportedError: another format, nothing to quantise, or onnxruntime does not run it.
        HeadraceError: the inputs do not fit, or the file cannot be written.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"ONNX files become {', '.join(FORMATS)}, not {format!r}")
    if calibrate is None:
        raise HeadraceError(
            "--format int8 needs inputs to --calibrate with: a folder of .npy or .npz files, each "
            "an input (or several) as the network takes it"
        )
    _check_target(dst, force)
    with Network(open_onnx(src), threads=1) as network:
        given = read_samples(calibrate, network.inputs, SAMPLES)
        others = [] if evaluate is None else read_samples(evaluate, network.inputs, EVALUATED)
    model = simplified(onnx.load(src))
    quantiser = Quantiser(model)
    if not quantiser.products():
        raise UnsupportedError(f"{src} has no products of float32 with constant weights")
    notice(f"ranges of {len(quantiser.chosen.values)} values, of {len(given)} inputs")
    found = ranges(model, quantiser.chosen.values, given)
    notice(f"biases of {len(quantiser.products())} products")
    written = correct(quantiser, found, given)
    written.producer_name = "headrace"
    with whole_file(dst) as file:
        file.write(written.SerializeToString(deterministic=True))
    counts = Counter(quantiser.nodes[i].op_type for i in quantiser.chosen.nodes)
    return CompressedNetwork(
        dst, src.stat().st_size, dst.stat().st_size, dict(counts.most_common()), len(given),
        price(model, written, others) if others else None,
    )  # fmt: skip


def _check_target(target: Path, force: bool) -> None:
    if target.suffix.lower() != ".onnx":
        raise HeadraceError(f"{target}: an ONNX file becomes an ONNX file; name it so")
    if target.is_dir() or not target.parent.is_dir():
        raise HeadraceError(f"{target} cannot be written: name a file in a folder that exists")
    if os.path.lexists(target) and not (force and target.is_file()):
        advice = "use --force to replace it" if target.is_file() else "name another"
        raise HeadraceError(f"{target} exists; {advice}")
