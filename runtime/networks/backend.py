"""`onnx.backend` for Headrace: what the conformance tests of the package onnx call.

import headrace.networks.backend as backend
backend.run_model(model, inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx.backend.base import Backend, BackendRep

from headrace.networks.network import Network, network_of


class Prepared(BackendRep):
    """A network that is called with inputs in order."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def run(self, inputs: Any, **options: Any) -> tuple[Any, ...]:
        """Outputs in order."""
        names = [port.name for port in self.network.inputs]
        if not isinstance(inputs, (list, tuple)):
            inputs = [inputs]
        found = self.network(dict(zip(names, inputs, strict=False)))
        return tuple(found[port.name] for port in self.network.outputs)


class HeadraceBackend(Backend):
    """Runs models on this CPU."""

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **options: Any) -> Prepared:
        """A model, ready to run."""
        super().prepare(model, device, **options)
        return Prepared(network_of(model))

    @classmethod
    def run_node(
        cls, node: Any, inputs: Sequence[Any], device: str = "CPU", outputs_info: Any = None,
        **options: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Outputs of one operator, of the newest operator set."""
        arrays = dict(zip(node.input, inputs, strict=True))
        made = [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in arrays.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
        graph = onnx.helper.make_graph([node], "node", made, outputs)
        return cls.prepare(onnx.helper.make_model(graph), device).run(list(inputs))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """The CPU only."""
        return device == "CPU"


prepare = HeadraceBackend.prepare
run_model = HeadraceBackend.run_model
run_node = HeadraceBackend.run_node
supports_device = HeadraceBackend.supports_device
