"""Steps of ReLU feed-forwards in clusters of neurons: in memory, or brought from flash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.families.decoder import Decoder, Matrix, NeuronClusters, Vector
from headrace.kernels.clusters import PRODUCT_SLOTS
from headrace.placing import Placed, dense, padded16
from headrace.plan import COUNT, ONE, Mode
from headrace.product_steps import ProductSteps
from headrace.sparse.format import TILE_ROWS
from headrace.sparse.linear import activation_bytes
from headrace.step import Call, Places, Step


class ClusterSteps:
    """The feed-forwards of a decoder's layers that are clusters of neurons."""

    def __init__(
        self, decoder: Decoder, placed: Mapping[str, Placed], places: Places, products: ProductSteps
    ) -> None:
        self._decoder = decoder
        self._placed = placed
        self._places = places
        self._p = products
        self._numbers = {layer: i for i, layer in enumerate(decoder.clustered())}

    def steps(self, mode: Mode, index: int, add: tuple[str, Vector | None]) -> list[Step]:
        """The feed-forward of a layer: all gates, then up and down of the clusters that fire."""
        layer = self._decoder.layers[index]
        f = layer.feed_forward
        assert isinstance(f, NeuronClusters)
        first = f.each[0]
        steps = self._p.norm(mode, layer.feed_forward_norm, add, [f.gate, first.up])
        steps += self._p.products(mode, {"gate": f.gate})
        steps += self._fired(mode, index, f)
        size, count = f.size, self._count(mode)
        y = self._p.address(mode, "up")
        up = self._product(mode, first.up, y, self._p.row_bytes("up"), first.up.columns)
        # A kernel writes whole tiles; neurons of a cluster are whole tiles.
        steps.append(self._called("up", index, f, first.up, up, [size * 4]))
        (kind,) = self._p.kinds(mode, [first.down])
        steps.append(self._p.prepare(mode, f.activation, kind, "gate", "up", f.inner))
        y, y_bytes = self._p.address(mode, "cluster"), self._p.row_bytes("cluster")
        down = self._product(mode, first.down, y, y_bytes, f.inner)
        assert y_bytes == self._p.row_bytes("block")
        between = activation_bytes(kind, size) * mode.group(kind)
        slots = [between, self._p.address(mode, "block"), y_bytes, count]
        steps.append(self._called("down", index, f, first.down, down, slots))
        return steps

    def _count(self, mode: Mode) -> int:
        return self._p.word(ONE if mode.private else COUNT)

    def _fired(self, mode: Mode, index: int, f: NeuronClusters) -> list[Step]:
        """Which clusters fire; those that are not there are asked for."""
        number, cache = self._numbers[index], self._places.cache()
        counts, chosen = (self._places.buffer(name, False) for name in ("fired", "listed"))
        slots = [
            self._p.address(mode, "gate"), self._p.row_bytes("gate"), f.size, len(f.each),
            self._count(mode), counts,
        ]  # fmt: skip
        steps = [Step("clusters_fired", slots, True, f"see which clusters fire {index}")]
        slots = [counts, len(f.each), chosen]
        if cache is None:
            return [*steps, Step("clusters_list", slots, True, f"list clusters {index}")]
        slots += [cache.address, cache.first[number], number, self._count(mode)]
        return [*steps, Step("clusters_claim", slots, True, f"claim clusters {index}")]

    def _product(self, mode: Mode, matrix: Matrix, y: int, y_bytes: int, columns: int) -> Call:
        """The product by a matrix of the first cluster, whose inputs are some of `columns`."""
        fmt = dense(self._placed[matrix.name]).format
        kind = mode.kind(fmt.activation)
        slots = [
            0, self._p.address(mode, f"input_{kind}"), y, matrix.columns // fmt.block, 0,
            self._count(mode), self._p.private_bytes(kind) if mode.private else 0, y_bytes,
            self._p.address(mode, "zeros"), activation_bytes(kind, columns) * mode.group(kind),
            *self._p.unpacking(fmt),
        ]  # fmt: skip
        slots += [0] * (PRODUCT_SLOTS - len(slots))
        return Call(f"{mode.operation(fmt.activation)}_{fmt.name}", slots)

    def _called(
        self, name: str, index: int, f: NeuronClusters, matrix: Matrix, call: Call, more: list[int]
    ) -> Step:  # fmt: skip
        number, cache = self._numbers[index], self._places.cache()
        fmt = dense(self._placed[matrix.name]).format
        behind = len(f.each) * 8 if name == "down" else 0
        slots = [
            0, 0, self._places.buffer("calls", False), self._places.buffer("listed", False),
            self._places.directory(number) + behind, 0 if cache is None else cache.address,
            0 if cache is None else cache.first[number], padded16(matrix.rows) // TILE_ROWS,
            fmt.tiled_bytes(TILE_ROWS, matrix.columns), *more,
        ]  # fmt: skip
        step = Step(f"clusters_{name}", slots, True, f"{name} of clusters {index}")
        return replace(step, calls=call)
