"""How far a quantised network is from its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.networks.compression.float_model import observe
from headrace.networks.compression.samples import Sample


def price(source: Any, quantised: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Of each output: the relative error, and of rows of classes how often the largest is the same.

    Both run on onnxruntime, without its optimisations. The error is the norm of what differs over
    that of the source's output, of all samples.

    Raises:
        UnsupportedError: onnxruntime does not run one.
    """
    names = [one.name for one in source.graph.output]
    expected, found = (_outputs(model, names, samples) for model in (source, quantised))
    rows: dict[str, Any] = {}
    for name in names:
        a, b = (np.stack(one[name]).astype(np.float64) for one in (expected, found))
        size = float(np.linalg.norm(a))
        facts = {"relative_error": float(np.linalg.norm(a - b)) / size if size else None}
        if a.ndim == 3 and a.shape[-1] > 1:  # calls, rows, classes
            facts["top_1_agreement"] = float((a.argmax(-1) == b.argmax(-1)).mean())
        rows[name] = facts
    return {"samples": len(samples), "outputs": rows}


def _outputs(
    model: Any, names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def look(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            found[name].append(value)

    observe(model, names, samples, look)
    return found
