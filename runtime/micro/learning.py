"""How a network learns on a chip: which layers of it, by which loss, how fast."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from headrace.errors import UnsupportedError
from headrace.micro.kernels.learning import LEAST_SCALE, MOST_SCALE
from headrace.micro.network import Convolution, Depthwise, Layer, MicroNetwork, Softmax

Loss = Literal["cross entropy", "squares"]
WEIGHTS, BIAS = "weights", "bias"
SCALE = 128.0  # of the loss, so that gradients of halves do not vanish


@dataclass(frozen=True)
class Trained:
    """What of a layer is trained."""

    weights: bool = True
    bias: bool = True

    def __or__(self, other: Trained) -> Trained:
        """What either of two says."""
        return Trained(self.weights or other.weights, self.bias or other.bias)


@dataclass(frozen=True)
class Learning:
    """How a network learns.

    Attributes:
        trained: what is, by the name of its layer.
        rate, momentum: of gradient descent: v = momentum v + gradient; weights -= rate v.
        loss: of probabilities, behind a softmax, or half the mean of squared differences.
        scale: of the loss at the begin, a power of two. Where a gradient is not finite, nothing is
            updated, and the scale is halved.
        good_steps: after which the scale is doubled; None: it never is.
        at_once: each gradient is used as soon as it is there, and forgotten, which takes less SRAM:
            then a step that overflows is skipped from the first such gradient on, but layers behind
            it are updated already.

    Raises:
        ValueError: a number makes no sense.
    """

    trained: Mapping[str, Trained]
    rate: float
    momentum: float = 0.0
    loss: Loss = "cross entropy"
    scale: float = 1.0
    good_steps: int | None = None
    at_once: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"a rate of {self.rate}: a positive number is wanted")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"a momentum of {self.momentum}: a number from 0 to below 1 is wanted")
        if self.loss not in get_args(Loss):
            raise ValueError(f"a loss of {self.loss!r}: one of {', '.join(get_args(Loss))}")
        if math.frexp(self.scale)[0] != 0.5 or not LEAST_SCALE <= self.scale <= MOST_SCALE:
            raise ValueError(
                f"a loss scale of {self.scale}: a power of two from {LEAST_SCALE:g} to "
                f"{MOST_SCALE:g} is wanted"
            )
        if self.good_steps is not None and self.good_steps < 1:
            raise ValueError(f"{self.good_steps} good steps: at least 1 is wanted")


def usual_loss(network: MicroNetwork) -> Loss:
    """Cross entropy of probabilities, squares of anything else."""
    return "cross entropy" if isinstance(network.layers[-1], Softmax) else "squares"


def with_weights(network: MicroNetwork) -> list[Convolution | Depthwise]:
    """Layers that can be trained, in order."""
    return [one for one in network.layers if isinstance(one, Convolution | Depthwise)]


def last_layers(network: MicroNetwork, count: int) -> dict[str, Trained]:
    """The last layers that have weights, to be trained.

    Raises:
        ValueError: it has not so many.
    """
    found = with_weights(network)
    if not 0 < count <= len(found):
        raise ValueError(f"the last {count} layers: {len(found)} have weights")
    return {one.name: Trained() for one in found[-count:]}


def layers_named(network: MicroNetwork, text: str) -> dict[str, Trained]:
    """What a text says is trained.

    Args:
        text: a number (of the last layers), or layers, such as `conv3,fc`, by their names or parts
            of these that no other layer with weights has; behind a name may stand `:weights` or
            `:bias`, as in `conv3:bias,fc`: then only these are trained.

    Raises:
        ValueError: there is no such layer, several, or nothing is named.
    """
    if re.fullmatch(r"[0-9]+", text):
        return last_layers(network, int(text))
    layers, found = with_weights(network), dict[str, Trained]()
    for part in text.split(","):
        name, _, what = part.rpartition(":")
        if what not in (WEIGHTS, BIAS):
            name, what = part, ""
        layer = _named(layers, name)
        known = found.get(layer.name, Trained(False, False))
        found[layer.name] = known | Trained(what in ("", WEIGHTS), what in ("", BIAS))
    return found


def _named(layers: list[Convolution | Depthwise], text: str) -> Layer:
    exact = [one for one in layers if one.name == text]
    found = exact or [one for one in layers if text and text in one.name]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(short_names(layers).values())
    raise ValueError(
        f"{text!r} is {'part of the names of several layers' if found else 'no layer'} with "
        f"weights; there are {shown}"
    )


def short_names(layers: list[Convolution | Depthwise]) -> dict[str, str]:
    """Of each layer, by its name, the shortest part of that which no other one's has."""
    names = [one.name for one in layers]
    return {
        name: min(
            (part for part in _parts(name) if sum(part in other for other in names) == 1),
            key=len,
            default=name,
        )
        for name in names
    }


def _parts(name: str) -> Iterator[str]:
    """Words of a name, and words with slashes between them; none that `layers_named` would cut."""
    for piece in re.split(r"[ ;,:]", name):
        words = piece.split("/")
        for first in range(len(words)):
            for last in range(first + 1, len(words) + 1):
                part = "/".join(words[first:last])
                if part and not part.isdigit():
                    yield part


def together(*of: Mapping[str, Trained]) -> dict[str, Trained]:
    """All that any of these says."""
    found = dict[str, Trained]()
    for one in of:
        for name, what in one.items():
            found[name] = found.get(name, what) | what
    return found


def what_is_trained(network: MicroNetwork, trained: Mapping[str, Trained]) -> list[str]:
    """The same as text, layer by layer, as `layers_named` reads it."""
    known = short_names(with_weights(network))
    suffixes = {(True, True): "", (True, False): f":{WEIGHTS}", (False, True): f":{BIAS}"}
    return [
        known.get(name, name) + suffixes[one.weights, one.bias]
        for name, one in trained.items()
        if one.weights or one.bias
    ]


def check_trained(network: MicroNetwork, trained: Mapping[str, Trained]) -> None:
    """That layers of these names have something to train.

    Raises:
        UnsupportedError: one does not, or nothing is named.
    """
    known = {layer.name for layer in with_weights(network)}
    if not trained:
        raise UnsupportedError("nothing is trained: name a layer")
    for name, what in trained.items():
        if name not in known:
            raise UnsupportedError(f"{name}: there is no layer of weights of this name to train")
        if not (what.weights or what.bias):
            raise UnsupportedError(f"{name}: neither its weights nor its bias are trained")
