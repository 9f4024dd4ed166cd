"""The node and model tests of the package onnx, all of them, through our backend.

What fails is listed, each case with its reason: one that passes after all fails here, so that the
list stays true. What is drawn at random is left out.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import onnx.backend.test
import onnxruntime

from headrace.networks.backend import HeadraceBackend

EXPECTED = Path(__file__).parent / "data" / "onnx_expected_failures.txt"
AT_LEAST = 1454  # that onnxruntime 1.31 passes by itself, of the 2033 of onnx 1.23

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # expected values of some cases overflow
    _tests = onnx.backend.test.BackendTest(HeadraceBackend, __name__)
failing = dict(
    line.split(": ", 1)
    for line in EXPECTED.read_text("utf-8").splitlines()
    if not line.startswith("#")
)


def _is_mended(reason: str) -> bool:
    """Whether a reason is none with the packages that are installed."""
    if reason == "needs Pillow":
        return importlib.util.find_spec("PIL") is not None
    _, before, version = reason.rpartition("onnxruntime's Loop before ")
    return bool(before) and _numbers(onnxruntime.__version__) >= _numbers(version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


for _name, _reason in failing.items():
    if _is_mended(_reason):
        continue
    # What is drawn at random equals the file's now and then.
    (_tests.exclude if _reason == "random" else _tests.xfail)(f"^{_name}_cpu$")

_cases = _tests.test_cases
for _case in _cases.values():
    for _name in [name for name in dir(_case) if name.endswith("_cuda")]:
        delattr(_case, _name)
globals().update(_cases)


def test_more_pass_than_onnxruntime_passes() -> None:
    names = [n for case in _cases.values() for n in dir(case) if n.endswith("_cpu")]
    assert len(names) - len(failing) >= AT_LEAST
    assert not {f"{name}_cpu" for name in failing} - set(names), "a case that is gone is listed"
