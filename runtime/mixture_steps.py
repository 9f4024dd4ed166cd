"""Steps of mixtures of experts: in memory, or from a cache that brings them from flash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.ahead_steps import AheadSteps
from headrace.expert_layout import DOWN, GATE, UP, ExpertProducts, products_of
from headrace.families.decoder import Decoder, Experts, Layer, Matrix, Vector
from headrace.kernels import expert_visits, experts, zero_computation
from headrace.offload.expert_store import part_mask
from headrace.placing import Placed, PlacedMatrix, padded16
from headrace.plan import ACTIVE, COUNT, ONE, Mode
from headrace.product_steps import ProductSteps, gated_rows
from headrace.router_steps import RouterSteps
from headrace.sparse.format import TILE_ROWS
from headrace.sparse.linear import activation_bytes
from headrace.step import CachePlaces, Places, Step

WEIGHTS_SLOT, OUTPUT_SLOT, TILES_SLOT = 0, 2, 4  # of a product's argument block
WEIGHTING = {
    "all": experts.OVER_ALL, "chosen": experts.OVER_CHOSEN, "one": experts.ONE_EACH,
    "counted": experts.OVER_COUNTED,
}  # fmt: skip
_IDLE = {
    "zero": zero_computation.ZERO, "copy": zero_computation.COPY,
    "constant": zero_computation.CONSTANT,
}  # fmt: skip

Add = tuple[str, Vector | None]  # what a norm adds to x first


class MixtureSteps:
    """The feed-forwards of a decoder's layers that are mixtures of experts."""

    def __init__(
        self, decoder: Decoder, placed: Mapping[str, Placed], places: Places, products: ProductSteps
    ) -> None:
        self._decoder = decoder
        self._placed = placed
        self._places = places
        self._p = products
        self._router = RouterSteps(decoder, places, products)
        self._before = AheadSteps(decoder, places, products, self._router)
        self._layers = list(decoder.mixtures())  # of the mixtures, which are numbered like this
        # Where some choices have no products, how many have is said anew for each token.
        self._counted = any(one.idle for one in decoder.mixtures().values())
        self._products = [products_of(one, placed) for one in decoder.mixtures().values()]

    def before_the_first(self, mode: Mode) -> list[Step]:
        """What comes before the first layer: the first experts are asked for by the embedding."""
        cache = self._places.cache()
        if not mode.private or cache is None or cache.recall is not None:
            return []
        return self._before.steps(mode, -1, cache)

    def steps(self, mode: Mode, index: int, add: Add) -> list[Step]:
        """The feed-forward of a layer that is a mixture."""
        number = self._layers.index(index)
        layer, f = self._router.at(number)
        make = self._of_one if mode.private else self._of_chunk
        return [*make(mode, number, layer, f, add), self._combine(mode, index, f)]

    def _of_one(
        self, mode: Mode, number: int, layer: Layer, f: Experts, add: Add
    ) -> list[Step]:  # fmt: skip
        """The experts of the only token, side by side: `route` says where their weights lie."""
        products, cache = self._products[number], self._places.cache()
        gates, ups, downs = products.matrices
        readers = [*gates, *ups]
        # What predictions and a shared expert read lies where the norm's activations were, and so
        # does what a router's second layer reads.
        norm = layer.feed_forward_norm
        again = cache is not None or f.shared is not None or norm != layer.expert_norm
        again = again or f.router_out is not None or f.router_map is not None
        steps = self._p.norm(mode, norm, add, [*f.readers(), *(() if again else readers)])
        steps += self._routed(mode, number, f)
        if cache is not None:
            steps.append(self._claim(number, f, cache))
        route = len(steps) - 1
        steps += self._zero_computation(mode, number, layer, f)
        if cache is not None:
            steps += self._before.steps(mode, number, cache)
        if f.shared is not None:
            if cache is not None:
                steps += self._p.norm(mode, norm, None, [*f.shared.readers()])
            steps += self._p.gated(mode, f.shared, "shared")
        if again:
            steps += self._p.norm(mode, layer.expert_norm, None, readers)
        first: list[list[int]] = [[], [], []]  # step of the first product of gates, ups, downs
        waits: list[list[int]] = [[] for _ in range(f.active)]  # of each expert, for its matrices
        for k in range(f.active):
            for role, name in self._read_roles(products):
                if cache is not None:
                    waits[k].append(len(steps))
                    steps.append(self._await(number, role, cache))
                first[role].append(len(steps))
                width = self._p.row_bytes(name)
                y = self._p.address(mode, name) + k * width
                steps += self._visit(mode, products, role, self._p.word(ONE), y, width)
        steps[-1] = replace(steps[-1], barrier=True)
        steps += self._activated(mode, f, downs, self._p.word(ACTIVE))
        width = self._p.row_bytes("block")
        for k in range(f.active):
            if cache is not None:
                waits[k].append(len(steps))
                steps.append(self._await(number, DOWN, cache))
            first[DOWN].append(len(steps))
            y = self._p.address(mode, "outputs") + k * width
            steps += self._visit(mode, products, DOWN, self._p.word(ONE), y, width, k)
        steps[-1] = replace(steps[-1], barrier=True)
        writes: list[tuple[int, int]] = []
        for k in range(f.active):
            writes += self._pointed(products, [at[k] - route if at else 0 for at in first])
            if cache is not None:
                writes += [(first[DOWN][k] - route + i, OUTPUT_SLOT) for i in range(len(downs))]
                writes += [(at - route, 1) for at in waits[k]]
        table = 9 if cache is None else 5
        steps[route] = replace(steps[route], writes=tuple(writes), table=table)
        return steps

    def _of_chunk(self, mode: Mode, number: int, layer: Layer, f: Experts, add: Add) -> list[Step]:
        """Expert after expert, each for all tokens of the chunk that have chosen it."""
        products, cache = self._products[number], self._places.cache()
        gates, ups, downs = products.matrices
        visits = self._places.buffer("visits", False)
        tokens = visits + 8 * expert_visits.TOKENS
        norm = layer.feed_forward_norm
        steps = self._p.norm(mode, norm, add, list(f.readers()))
        steps += self._routed(mode, number, f)
        steps += self._zero_computation(mode, number, layer, f)
        if f.shared is not None:
            steps += self._p.gated(mode, f.shared, "shared")
        order = self._places.buffer("order", False)
        slots = [
            self._router.chosen(number), len(f.each), f.active, self._p.word(COUNT), order, visits,
            len(f.computed),
        ]  # fmt: skip
        steps.append(Step("experts_group", slots, True, f"group tokens {number}"))
        begin = len(steps)
        if cache is None:
            slots = [visits, self._places.directory(number), 0, products.count]
        else:
            slots = [
                visits, cache.address, 0, products.count, cache.first[number], number,
                self._places.directory(number), len(f.each), self._p.word(COUNT),
            ]  # fmt: skip
        kernel = "experts_pick" if cache is None else "experts_visit"
        steps.append(Step(kernel, slots, True, f"pick expert {number}"))
        x, picked = self._p.address(mode, "x"), self._p.address(mode, "picked")
        slots = [visits, order, x, self._p.row_bytes("x"), picked, f.active]
        steps.append(Step("experts_gather", slots, True, f"gather tokens {number}"))
        weight = self._p.vector(layer.expert_norm)
        steps += [
            self._p.prepare(
                mode, "norm", kind, "picked", "", self._decoder.width, weight, tokens=tokens
            )
            for kind in self._p.kinds(mode, [*gates, *ups])
        ]
        first = [0, 0, 0]
        for role, name in self._read_roles(products):
            first[role] = len(steps) - begin
            y = self._p.address(mode, name)
            steps += self._visit(mode, products, role, tokens, y, self._p.row_bytes(name))
        steps[-1] = replace(steps[-1], barrier=True)
        steps += self._activated(mode, f, downs, tokens)
        first[DOWN] = len(steps) - begin
        block, width = self._p.address(mode, "block"), self._p.row_bytes("block")
        steps += self._visit(mode, products, DOWN, tokens, block, width)
        steps[-1] = replace(steps[-1], barrier=True)
        slots = [visits, order, block, width, self._p.address(mode, "outputs")]
        loop = visits + 8 * expert_visits.LEFT, len(steps) - begin + 1
        label = f"outputs of an expert {number}"
        steps.append(Step("experts_scatter", slots, True, label, loop=loop))
        writes = tuple(self._pointed(products, first))
        steps[begin] = replace(steps[begin], writes=writes, table=2)
        return steps

    @staticmethod
    def _read_roles(products: ExpertProducts) -> list[tuple[int, str]]:
        """What reads an expert's input, and the buffer of what comes out."""
        both = ((GATE, "gate"), (UP, "up"))
        return [(role, name) for role, name in both if products.matrices[role]]

    def _pointed(self, products: ExpertProducts, first: list[int]) -> list[tuple[int, int]]:
        """The slots that `headrace.kernels.experts.point` writes, of products from steps on."""
        return [
            (first[role] + i, slot)
            for role, matrices in enumerate(products.matrices)
            for i in range(len(matrices))
            for slot in (WEIGHTS_SLOT, TILES_SLOT)
        ]

    def _claim(self, number: int, f: Experts, cache: CachePlaces) -> Step:
        products = self._products[number]
        slots = [
            cache.address, self._router.chosen(number), f.active, cache.first[number],
            number, 0, self._places.directory(number), self._places.buffer("outputs", False),
            self._p.row_bytes("block"), cache.predictions_address(number, 1),
            cache.look_ahead, products.count, len(products.matrices[DOWN]), len(f.each),
            cache.ranks, self._p.word(ACTIVE) if self._counted else 0,
            len(self._read_roles(products)) + 1,
        ]  # fmt: skip
        return Step("experts_claim", slots, True, f"claim experts {number}")

    def _await(self, number: int, role: int, cache: CachePlaces) -> Step:
        """Wait for a matrix of an expert that another step names.

        Products need not wait for what is read behind it; so when the last bytes have come, one
        down is left to be multiplied by, and what others read is computed meanwhile.
        """
        slots = [cache.address, 0, part_mask(role)]
        return Step("experts_await", slots, False, f"wait for an expert {number}")

    def _routed(self, mode: Mode, number: int, f: Experts) -> list[Step]:
        """Which experts tokens take, and what of a shared expert's gate there is."""
        gate = {} if f.shared_gate is None else {"shared_gate": f.shared_gate}
        kept = self._p.address(mode, "router_logits") if self._keeps(number) else 0
        at_once = mode.private and self._places.cache() is None
        slots = [
            self._p.address(mode, "router"), self._p.row_bytes("router"), len(f.each), f.active,
            WEIGHTING[f.weighting], self._router.chosen(number),
            self._places.buffer("chosen_weights", False),
            self._p.word(ONE if mode.private else COUNT),
            self._places.directory(number) if at_once else 0, 0, self._products[number].count,
            self._p.address(mode, "router_map") if f.router_map is not None else 0, kept,
            self._p.word(ACTIVE) if at_once and self._counted else 0,
        ]  # fmt: skip
        return [
            *(replace(s, barrier=False) for s in (self._p.products(mode, gate) if gate else ())),
            *self._router.logits(mode, f, "router", True),
            Step("experts_route", slots, True, f"choose experts {number}"),
        ]

    def _keeps(self, number: int) -> bool:
        """Whether the next mixture wants to know this one's logits."""
        later = number + 1
        return later < len(self._layers) and self._router.at(later)[1].router_map is not None

    def _zero_computation(self, mode: Mode, number: int, layer: Layer, f: Experts) -> list[Step]:
        """The outputs of choices that have no products."""
        if not f.idle:
            return []
        slots: list[int | float] = [
            self._router.chosen(number), f.active, len(f.computed),
            self._p.word(ONE if mode.private else COUNT), self._p.address(mode, "x"),
            self._p.row_bytes("x"), self._p.vector(layer.expert_norm), self._decoder.width,
            float(self._decoder.eps), self._p.address(mode, "outputs"),
            self._p.row_bytes("block"),
        ]  # fmt: skip
        for one in f.idle:
            slots += [_IDLE[one.kind], self._p.vector(one.mix), self._p.vector(one.constant)]
        label = f"experts without products {number}"
        return [Step("experts_zero_computation", slots, False, label)]

    def _activated(
        self, mode: Mode, f: Experts, downs: tuple[Matrix, ...], tokens: int
    ) -> list[Step]:
        """What downs read, of as many rows as the word `tokens` has."""
        n = downs[0].columns
        return [
            self._p.prepare(mode, f.producer, kind, *gated_rows(f.computed[0]), n, tokens=tokens)
            for kind in self._p.kinds(mode, list(downs))
        ]

    def _visit(
        self, mode: Mode, products: ExpertProducts, role: int, count: int, y: int, y_bytes: int,
        row: int = 0,
    ) -> list[Step]:  # fmt: skip
        """The products of gates, ups or downs by an expert that another step points them at.

        Inputs are the `row`-th and what follows, the same ones for all threads but those of norms.
        """
        steps = []
        for matrix in products.matrices[role]:
            placed = self._placed[matrix.name]
            assert isinstance(placed, PlacedMatrix)
            fmt, kind = placed.format, mode.kind(placed.format.activation)
            own = mode.private and role != DOWN
            n_bytes = activation_bytes(kind, matrix.columns)
            slots = [
                0, self._p.address(mode, f"input_{kind}") + row * n_bytes, y,
                matrix.columns // fmt.block, padded16(matrix.rows) // TILE_ROWS, count,
                self._p.private_bytes(kind) if own else 0, y_bytes, self._p.address(mode, "zeros"),
                n_bytes * mode.group(kind), *self._p.unpacking(fmt),
            ]  # fmt: skip
            kernel = f"{mode.operation(fmt.activation)}_{fmt.name}"
            steps.append(Step(kernel, slots, False, matrix.name, placed.n_bytes))
        return steps

    def _combine(self, mode: Mode, index: int, f: Experts) -> Step:
        shared, gated = f.shared is not None, f.shared_gate is not None
        slots = [
            self._p.address(mode, "outputs"), self._p.row_bytes("block"),
            self._places.buffer("chosen_weights", False), f.active,
            self._p.word(ONE if mode.private else COUNT), self._p.address(mode, "block"),
            self._p.row_bytes("block"), self._decoder.width,
            self._p.address(mode, "shared") if shared else 0, self._p.row_bytes("shared"),
            self._p.address(mode, "shared_gate") if gated else 0, self._p.row_bytes("shared_gate"),
        ]  # fmt: skip
        return Step("experts_combine", slots, True, f"add experts {index}")
