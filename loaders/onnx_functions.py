"""Functions of a model, whose nodes come in place of each call: how many that would be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from headrace.errors import ModelFileError

# Of the graph when functions are in it: so many for each that the file has, if these are not few.
# Functions that call each other make 2^20 nodes of 40.
MOST_FOR_EACH, FEW = 64, 1 << 13


def check_functions(path: Path | None, proto: Any) -> None:
    """That functions call each other neither in a circle nor too often.

    Args:
        path: of the file, for messages.
        proto: a ModelProto.

    Raises:
        ModelFileError: a function calls itself, or there would be far more nodes than the file has.
    """
    functions = {_key(one, one.name): one for one in proto.functions}
    if not functions:
        return
    counts: dict[tuple[str, str, str], int] = {}
    open_: list[tuple[str, str, str]] = []  # those whose calls are being looked at
    left = list(functions)
    while left:
        key = left[-1]
        if key in counts:
            left.pop()
            continue
        called = _called(functions[key].node, functions)
        missing = [one for one in called if one not in counts]
        if not missing:
            counts[key] = _count(functions[key].node, counts)
            if open_ and open_[-1] == key:
                open_.pop()
            left.pop()
            continue
        open_.append(key)
        if set(missing) & set(open_):
            raise ModelFileError(
                f"its function {key[1]!r} calls itself; export it again", path=path
            )
        left += missing
    total = _count(proto.graph.node, counts)
    written = sum(1 for one in (proto.graph, *proto.functions) for _ in _all(one.node))
    most = max(FEW, MOST_FOR_EACH * written)
    if total > most:
        raise ModelFileError(
            f"with its functions in place of their calls it has {total} nodes, and up to {most} "
            f"are made of the {written} that it has; export it again",
            path=path,
        )


def _key(one: Any, name: str) -> tuple[str, str, str]:
    return "" if one.domain == "ai.onnx" else one.domain, name, one.overload


def _all(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for one in node.attribute:
            for graph in (*([one.g] if one.HasField("g") else []), *one.graphs):
                yield from _all(graph.node)


def _called(nodes: Iterable[Any], functions: Any) -> list[tuple[str, str, str]]:
    keys = (_key(node, node.op_type) for node in _all(nodes))
    return [key for key in dict.fromkeys(keys) if key in functions]


def _count(nodes: Iterable[Any], counts: dict[tuple[str, str, str], int]) -> int:
    return sum(counts.get(_key(node, node.op_type), 1) for node in _all(nodes))
