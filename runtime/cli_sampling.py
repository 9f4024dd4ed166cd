"""Options that say how a text is generated; ONNX files and chips take none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.cli_options import Opt

SAMPLING = (
    Opt("max_tokens", int, 256, "at most so many new tokens", ("-n", "--max-tokens")),
    Opt("temperature", float, 0.0, "0 takes the likeliest token", ("--temperature",)),
    Opt("top_k", int, 0, "sample from the k likeliest (0: all)", ("--top-k",)),
    Opt("top_p", float, 1.0, "sample from this share of the probability", ("--top-p",)),
    Opt("min_p", float, 0.0, "drop tokens below this share of the likeliest", ("--min-p",)),
    Opt("repeat_penalty", float, 1.0, "above 1: repeat less", ("--repeat-penalty",)),
    Opt("seed", int, None, "makes sampling repeatable", ("--seed",)),
    Opt("stop", str, (), "end at this text (may be given again)", ("--stop",), many=True),
    Opt(
        "lookup",
        bool,
        None,
        "guess from the text so far; same answer. Default: if weights stream",
        ("--lookup", "--no-lookup"),
    ),
    Opt(
        "draft",
        str,
        None,
        "a small model of the same vocabulary that guesses; self: a stack's blocks in memory",
        ("--draft",),
    ),
)
RAW = Opt("raw", bool, False, "continue the prompt as it is, without chat template", ("--raw",))


def given_of_sampling(options: Mapping[str, Any]) -> list[str]:
    """Names of those that are not what they are by default."""
    return [
        one.name
        for one in (*SAMPLING, RAW)
        for value in [options.get(one.name, one.default)]
        if (tuple(value) if one.many else value) != one.default
    ]
