"""Which nodes run together: those of our kernels in one native call, others in one session."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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


MOST_OURS = 2  # regions of ours that pay, if half of all nodes are in them: `regions_that_pay`
LEAST_SHARE = 0.1  # of all nodes, that a region of ours has where it is not the only one


def regions_that_pay(graph: Graph, is_ours: Callable[[Node], bool]) -> list[Region]:
    """All nodes in runs; on the host alone where changing between both costs too much.

    At each border values change how they lie in memory, and the threads of one side are woken
    while those of the other look for work: more than our kernels gain between two of them.
    """
    ours = {id(node) for node in graph.nodes if is_ours(node)}
    while True:
        found = _with_ours(graph, ours)
        mine = [region for region in found if region.ours]
        least = min(mine, key=lambda region: _count(region.nodes), default=None)
        if least is None or len(mine) == 1:
            break
        if _count(least.nodes) >= LEAST_SHARE * _count(graph.nodes):
            break
        given_up = {id(node) for node in least.nodes if not node.ours_alone}
        if not given_up:
            break
        ours -= given_up
    nodes = [node for region in mine for node in region.nodes]
    if len(mine) <= MOST_OURS and 2 * _count(nodes) >= _count(graph.nodes):
        return found
    return regions_of(graph, lambda node: False)


def _with_ours(graph: Graph, ours: Collection[int]) -> list[Region]:
    return regions_of(graph, lambda node: id(node) in ours)


def _count(nodes: Iterable[Node]) -> int:
    return sum(len(node.originals) for node in nodes)


def regions_of(graph: Graph, is_ours: Callable[[Node], bool]) -> list[Region]:
    """All nodes in as few runs as a greedy order gives: of what is ready, all of one kind first.

    Either kind may be the first: what takes fewer runs is taken.
    """
    kinds = [is_ours(node) for node in graph.nodes]
    host_first, ours_first = _runs(graph, kinds, False), _runs(graph, kinds, True)
    runs = host_first if len(host_first) <= len(ours_first) else ours_first
    return [_region(graph, kind, run) for kind, run in runs]


def _runs(graph: Graph, kinds: Sequence[bool], first: bool) -> list[tuple[bool, list[int]]]:
    waiting = {i: _waits(graph, node) for i, node in enumerate(graph.nodes)}
    made_by: dict[str, list[int]] = {}
    for i, names in waiting.items():
        for name in names:
            made_by.setdefault(name, []).append(i)
    ready = {i for i, names in waiting.items() if not names}
    runs: list[tuple[bool, list[int]]] = []
    kind = first
    while ready:
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
        if run:
            runs.append((kind, sorted(run)))
        kind = not kind
    return runs


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
    return Region(ours, nodes, tuple(name for name in _made(nodes) if name in outside))


def _made(nodes: Iterable[Node]) -> list[str]:
    return [name for node in nodes for name in node.outputs if name]


def with_nodes_of_file(regions: Sequence[Region], graph: Graph, file: Graph) -> list[Region]:
    """Regions of the host with the nodes of the file that compute them, and what these then want.

    Nodes of `graph` that stand for others read less, or something else: what the others read is an
    output of the region that makes it, or is made once more where none in front does.

    Args:
        regions: of `graph`, in the order in which they run.
        file: the graph before patterns.
    """
    makers = {name: node for node in file.nodes for name in node.outputs if name}
    there = {*graph.inputs, *graph.sparse}
    found = []
    for region in regions:
        nodes = region.nodes if region.ours else _of_file(region, graph, makers, there)
        found.append(replace(region, nodes=tuple(nodes)))
        there.update(_made(region.nodes))
    reads = [{name for node in region.nodes for name in node.reads} for region in found]
    wanted = [set(graph.outputs).union(*reads[:i], *reads[i + 1 :]) for i in range(len(found))]
    return [
        replace(new, outputs=tuple(name for name in _made(old.nodes) if name in names))
        for new, old, names in zip(found, regions, wanted, strict=True)
    ]


def _of_file(
    region: Region, graph: Graph, makers: Mapping[str, Node], there: Collection[str]
) -> list[Node]:
    """Nodes of the file that compute a region, in an order in which they can.

    Several nodes of `graph` may stand for the same one of the file, of which only one of them knows
    (it may be in another region, of ours): whatever they read that is not there yet is made.
    """
    found: dict[str, Node] = {}  # by what it makes: without repeats, nodes may read other values
    left = [one for node in reversed(region.nodes) for one in reversed(node.originals)]
    # What new nodes make, nodes of the file would make as well, with all else that they do.
    makers = {**makers, **{name: node for node in left for name in node.outputs if name}}
    while left:
        node = left[-1]
        before = [
            maker
            for name in node.reads
            if name not in there
            and name not in graph.constants
            and (maker := makers.get(name)) is not None
            and _key(maker) not in found
        ]
        if _key(node) in found or not before:
            found.setdefault(_key(node), left.pop())
        else:
            left += before
    return list(found.values())


def _key(node: Node) -> str:
    return next((name for name in node.outputs if name), "")
