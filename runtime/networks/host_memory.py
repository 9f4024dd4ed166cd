"""What operators take that onnxruntime runs, at most."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from headrace.available import resident_bytes
from headrace.loaders.onnx_model import subgraphs, tensor_bytes
from headrace.networks.graph import Graph, Node
from headrace.networks.live import live_bytes, value_bytes

# Bytes for each of a weight while a session begins: as it is given, onnxruntime's copy, and what it
# makes of that (packed; in blocks of channels; of halves float32).
_COPIES, _COPIES_OF_CONVOLUTIONS, _COPIES_OF_HALVES = 3, 4, 6
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_HALVES = (10, 16)  # float16 and bfloat16
_COPIES_OF_INNER = 6  # of graphs in attributes: as nodes, a model, its text, and the session's
_REGISTERING = threading.Lock()
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def weight_bytes(graph: Graph, nodes: Sequence[Node]) -> int:
    """What large constants of a region take at the peak."""
    copies = _COPIES
    if any(node.op in _CONVOLUTIONS for node in nodes):
        copies = _COPIES_OF_CONVOLUTIONS
    names = {name for node in nodes for name in node.reads if name in graph.constants}
    types = [graph.constants.type(n) for n in names if not graph.constants.is_small(n)]
    sizes = [tensor_bytes(of.elem_type, of.shape or ()) for of in types]
    halves = [of.elem_type in _HALVES for of in types]
    each = (
        n * (_COPIES_OF_HALVES if half else copies) for n, half in zip(sizes, halves, strict=True)
    )
    inner = sum(int(one.ByteSize()) for node in nodes for one in subgraphs(node.proto))
    # One of them is in the making.
    return sum(each) + max(sizes, default=0) + _COPIES_OF_INNER * inner


def values_bytes(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str]
) -> int:
    """What values whose shapes are known take at most, twice: it asks for powers of two.

    What is made of constants alone is there before all else.
    """
    alone = replace(graph, nodes=list(nodes), inputs=list(inputs), outputs=list(outputs))
    first = set[str]()
    for node in nodes:
        if all(name in first or name in graph.constants for name in node.reads):
            first.update(node.outputs)
    gates = max((_gate_bytes(graph, node) for node in nodes), default=0)
    return 2 * live_bytes(alone) + gates + sum(value_bytes(graph, name) for name in first)


def _gate_bytes(graph: Graph, node: Node) -> int:
    """Of the gates of all steps, which recurrent layers have while they run."""
    layer = node.op in _GATES and not node.domain and bool(node.inputs)
    shape = graph.shape(node.inputs[0]) if layer else None
    if shape is None or len(shape) != 3:
        return 0
    directions = 2 if node.attribute("direction") == b"bidirectional" else 1
    size = max(0, int(node.attribute("hidden_size", 0))) * _GATES[node.op] * directions
    return 4 * shape[0] * shape[1] * size


def free_bytes() -> int | None:
    """What the process may take beside what it has; None: that is not known."""
    from headrace.planning import limit_of  # of language models: networks seldom need it

    limit = limit_of(None).n_bytes
    return None if limit is None else max(0, limit - resident_bytes())


def is_open(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Whether values may become larger than anybody knows: shapes are not known, or nodes loop."""
    known = (graph.type(name) for node in nodes for name in node.outputs if name)
    loops = any(True for node in nodes for _ in subgraphs(node.proto))
    return loops or any(of is None or of.shape is None for of in known)


@contextmanager
def bounded(options: Any, most: int | None) -> Iterator[None]:
    """Have the session that is made meanwhile take so many bytes at most for values.

    What needs more ends in an exception. Allocators that sessions can be told to take are the
    process's: behind it, there is one without a bound.

    Args:
        options: SessionOptions.
        most: None: there is no bound.
    """
    if most is None:
        yield
        return
    options.add_session_config_entry("session.use_env_allocators", "1")
    with _REGISTERING:
        try:
            _register(most)
            yield
        finally:
            _register(0)


def _register(most: int) -> None:
    """Have another allocator for sessions that are made from now on; 0: without a bound."""
    import onnxruntime as ort

    kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(most, -1, -1, -1))


def ran_out(error: Exception) -> bool:
    """Whether a run failed because its session is `bounded`."""
    return "bfc_arena" in str(error)
