"""Which nodes run together: those of our kernels in one native call, others in one session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.networks.graph import Graph, Node


@dataclass(frozen=True)
class Region:
    """Nodes that run together.

    Attributes:
        ours: whether our kernels compute them.
        outputs: values that are wanted outside.
    """

    ours: bool
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


def regions_of(graph: Graph, is_ours: Callable[[Node], bool]) -> list[Region]:
    """All nodes in as few runs as a greedy order gives: of what is ready, all of one kind first."""
    waiting = {i: _waits(graph, node) for i, node in enumerate(graph.nodes)}
    made_by: dict[str, list[int]] = {}
    for i, names in waiting.items():
        for name in names:
            made_by.setdefault(name, []).append(i)
    kinds = [is_ours(node) for node in graph.nodes]
    ready = {i for i, names in waiting.items() if not names}
    runs: list[tuple[bool, list[int]]] = []
    while ready:
        kind = not runs[-1][0] if runs else kinds[min(ready)]
        run: list[int] = []
        while True:
            now = sorted(i for i in ready if kinds[i] == kind)
            if not now:
                break
            for i in now:
                ready.discard(i)
                run.append(i)
                for name in graph.nodes[i].outputs:
                    for user in made_by.get(name, ()):
                        waiting[user].discard(name)
                        if not waiting[user]:
                            ready.add(user)
        runs.append((kind, sorted(run)))
    return [_region(graph, kind, run) for kind, run in runs if run]


def _waits(graph: Graph, node: Node) -> set[str]:
    there = {*graph.inputs, *graph.sparse}
    return {name for name in node.reads if name not in there and name not in graph.constants}


def _region(graph: Graph, ours: bool, run: list[int]) -> Region:
    inside = set(run)
    outside = set(graph.outputs)
    for i, node in enumerate(graph.nodes):
        if i not in inside:
            outside.update(node.reads)
    nodes = tuple(graph.nodes[i] for i in run)
    made = [name for node in nodes for name in node.outputs if name]
    return Region(ours, nodes, tuple(name for name in made if name in outside))
