"""Layer after layer, in the order of the network: what inputs were, and what they are by now.

Weights that are to become others are chosen for the outputs that the network had, of inputs as the
layers in front give them, which have been changed already: so a layer makes up for those as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from headrace.errors import UnsupportedError
from headrace.networks.compression.float_model import Stepwise
from headrace.networks.compression.samples import Sample
from headrace.networks.compression.sparse_layers import SparseLayer
from headrace.sparse.format import Floats
from headrace.sparse.gptq import DAMPING


@dataclass(frozen=True)
class Moments:
    """Of inputs x as they were and z as they are now, around their means if there is a bias.

    Attributes:
        zz, xz: means of their products [channels read, channels read].
        mean_x, mean_z: [channels read].
    """

    zz: Floats
    xz: Floats
    mean_x: Floats
    mean_z: Floats

    def wanted(self, w: Floats) -> Floats:
        """The weights that are best for inputs as they are now, [outputs, channels read]."""
        damped = self.zz.astype(np.float64)
        np.einsum("ii->i", damped)[:] += DAMPING * (float(np.diag(self.zz).mean()) or 1.0)
        apart = self.xz.astype(np.float64) - self.zz
        found: Floats = w + np.linalg.solve(damped, (w @ apart).T).T.astype(np.float32)
        return found

    def put(self, layer: SparseLayer, found: Floats) -> None:
        """Other weights, and a bias that keeps the means of outputs."""
        w = layer.matrix()
        layer.put(found)
        if layer.bias is not None:
            bias = onnx.numpy_helper.to_array(layer.bias).reshape(-1)
            layer.put_bias(bias + w @ self.mean_x - found @ self.mean_z)


def in_order(
    model: Any, layers: Sequence[SparseLayer], samples: Sequence[Sample],
    notice: Callable[[str], None],
) -> Iterator[tuple[SparseLayer, Moments]]:  # fmt: skip
    """Each layer with what is known of its inputs, before the next ones are computed.

    Args:
        model: ModelProto with its weights inside, whose layers the caller changes.
        layers: of it, in its order.
        samples: inputs to look at.
        notice: is told what happens.

    Raises:
        UnsupportedError: onnxruntime does not run it, or makes values that are no numbers.
    """
    source = onnx.ModelProto()
    source.CopyFrom(model)
    before, after = Stepwise(source, samples), Stepwise(model, samples)
    for i, layer in enumerate(layers):
        notice(f"layer {i + 1} of {len(layers)}: {layer.node.name or layer.node.output[0]}")
        name = layer.node.input[0]
        for run in (before, after):
            if name not in run.values[0]:
                run.run_to(name)
        pairs = zip(before.values, after.values, strict=True)
        yield layer, _moments(layer, [(a[name], b[name]) for a, b in pairs])


def _moments(layer: SparseLayer, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Moments:
    n = layer.matrix().shape[1]
    zz, xz = np.zeros((2, n, n))
    sum_x, sum_z = np.zeros((2, n))
    count = 0
    name = layer.node.input[0]
    with np.errstate(all="ignore"):
        for was, now in pairs:
            x, z = layer.rows(was), layer.rows(now)
            sum_x += x.sum(axis=1, dtype=np.float64)
            sum_z += z.sum(axis=1, dtype=np.float64)
            count += x.shape[1]
        if not count:
            raise UnsupportedError(f"{name} is empty for these inputs: give others")
        mean_x, mean_z = (one.astype(np.float32) for one in (sum_x / count, sum_z / count))
        # Means are taken away first: where they are large, squares would be of nothing else.
        apart = 1 if layer.bias is not None else 0
        for was, now in pairs:
            x = layer.rows(was) - apart * mean_x[:, None]
            z = layer.rows(now) - apart * mean_z[:, None]
            zz += z @ z.T
            xz += x @ z.T
        zz, xz = zz / count, xz / count
    if not np.isfinite(zz + xz).all():
        raise UnsupportedError(
            f"{name}, which a product reads, is infinite or no number for these inputs: there are "
            "no weights that suit them"
        )
    return Moments(zz.astype(np.float32), xz.astype(np.float32), mean_x, mean_z)
