"""Model families: one file each, named as `general.architecture`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.families.decoder import Decoder
    from headrace.loaders.gguf import ModelFile

_PARTS = ("common", "decoder")


def names() -> list[str]:
    """The architectures that have a file here."""
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PARTS]


def describe(model: ModelFile) -> Decoder:
    """Describe a model file, its family chosen by `general.architecture`.

    Raises:
        UnsupportedError: there is no file for this architecture.
        ModelFileError: the metadata are wrong or incomplete.
    """
    from headrace.errors import UnsupportedError

    architecture = model.get("general.architecture", str)
    build = family(architecture)
    if build is None:
        raise UnsupportedError(
            f"architecture {architecture[:64]!r} is not supported; these are: {', '.join(names())}",
            path=model.paths[0],
        )
    return build(model)


def family(architecture: str) -> Callable[[ModelFile], Decoder] | None:
    """What describes models of an architecture; None: nothing does."""
    # The name comes from the file: it is looked up in a list, never imported as it is.
    if not re.fullmatch(r"[a-z0-9_]{1,32}", architecture) or architecture not in names():
        return None
    build: Callable[[ModelFile], Decoder]
    build = importlib.import_module(f"{__name__}.{architecture}").build
    return build


def dense_base(model: ModelFile, key: str) -> tuple[str, Decoder]:
    """The dense model that a file was cut out of: its architecture, which `key` names, and itself.

    Raises:
        UnsupportedError: it is none; our own architectures are none, which may name each other.
        ModelFileError: the metadata are wrong or incomplete.
    """
    from headrace.errors import UnsupportedError

    base = model.get(key, str)
    build = None if base.startswith("headrace_") else family(base)
    if build is None:
        raise UnsupportedError(
            f"{key} is {base[:64]!r}, which is no architecture of a dense model",
            path=model.paths[0],
        )
    return base, build(model)
