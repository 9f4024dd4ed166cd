"""A mixture's router in numpy: what calibrations and traces compute logits with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.families.decoder import Decoder, Experts, Matrix, tensor_of
from headrace.finite import check_matrix, not_finite
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.rows import float_matrix
from headrace.sparse.format import Floats


@dataclass(frozen=True)
class RouterWeights:
    """Weights of a router, float32; see `headrace.families.decoder.Experts`.

    Attributes:
        first: matrix and bias of what reads the layer's normalised activations.
        out: the same of the second layer, if there is one.
        mapped: the same of what the logits of the mixture before are multiplied by, if they are.
    """

    first: tuple[Floats, Floats]
    out: tuple[Floats, Floats] | None = None
    mapped: tuple[Floats, Floats] | None = None

    def logits(self, inputs: Floats, before: Floats | None) -> Floats:
        """Logits of experts [rows, experts].

        Args:
            inputs: float32 [rows, width], normalised as the router reads them.
            before: logits of the mixture before, if they are known: [rows, experts].
        """
        found = _through(self.first, inputs)
        if self.out is not None:
            found = _through(self.out, np.tanh(found))
        if self.mapped is not None and before is not None:
            found = found + _through(self.mapped, before)
        return found

    def arrays(self) -> Iterator[Floats]:
        """All weights and biases."""
        for layer in (self.first, self.out, self.mapped):
            if layer is not None:
                yield from layer


def _through(layer: tuple[Floats, Floats], x: Floats) -> Floats:
    weights, bias = layer
    found: Floats = x @ weights.T + bias
    return found


def read_router(model: ModelFile, mixture: Experts) -> RouterWeights:
    """Read the router of a mixture.

    Raises:
        ModelFileError: the model cannot be read, or a weight or a bias is no finite number: any
            expert would come out of that, and nobody notice.
    """
    with TensorReader() as reader:

        def read(matrix: Matrix) -> tuple[Floats, Floats]:
            weights, bias = float_matrix(model, reader, matrix)
            if not np.isfinite(weights).all():
                check_matrix(reader, matrix, tensor_of(model, matrix))
            if not np.isfinite(bias).all():
                raise not_finite(model.tensors[matrix.bias or ""], bias)
            return weights, bias

        return RouterWeights(
            read(mixture.router),
            None if mixture.router_out is None else read(mixture.router_out),
            None if mixture.router_map is None else read(mixture.router_map),
        )


def check_routers(model: ModelFile, decoder: Decoder) -> None:
    """Look at the routers of all mixtures.

    Raises:
        what `read_router` does.
    """
    for mixture in decoder.mixtures().values():
        read_router(model, mixture)
