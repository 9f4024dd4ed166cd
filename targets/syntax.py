"""The syntax trees of functions, and which names their statements assign."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Callable
from typing import Any

Function = ast.FunctionDef | ast.Lambda


@functools.cache
def _functions(path: str) -> dict[tuple[str, int], list[Function]]:
    """Functions of a file by name and first line."""
    found: dict[tuple[str, int], list[Function]] = {}
    for node in ast.walk(ast.parse("".join(linecache.getlines(path)), path)):
        if isinstance(node, ast.FunctionDef):
            found.setdefault((node.name, node.lineno), []).append(node)
        elif isinstance(node, ast.Lambda):
            found.setdefault(("<lambda>", node.lineno), []).append(node)
    return found


def tree_of(fn: Callable[..., Any]) -> Function:
    """The syntax tree of a function.

    Raises:
        TypeError: its source cannot be found, or is one of several lambdas of a line.
    """
    code = fn.__code__
    found = _functions(code.co_filename).get((code.co_name, code.co_firstlineno), [])
    if len(found) != 1:
        raise TypeError(f"the source of {fn.__qualname__} is not in {code.co_filename}")
    return found[0]


@functools.cache
def assigned(*nodes: ast.stmt) -> tuple[str, ...]:
    """Names that statements assign, in the order of the text."""
    found = [
        node
        for top in nodes
        for node in ast.walk(top)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return tuple(dict.fromkeys(node.id for node in found))


def body_of(function: Function) -> list[ast.stmt]:
    """The statements of a function."""
    if isinstance(function, ast.Lambda):
        return [ast.copy_location(ast.Return(function.body), function.body)]
    return function.body
