"""Names of the files of a split model: `stem-00001-of-00003.gguf`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(
    r"(?P<stem>.*)-(?P<part>[0-9]{5})(?P<of>-of-)(?P<count>[0-9]{5})(?P<ending>\.gguf)",
    re.IGNORECASE | re.DOTALL,
)


class SplitName(NamedTuple):
    """A part's name in pieces: `part` from 1 to `parts`, `of` and `ending` as they are spelled."""

    stem: str
    part: int
    parts: int
    of: str
    ending: str

    def sibling(self, part: int) -> str:
        """The name of another part, spelled as this one."""
        return f"{self.stem}-{part:05d}{self.of}{self.parts:05d}{self.ending}"

    def all_names(self) -> list[str]:
        """The names of all parts in order."""
        return [self.sibling(part) for part in range(1, self.parts + 1)]


def parse_split_name(name: str) -> SplitName | None:
    """The pieces of a file name, folders in front of it allowed; None when it names no part."""
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match["part"]) <= int(match["count"]):
        return None
    return SplitName(
        match["stem"], int(match["part"]), int(match["count"]), match["of"], match["ending"]
    )


def all_parts(name: str) -> list[str]:
    """The names of all files of the model that this one belongs to: for a whole model, itself."""
    split = parse_split_name(name)
    return [name] if split is None else split.all_names()


def model_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF names grouped into models: the first part of each split one -> the parts there are."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        split = parse_split_name(name)
        groups.setdefault((split.stem, split.parts) if split else (name, 0), []).append(name)
    return {_first(parts): parts for parts in groups.values()}


def _first(parts: list[str]) -> str:
    splits = [split for part in parts if (split := parse_split_name(part))]
    if not splits:
        return parts[0]
    return next((s.sibling(1) for s in splits if s.part == 1), splits[0].sibling(1))
