"""What a network is, takes and costs: `headrace inspect`, `plan` and `bench` of ONNX files."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from headrace.available import available_bytes, resident_bytes
from headrace.errors import BudgetError, HeadraceError
from headrace.networks.graph import TensorType
from headrace.networks.live import live_bytes
from headrace.networks.multiply_adds import multiply_adds
from headrace.networks.native import NativeRegion
from headrace.networks.needs import NetworkMemory
from headrace.networks.network import Network
from headrace.networks.network_plan import NetworkPlan
from headrace.networks.ports import Port
from headrace.networks.prediction import Prediction
from headrace.peak import peak_rss_bytes
from headrace.sizes import format_size

_KINDS = {name: value for name, value in onnx.TensorProto.DataType.items()}


def describe(network: Network, inputs: Mapping[str, TensorType]) -> dict[str, Any]:
    """What is in the file, and which of its operators run on what, for inputs of these types."""
    plan = network.plan(inputs)
    model = network.model
    counts = Counter(
        f"{n.domain}::{n.op}" if n.domain else n.op for _, nodes in plan.where() for n in nodes
    )
    return {
        "file": None if network.path is None else str(network.path),
        "producer": model.proto.producer_name or None,
        "operator_sets": {domain or "ai.onnx": v for domain, v in model.opsets.items()},
        "weights_bytes": model.weight_bytes,
        "inputs": [f"{one.name}: {one.text}" for one in network.inputs],
        "outputs": [f"{one.name}: {one.text}" for one in network.outputs],
        "assumed": _assumed(network, inputs),
        "nodes": len(model.proto.graph.node),
        "nodes_left": sum(counts.values()),
        **_shares(plan),
        "operators": [{"operator": op, "nodes": n} for op, n in counts.most_common()],
        "regions": regions(plan),
        "sparse": sparse_products(plan),
    }


def _shares(plan: NetworkPlan) -> dict[str, Any]:
    """How much of the nodes and of the multiply-adds our kernels compute.

    Nodes whose multiply-adds are not known (shapes that come at run time, loops) count as none.
    """
    rows = regions(plan)
    ours = [row for row in rows if row["runs_on"] == "headrace"]
    shares: dict[str, Any] = {"macs": sum(row["macs"] for row in rows)}
    for key in ("nodes", "macs"):
        whole = sum(row[key] for row in rows)
        part = sum(row[key] for row in ours)
        shares[f"{key}_on_headrace_percent"] = 100 * part / whole if whole else None
    found = (multiply_adds(plan.graph, node) for _, nodes in plan.where() for node in nodes)
    return shares | {"nodes_of_unknown_macs": sum(one is None for one in found)}


def sparse_products(plan: NetworkPlan) -> list[dict[str, Any]]:
    """Products that leave out zeros: `zeros` of their weights, in `blocks` of outputs x inputs."""
    found = {  # bands and patches of a layer have the same weights
        id(one.weights): one
        for run in plan.runs
        if isinstance(run, NativeRegion)
        for one in run.operations
        if one.sparse is not None
    }
    return [
        {"layer": one.nodes[0].label, "zeros": one.sparse.zeros, "blocks": one.sparse.blocks}
        for one in found.values()
        if one.sparse is not None
    ]


def regions(plan: NetworkPlan) -> list[dict[str, Any]]:
    """What runs on what, in order, with the multiply-adds that are known."""
    return [
        {
            "runs_on": on,
            "nodes": len(nodes),
            "macs": sum(multiply_adds(plan.graph, node) or 0 for node in nodes),
            "from": nodes[0].label,
            "to": nodes[-1].label,
        }
        for on, nodes in plan.where()
    ]


def requirements(network: Network, inputs: Mapping[str, TensorType]) -> dict[str, Any]:
    """What the network takes for inputs of these types, before anything is computed."""
    plan = network.plan(inputs)
    return {
        "file": None if network.path is None else str(network.path),
        "assumed": _assumed(network, inputs),
        "weights_bytes": network.model.weight_bytes,
        "activations_bytes": live_bytes(plan.graph),
        "arena_bytes": plan.arena_bytes,
        "values_of_unknown_shape": sum(
            plan.graph.shape(name) is None for node in plan.graph.nodes for name in node.outputs
        ),
        **_memory(network, plan),
        "patches": patches(plan),
        "regions": regions(plan),
    }


def _memory(network: Network, plan: NetworkPlan) -> dict[str, Any]:
    """What a plan takes beside the process, and of a budget what is read and expected.

    Raises:
        BudgetError: it does not fit.
    """
    found = plan.memory
    process = resident_bytes()
    facts: dict[str, Any] = {
        "needed_bytes": found.n_bytes,
        "least_bytes": found.least,
        "process_bytes": process,
        "memory": [{"for": name, "bytes": n} for name, n in found.parts.items() if n],
    }
    if found.budget is None:
        return facts
    facts |= {
        "budget_bytes": found.budget,
        "all_in_memory": found.streamed_bytes == 0,
        "all_in_memory_from_bytes": found.whole,
    }
    if not found.streamed_bytes:
        return facts
    expected = network.predict(plan)
    packed = network.packed_file(plan)
    return facts | {
        "bytes_read_per_run": found.streamed_bytes,
        "flash_read_gb_s": None if expected.flash is None else expected.flash / 1e9,
        "read_mode": None if expected.mode is None else str(expected.mode),
        "compute_s": expected.compute_s,
        "predicted_s": expected.seconds,
        "packed_file": None if packed is None else str(packed.path),
        "packed_bytes": None if packed is None else packed.n_bytes,
        "is_packed": None if packed is None else packed.is_there,
    }


def patches(plan: NetworkPlan) -> list[dict[str, Any]]:
    """What runs patch by patch, and what of the region's multiply-adds is computed again."""
    return [
        {
            "from": one.first, "to": one.last, "patches": f"{one.grid} x {one.grid}",
            "layer_by_layer_bytes": one.whole_arena_bytes, "macs": one.macs,
            "recomputed_percent": 100 * one.overhead,
        }
        for one in plan.patches
    ]  # fmt: skip


