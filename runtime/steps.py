"""A decoder's forward pass as a flat list of kernel calls, at addresses that somebody else decides.

`headrace.programs` places them in this process, `headrace.standalone` in an executable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.cluster_steps import ClusterSteps
from headrace.families.decoder import Decoder, Experts, Layer, NeuronClusters, Vector
from headrace.kernels import kv_cache
from headrace.mixture_steps import MixtureSteps
from headrace.placing import Placed, dense
from headrace.plan import (
    COUNT,
    ONE,
    POSITION,
    ZERO,
    Mode,
    Shape,
    chunk_bytes,
    head_chunk_bytes,
    n_chunks,
    ropes_of,
    scratch_bytes,
)
from headrace.product_steps import ProductSteps
from headrace.sparse.bitstack import BlockShape
from headrace.step import Places, Step
from headrace.targets.target import Target


class Forward:
    """The forward pass of a decoder for a target.

    Weights have the formats of `placed`, or are stacks of blocks of such shapes, by matrix name.
    """

    def __init__(
        self, decoder: Decoder, placed: Mapping[str, Placed], shape: Shape, places: Places,
        target: Target, stacked: Mapping[str, BlockShape] | None = None,
    ) -> None:  # fmt: skip
        self._decoder = decoder
        self._placed = placed
        self._shape = shape
        self._places = places
        self._p = ProductSteps(decoder, placed, shape, places, target, stacked or {})
        self._experts = MixtureSteps(decoder, placed, places, self._p)
        self._clusters = ClusterSteps(decoder, placed, places, self._p)
        # Asked for at every step: worked out once.
        self._rope_names = ropes_of(decoder)
        self._scratch_bytes = scratch_bytes(decoder)
        self._chunk_bytes = chunk_bytes(decoder)
        self._layer_offsets = [0]
        for layer in decoder.layers:
            size = 2 * layer.attention.kv_heads * head_chunk_bytes(layer)
            self._layer_offsets.append(self._layer_offsets[-1] + size)

    def steps(self, mode: Mode, resident: bool = False) -> list[Step]:
        """The calls of one of the modes of `headrace.plan.modes`.

        With `resident`, those blocks of a stack are left out that are streamed.
        """
        d = self._decoder
        self._p.resident = resident
        steps = [self._embed(mode), *self._experts.before_the_first(mode)]
        add: tuple[str, Vector | None] | None = None  # what the next norm adds to x first
        for i, layer in enumerate(d.layers):
            a, f = layer.attention, layer.feed_forward
            steps += self._p.norm(mode, layer.attention_norm, add, [a.query, a.key, a.value])
            steps += self._p.products(mode, {"q": a.query, "k": a.key, "v": a.value})
            if a.norm_together:
                steps += self._norm_rows(mode, {"q": a.query_norm, "k": a.key_norm})
            steps += self._attention(mode, i, layer)
            steps += self._p.input(mode, "copy", "attended", "", a.output)
            steps += self._p.products(mode, {"block": a.output})
            add = ("block", layer.attention_post_norm)
            if isinstance(f, Experts):
                steps += self._experts.steps(mode, i, add)
            elif isinstance(f, NeuronClusters):
                steps += self._clusters.steps(mode, i, add)
            else:
                steps += self._p.norm(mode, layer.feed_forward_norm, add, [*f.readers()])
                steps += self._p.gated(mode, f, "block")
            add = ("block", layer.feed_forward_post_norm)
        steps += self._p.norm(mode, d.norm, add, [d.head], last=True)
        steps += self._p.products(mode, {"logits": d.head}, last=True)
        return steps

    # --- what all layers have ---------------------------------------------------------------------

    def _norm_rows(self, mode: Mode, rows: Mapping[str, Vector | None]) -> list[Step]:
        """Normalise rows in place."""
        steps = []
        for name, norm in rows.items():
            if norm is None:
                continue
            at, n_bytes = self._p.address(mode, name), self._p.row_bytes(name)
            count = self._p.word(ONE if mode.private else COUNT)
            slots = [
                at, at, self._p.vector(norm), 0, at, norm.size, count, self._p.word(ZERO), n_bytes,
                n_bytes, n_bytes, 1, 0, 0, self._p.address(mode, "row"), self._p.row_bytes("row"),
                float(self._decoder.eps), 0,
            ]  # fmt: skip
            steps.append(Step("norm_f32", slots, False, f"norm of {name}"))
        steps[-1:] = [replace(step, barrier=True) for step in steps[-1:]]
        return steps

    def _embed(self, mode: Mode) -> Step:
        d = self._decoder
        placed = dense(self._placed[d.embedding.name])
        x_bytes = self._p.row_bytes("x")
        slots = [
            self._places.embedding(), self._p.address(mode, "x"),
            self._p.address(mode, "ids"), d.width // placed.format.block,
            self._p.word(ONE if mode.private else COUNT), x_bytes, x_bytes if mode.private else 0,
            float(d.embedding_scale), d.width, *self._p.unpacking(placed.format),
        ]  # fmt: skip
        return Step(f"rows_{placed.format.name}", slots, False, "embedding")

    def _attention(self, mode: Mode, index: int, layer: Layer) -> list[Step]:
        a = layer.attention
        stride = head_chunk_bytes(layer)
        keys = self._places.kv() + self._layer_offsets[index]

        def at(name: str) -> int:
            return self._p.address(mode, name)

        slots = [
            at("q"), at("k"), at("v"), keys, keys + a.kv_heads * stride,
            stride, stride, a.heads, a.kv_heads, a.head,
            a.rope.width, self._places.table(self._rope_names[a.rope]), a.rope.width * 4,
            int(a.paired),
            *(0 if a.norm_together else self._p.vector(one) for one in (a.query_norm, a.key_norm)),
            float(self._decoder.eps),
            float(a.scale), float(a.soft_cap), a.window, at("attended"), at("scratch"),
            self._scratch_bytes, at("partial"), at("counters"),
            self._p.word(POSITION), n_chunks(self._shape.context), self._p.word(COUNT),
            self._p.row_bytes("q"), self._p.row_bytes("k"), self._p.row_bytes("v"), at("rotated"),
            self._p.row_bytes("attended"), self._chunk_bytes, self._chunk_bytes,
        ]  # fmt: skip
        d = kv_cache.padded(a.head)
        return [
            Step(f"attention_{operation}_d{d}", slots, True, f"attention {operation} {index}")
            for operation in mode.attention
        ]
