"""Steps that ask ahead for experts of later mixtures, before these have chosen them."""

from __future__ import annotations

from dataclasses import replace

from headrace.families.decoder import Decoder, Experts
from headrace.offload.recall import Recall
from headrace.placing import padded16
from headrace.plan import ONE, ZERO, Mode
from headrace.product_steps import ProductSteps
from headrace.router_steps import RouterSteps
from headrace.sparse.format import TILE_ROWS
from headrace.sparse.linear import activation_bytes
from headrace.step import CachePlaces, Places, Step


class AheadSteps:
    """What predicts, of a decoder whose experts do not all have room."""

    def __init__(
        self, decoder: Decoder, places: Places, products: ProductSteps, router: RouterSteps
    ) -> None:
        self._decoder = decoder
        self._places = places
        self._p = products
        self._router = router
        self._layers = list(decoder.mixtures())

    def steps(self, mode: Mode, number: int, cache: CachePlaces) -> list[Step]:
        """Ask ahead for what later mixtures are expected to choose."""
        if cache.recall is not None:
            return self._recalled(number, cache, cache.recall)
        return [] if cache.predictor == "none" else self._pre_gated(mode, number, cache)

    def _recalled(self, number: int, cache: CachePlaces, tables: Recall) -> list[Step]:
        """What mixtures have chosen after what this one and the one before it have.

        Behind the last one comes the first one of the next token.
        """
        count = len(self._layers)
        later, earlier = (number + 1) % count, (number - 1) % count
        one, before, next_one = (
            self._decoder.mixtures()[self._layers[i]] for i in (number, earlier, later)
        )
        scores, zero = self._places.buffer("ahead1", False), self._p.word(ZERO)
        slots = [
            scores, tables.width, tables.address(later), self._router.chosen(number),
            one.active, self._router.chosen(earlier) if tables.both else zero,
            before.active if tables.both else 1, tables.experts,
        ]  # fmt: skip
        return [
            Step("experts_recall", slots, False, f"recall experts {later}"),
            self._predict(later, 1, 0, scores, next_one, cache),
        ]

    def _pre_gated(self, mode: Mode, number: int, cache: CachePlaces) -> list[Step]:
        """What the next mixtures will choose, by what this one reads.

        Routers that were fitted to that say it, or else those that will choose.
        """
        within = self._later(number, cache.look_ahead)
        found = ((m, d, self._fitted(mode, m, d, cache)) for m, d in within.items())
        fitted = {m: (d, *addresses) for m, d, addresses in found if addresses is not None}
        # Routers themselves say nothing of the next token, and what the logits in between add to
        # those of a later one nobody knows yet.
        later = {
            m: d for m, d in within.items()
            if m in fitted or (m > number and (d == 1 or self._router.at(m)[1].router_map is None))
        }  # fmt: skip
        steps: list[Step] = []
        if fitted:
            norm = self._decoder.layers[self._layers[max(0, number)]].feed_forward_norm
            width, weight = self._decoder.width, self._p.vector(norm)
            steps.append(self._p.prepare(mode, "norm", "f32", "x", "", width, weight))
        for m, of_fitted in fitted.items():
            steps.append(self._early(mode, m, *of_fitted))
        for m, distance in later.items():
            if m in fitted:
                continue
            layer, f = self._router.at(m)
            steps += self._p.norm(mode, layer.feed_forward_norm, None, [f.router])
            steps += self._router.logits(mode, f, f"ahead{distance}", number >= 0)
            # The next router writes where the second layer of this one may be reading.
            steps[-1] = replace(steps[-1], barrier=f.router_out is not None)
        steps[-1:] = [replace(step, barrier=True) for step in steps[-1:]]
        for m, distance in later.items():
            scores, f = self._p.address(mode, f"ahead{distance}"), self._router.at(m)[1]
            claims = distance - 1 if m > number else distance - 2
            mapped = f.router_map is not None and number >= 0 and m not in fitted
            more = self._p.address(mode, "router_map") if mapped else 0
            steps.append(self._predict(m, distance, claims, scores, f, cache, more))
        return steps

    def _later(self, number: int, look_ahead: int) -> dict[int, int]:
        """The next mixtures and how far they are, those of the next token behind its embedding."""
        count = len(self._layers)
        found = {}
        for distance in range(1, look_ahead + 1):
            place = number + distance
            if place < count:
                found[place] = distance
            elif count < place <= count + number:
                found[place - count - 1] = distance
        return found

    def _fitted(
        self, mode: Mode, number: int, distance: int, cache: CachePlaces
    ) -> tuple[int, int] | None:
        if self._p.kinds(mode, [self._router.at(number)[1].router]) != ["f32"]:
            return None  # nothing makes such inputs
        return cache.router_ahead(number, distance)

    def _early(self, mode: Mode, number: int, distance: int, weights: int, bias: int) -> Step:
        """What a fitted router says of a mixture; its input lies ready."""
        _, f = self._router.at(number)
        name, n_bytes = f"ahead{distance}", activation_bytes("f32", f.router.columns)
        slots = [
            weights, self._p.address(mode, "input_f32"), self._p.address(mode, name),
            f.router.columns, padded16(len(f.each)) // TILE_ROWS, self._p.word(ONE),
            self._p.private_bytes("f32"), self._p.row_bytes(name), bias, n_bytes,
        ]  # fmt: skip
        return Step("gemv_f16", slots, False, f"fitted router {number}")

    def _predict(
        self, later: int, distance: int, claims: int, scores: int, f: Experts, cache: CachePlaces,
        more: int = 0,
    ) -> Step:  # fmt: skip
        """Ask for what scores are highest of; so many mixtures claim theirs before."""
        slots = [
            cache.address, scores, len(f.each), cache.predictions_address(later, distance),
            cache.ranks, cache.first[later], later, claims, more,
        ]  # fmt: skip
        return Step("experts_predict", slots, False, f"predict experts {later}")
