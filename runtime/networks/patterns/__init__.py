"""Patterns of nodes for which there is one kernel: a file for each kind, and their order.

A pattern looks at one node, the last of what it stands for, and gives nodes that compute the same,
of ONNX or of the domain `headrace`. It is taken where we have operations for all of these, but for
a few that prepare masks. Nodes whose values nobody needs any more go, and those that compute what
another does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from headrace.networks.as_rows import as_rows
from headrace.networks.channels_first import channels_first
from headrace.networks.graph import Graph, Node
from headrace.networks.operators import MALFORMED, operation_for
from headrace.networks.patterns import (
    activations,
    attention,
    dynamic,
    embed_layer_norm,
    frames,
    gelu,
    ids,
    image_norms,
    layer_norm,
    linear,
    mask,
    microsoft,
    n_bits,
    quantised,
    quantised_rows,
    runs,
    scale_and_add,
    shuffle,
    softmax_mean,
)
from headrace.networks.patterns.match import Matcher
from headrace.networks.patterns.repeats import without_repeats

Pattern = Callable[[Matcher, Node], list[Node] | None]

PATTERNS: tuple[Pattern, ...] = (
    dynamic.found,
    embed_layer_norm.found,
    microsoft.expanded,
    n_bits.found,
    layer_norm.found,
    image_norms.found,
    gelu.found,
    activations.found,
    scale_and_add.found,
    linear.found,
    attention.found,
    mask.found,
    quantised_rows.found,
    ids.found,
    quantised.found,
    quantised.with_constants,
    softmax_mean.found,
    frames.found,
    shuffle.found,
)


def with_patterns(graph: Graph) -> Graph:
    """The graph with these nodes instead; it may be the same."""
    graph = replace(graph, as_rows=as_rows(graph))
    for pattern in PATTERNS:
        graph = _applied(graph, pattern)
    graph = _laid_out(without_repeats(graph))
    refused: set[tuple[str, str]] = set()
    while True:  # what lies how is known only when all of them are there
        found = _laid_out(_applied(graph, partial(runs.found, refused=refused)))
        wrong = runs.not_running(found)
        if not wrong:
            return found
        refused |= wrong


def _laid_out(graph: Graph) -> Graph:
    return replace(graph, channels_first=channels_first(graph), as_rows=as_rows(graph))


def _applied(graph: Graph, pattern: Pattern) -> Graph:
    matcher = Matcher(graph)
    made: dict[int, list[Node]] = {}
    for i, node in enumerate(graph.nodes):
        try:
            instead = pattern(matcher, node)
        except MALFORMED:
            continue
        if instead and all(_runs(graph, one) for one in instead):
            made[i] = instead
    if not made:
        return graph
    nodes = [one for i, node in enumerate(graph.nodes) for one in made.get(i, [node])]
    after = graph.of(nodes)
    kept = {id(node) for node in after.nodes}
    gone = {id(node): node for node in graph.nodes if id(node) not in kept}
    for i, instead in made.items():
        if id(instead[-1]) not in kept:  # a later one stands for this, too
            continue
        whole = _behind(matcher, graph.nodes[i], gone)
        alone = graph.nodes[i].ours_alone or len(instead) > 1
        last = replace(instead[-1], instead_of=tuple(whole), ours_alone=alone)
        after.nodes = [last if one is instead[-1] else one for one in after.nodes]
    return after


def _runs(graph: Graph, node: Node) -> bool:
    # How values of three dimensions lie is known only behind all patterns.
    late = node.op in (*microsoft.ON_MASKS, *runs.OPS, *image_norms.OPS, "SoftmaxMean", "Frames")
    return late or operation_for(graph, node) is not None


def _behind(matcher: Matcher, node: Node, gone: dict[int, Node]) -> list[Node]:
    """Nodes of the file, of those that went, that a node was computed with; each is given once."""
    found: list[Node] = []
    look = [node]
    while look:
        one = look.pop()
        if gone.pop(id(one), None) is None:
            continue
        if one.instead_of or not one.ours_alone:  # what a pattern made is not of the file
            found.extend(one.originals)
        look.extend(maker for name in one.reads if (maker := matcher.makers.get(name)) is not None)
    return found[::-1]
