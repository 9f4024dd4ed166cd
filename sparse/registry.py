"""Every weight format, found by listing this folder: a new format is a new file, nothing else.

A module names its format `FORMAT`, or several that are made alike `FORMATS`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

from headrace import sparse
from headrace.sparse.format import Format

_DECLARES = re.compile(r"^FORMATS?\b", re.MULTILINE)


def _discover() -> Iterator[Format]:
    for finder, name, _ in pkgutil.iter_modules(sparse.__path__):
        # Formats share the folder with quantisers, which may import much: look before importing.
        source = finder.find_spec(name, None).loader.get_source(name)  # type: ignore
        if source is None or _DECLARES.search(source):
            module = importlib.import_module(f"{sparse.__name__}.{name}")
            found = [getattr(module, "FORMAT", None), *getattr(module, "FORMATS", ())]
            yield from (one for one in found if isinstance(one, Format))


FORMATS: dict[str, Format] = {found.name: found for found in _discover()}
_BY_GGML_TYPE = {f.ggml_type: f for f in FORMATS.values() if f.ggml_type is not None}


def by_ggml_type(name: str) -> Format | None:
    """Give the format with the bytes of the GGML type `name` ("Q4_0"), if there is one."""
    return _BY_GGML_TYPE.get(name)
