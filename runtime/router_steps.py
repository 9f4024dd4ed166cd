"""Steps of the routers of mixtures: their logits."""

from __future__ import annotations

from headrace.families.decoder import Decoder, Experts, Layer
from headrace.plan import Mode
from headrace.product_steps import ProductSteps
from headrace.step import Places, Step


class RouterSteps:
    """The routers of a decoder's mixtures, which are numbered from 0."""

    def __init__(self, decoder: Decoder, places: Places, products: ProductSteps) -> None:
        self._decoder = decoder
        self._places = places
        self._p = products
        self._layers = list(decoder.mixtures())

    def at(self, number: int) -> tuple[Layer, Experts]:
        """The layer of a mixture, and the mixture."""
        layer = self._decoder.layers[self._layers[number]]
        assert isinstance(layer.feed_forward, Experts)
        return layer, layer.feed_forward

    def chosen(self, number: int) -> int:
        """Address of what tokens have chosen of a mixture."""
        return self._places.buffer(f"chosen{number}", False)

    def logits(self, mode: Mode, f: Experts, name: str, mapped: bool) -> list[Step]:
        """A router's logits; the input lies ready. With `mapped`, in the buffer "router_map" what
        the last mixture's logits add to them."""
        if f.router_out is None:
            steps = self._p.products(mode, {name: f.router})
        else:
            steps = [
                *self._p.products(mode, {"router_hidden": f.router}),
                *self._p.input(mode, "tanh", "router_hidden", "", f.router_out),
                *self._p.products(mode, {name: f.router_out}),
            ]
        if f.router_map is not None and mapped:
            steps += [
                *self._p.input(mode, "copy", "router_logits", "", f.router_map),
                *self._p.products(mode, {"router_map": f.router_map}),
            ]
        return steps
