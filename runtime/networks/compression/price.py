"""How far a quantised network is from its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.networks.compression.float_model import observe
from headrace.networks.compression.samples import Sample


def price(source: Any, quantised: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Of each output: the relative error, and of rows of classes how often the largest is the same.

    Both run on onnxruntime, without its optimisations. The error is the norm of what differs over
    that of the source's output, of all samples; there is none where that is zero, where shapes are
    not the same (of what was found, such as boxes), or of what is no array of numbers.

    Raises:
        UnsupportedError: onnxruntime does not run one.
    """
    names = [one.name for one in source.graph.output]
    expected, found = (_outputs(model, names, samples) for model in (source, quantised))
    rows = {name: _facts(expected[name], found[name]) for name in names}
    return {"samples": len(samples), "outputs": rows}


def _facts(expected: Sequence[Any], found: Sequence[Any]) -> dict[str, float | None]:
    """Of an output, which may have another shape in each call."""
    pairs = list(zip(expected, found, strict=True))
    if not all(_numbers(a) and _numbers(b) and a.shape == b.shape for a, b in pairs):
        return {"relative_error": None}
    size = math.sqrt(sum(_squares(a) for a, _ in pairs))
    apart = math.sqrt(sum(_squares(a.astype(np.float64) - b) for a, b in pairs))
    facts: dict[str, float | None] = {"relative_error": apart / size if size else None}
    if all(a.dtype.kind == "f" and a.ndim == 2 and a.shape[1] > 1 and len(a) for a, _ in pairs):
        same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
        facts["top_1_agreement"] = float(same.mean())
    return facts


def _numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _outputs(
    model: Any, names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def look(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            found[name].append(value)

    observe(model, names, samples, look)
    return found
