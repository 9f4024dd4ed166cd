"""Networks on our kernels, beside onnxruntime without its optimiser and a reference of NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx_models import save

from headrace.errors import BudgetError
from headrace.networks.native import NativeRegion
from headrace.networks.network import load_network


def as_the_file_says(model: Any, x: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of onnxruntime, of the nodes as they are."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, x)
    return found


def check_alone(
    model: Any, x: dict[str, np.ndarray], path: Path, expected: np.ndarray | None = None,
    within: float | np.ndarray = 2e-5,
) -> list[str]:  # fmt: skip
    """All of it runs on our kernels, whose names come back.

    Outputs are the same, bit for bit, on one and two threads, on a second call, and in the least
    memory; within a bound of those of onnxruntime, and the first also of what is expected.

    Args:
        path: a directory of its own.
        within: relatively to the largest magnitude that is expected, or of each element.
    """
    others = as_the_file_says(model, x)
    file = save(model, path / "x.onnx")
    bits: list[bytes] = []
    with load_network(file, memory=1) as network, pytest.raises(BudgetError) as caught:
        network.plan(x).memory  # noqa: B018
    for options in ({"threads": 1}, {"threads": 2}, {"memory": caught.value.needed_bytes}):
        with load_network(file, **options) as network:  # type: ignore[arg-type]
            for _ in range(2):
                found = list(network(x).values())
                for one, other in zip(found, others, strict=True):
                    _assert_near(one, other, within)
                if expected is not None:
                    _assert_near(found[0], expected, within)
                bits.append(b"".join(one.tobytes() for one in found))
            assert len(set(bits)) == 1
            runs = network.plan(x).runs
            assert len(runs) == 1
            (run,) = runs
            assert isinstance(run, NativeRegion)
    return [one.kernel for one in run.operations]


def _assert_near(found: np.ndarray, expected: np.ndarray, within: float | np.ndarray) -> None:
    bound = within
    if not isinstance(within, np.ndarray):
        bound = within * np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    assert found.shape == expected.shape
    with np.errstate(invalid="ignore"):
        off = np.abs(found - expected)
        near = (off <= bound) | (found == expected) | (np.isnan(found) & np.isnan(expected))
    assert near.all(), f"off by {off[~near].max()}, at most {np.max(bound)}"