def bench(network: Network, inputs: Mapping[str, np.ndarray], *, runs: int) -> dict[str, Any]:
    """Best and median seconds of calls, after one that is not counted.

    Raises:
        ValueError: `runs` is below 1.
        HeadraceError: an operator refuses the inputs.
    """
    if runs < 1:
        raise ValueError("runs must be at least 1")
    types = {name: TensorType(_KINDS[_kind(network, name)], a.shape) for name, a in inputs.items()}
    planned = network.plan(inputs)
    memory = planned.memory
    expected = network.predict(planned) if memory.streamed_bytes else None
    began = time.perf_counter()
    network(inputs)
    first_s = time.perf_counter() - began
    taken, stalls = [], []
    for _ in range(runs):
        began, waited = time.perf_counter(), network.stall_s
        network(inputs)
        taken.append(time.perf_counter() - began)
        stalls.append(network.stall_s - waited)
    plan = network.plan(inputs)
    return {
        "model": None if network.path is None else str(network.path),
        "threads": network.threads,
        "target": network.target if plan.natives else None,
        "inputs": {name: list(array.shape) for name, array in inputs.items()},
        "best_s": min(taken),
        "median_s": float(np.median(taken)),
        "first_s": first_s,
        "runs": runs,
        "peak_rss_bytes": peak_rss_bytes(),
        "arena_bytes": plan.arena_bytes,
        **_of_budget(memory, expected, min(taken), stalls[int(np.argmin(taken))]),
        "patches": patches(plan),
        "regions": regions(plan),
        "assumed": _assumed(network, types),
    }


def _of_budget(
    memory: NetworkMemory, expected: Prediction | None, best_s: float, stall_s: float
) -> dict[str, Any]:
    """What was read, beside what the disk gives: for a budget."""
    if memory.budget is None:
        return {}
    facts: dict[str, Any] = {
        "budget_bytes": memory.budget,
        "planned_bytes": memory.n_bytes,
        "bytes_read_per_run": memory.streamed_bytes,
    }
    if expected is None or not expected.flash:
        return facts
    read_s = memory.streamed_bytes / expected.flash
    return facts | {
        "flash_read_gb_s": expected.flash / 1e9,
        "read_mode": str(expected.mode),
        "read_s": read_s,
        "compute_s": expected.compute_s,
        "predicted_s": expected.seconds,
        "share_of_flash": read_s / best_s,
        # What a run took, over the longer of reading and computing: 1 is perfect overlap.
        "overlap": best_s / max(read_s, expected.compute_s),
        "stall_s": stall_s,
        "stall_share": stall_s / best_s,
    }


def _kind(network: Network, name: str) -> str:
    return next(port.kind for port in network.inputs if port.name == name)


def assumed_types(network: Network, sizes: Mapping[str, int]) -> dict[str, TensorType]:
    """Types of inputs where open dimensions have the `sizes` that are given by name, or are 1.

    Raises:
        HeadraceError: an input is no tensor, or has no shape; a size is of no dimension.
    """
    names = {d for port in network.inputs for d in port.shape or () if isinstance(d, str)}
    unknown = sorted(set(sizes) - names)
    if unknown:
        there = ", ".join(sorted(names)) or "none"
        raise HeadraceError(f"no input has a dimension {unknown[0]!r}; there are {there}")
    return {port.name: _assumed_type(port, sizes) for port in network.inputs}


def _assumed_type(port: Port, sizes: Mapping[str, int]) -> TensorType:
    if port.kind not in _KINDS or port.shape is None:
        raise HeadraceError(
            f"input {port.name} ({port.text}) has no shape to assume: give it as a file, "
            f"`--input {port.name}=FILE.npy`"
        )
    shape = (d if isinstance(d, int) else sizes.get(d or "", 1) for d in port.shape)
    return TensorType(_KINDS[port.kind], tuple(shape))


def _assumed(network: Network, inputs: Mapping[str, TensorType]) -> list[str]:
    """The open dimensions, as they were taken."""
    found = {}
    for port in network.inputs:
        of = inputs.get(port.name)
        if port.shape is None or of is None or of.shape is None:
            continue
        for wanted, taken in zip(port.shape, of.shape, strict=True):
            if not isinstance(wanted, int):
                found[wanted or f"an open dimension of {port.name}"] = taken
    return [f"{name} = {taken}" for name, taken in found.items()]


def random_input(of: TensorType, random: np.random.Generator) -> np.ndarray:
    """Values for measuring: normal ones, or zeros and ones where only whole numbers fit.

    Raises:
        HeadraceError: strings.
        BudgetError: there is less memory than they take.
    """
    if of.elem_type == onnx.TensorProto.STRING:
        raise HeadraceError("an input has strings: give it as a file, `--input NAME=FILE.npy`")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(of.elem_type)
    shape = of.shape or ()
    needed, free = math.prod(shape) * (8 + dtype.itemsize), available_bytes()
    if needed > (sys.maxsize if free is None else free):
        raise BudgetError(
            f"random numbers of the shape {list(shape)} take {format_size(needed)}, which is more "
            "than there is: give smaller sizes, --input DIMENSION=SIZE",
            needed_bytes=needed,
        )
    if dtype.kind in "iub":
        return random.integers(0, 2, shape).astype(dtype)
    return random.normal(size=shape).astype(dtype)
