"""Names of the parts of split models, and which files belong together."""

from __future__ import annotations

import pytest

from headrace.loaders.split_names import all_parts, model_groups, parse_split_name


@pytest.mark.parametrize(
    "name",
    [
        "m-00002-of-00003.gguf",
        "M-00002-OF-00003.GGUF",
        "dir/m-00002-of-00003.Gguf",
        "-00001-of-00001.gguf",
    ],
)
def test_names_keep_their_spelling(name: str) -> None:
    split = parse_split_name(name)
    assert split is not None
    assert split.sibling(split.part) == name
    names = all_parts(name)
    assert names[split.part - 1] == name
    assert len(names) == split.parts


@pytest.mark.parametrize(
    "name",
    [
        "m.gguf",
        "m-00001-of-00000.gguf",
        "m-00000-of-00002.gguf",
        "m-00003-of-00002.gguf",
        "m-1-of-2.gguf",
        "m-٠٠٠٠١-of-٠٠٠٠٢.gguf",
        "m-00001-of-00002.gguf.part",
        "m-00001-of-00002.gguf\n",
    ],
)
def test_other_names_stand_for_themselves(name: str) -> None:
    assert parse_split_name(name) is None
    assert all_parts(name) == [name]
    assert model_groups([name]) == {name: [name]}


def test_groups() -> None:
    names = [
        "b.gguf",
        "a-00002-of-00002.GGUF",
        "a-00001-of-00002.gguf",
        "a-00003-of-00003.gguf",
        "A-00002-OF-00002.gguf",
    ]
    assert model_groups(names) == {
        "a-00001-of-00002.gguf": ["a-00001-of-00002.gguf", "a-00002-of-00002.GGUF"],
        "a-00001-of-00003.gguf": ["a-00003-of-00003.gguf"],
        "A-00001-OF-00002.gguf": ["A-00002-OF-00002.gguf"],
        "b.gguf": ["b.gguf"],
    }
