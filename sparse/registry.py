"""Every weight format, found by listing this folder: a new format is a new file, nothing else."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

from headrace import sparse
from headrace.sparse.format import Format

_DECLARES = re.compile(r"^FORMAT\b", re.MULTILINE)


def _discover() -> Iterator[Format]:
    for finder, name, _ in pkgutil.iter_modules(sparse.__path__):
        # Formats share the folder with quantisers, which may import much: look before importing.
        source = finder.find_spec(name, None).loader.get_source(name)  # type: ignore
        if source is None or _DECLARES.search(source):
            found = getattr(importlib.import_module(f"{sparse.__name__}.{name}"), "FORMAT", None)
            if isinstance(found, Format):
                yield found


FORMATS: dict[str, Format] = {found.name: found for found in _discover()}
_BY_GGML_TYPE = {found.ggml_type: found for found in FORMATS.values()}


def by_ggml_type(name: str) -> Format | None:
    """Give the format with the bytes of the GGML type `name` ("Q4_0"), if there is one."""
    return _BY_GGML_TYPE.get(name)
