"""Headrace: an on-device inference runtime. See `headrace.load` and the README."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.loading import load
    from headrace.model import Model
    from headrace.networks.encoders.encoder import Encoder
    from headrace.networks.network import Network

__all__ = ["Encoder", "Model", "Network", "__version__", "load"]
__version__ = "0.1.0"

_LAZY = {
    "Encoder": "headrace.networks.encoders.encoder",
    "Model": "headrace.model",
    "Network": "headrace.networks.network",
    "load": "headrace.loading",
}


def __getattr__(name: str) -> Any:
    # Every import of a part of the package runs this file first, so it imports nothing itself.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
