"""Names of the files of a split model: `stem-00001-of-00003.gguf`."""

from __future__ import annotations

import re
from collections.abc import Iterable

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$", re.IGNORECASE)


def model_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF names grouped into models: the first part of each split one -> all its parts."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        match = SPLIT_NAME.match(name)
        first = f"{match['stem']}-00001-of-{match['parts']}.gguf" if match else name
        groups.setdefault(first, []).append(name)
    return groups
