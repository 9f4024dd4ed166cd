"""What a decoder-only language model is made of: data that plans and loaders read.

A family file turns the metadata of a model file into a `Decoder`; nothing here runs.
Names are GGUF's; shapes follow from the sizes and are checked when tensors are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.expert_tensors import as_matrix, expert_slice
from headrace.loaders.gguf import ModelFile, TensorInfo

Activation = Literal["silu", "gelu", "relu"]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns], columns being inputs."""

    name: str
    rows: int
    columns: int
    bias: str | None = None


@dataclass(frozen=True)
class Vector:
    """A vector of `size` floats: a norm weight or a bias; each (v + `plus`) * `times` is used.

    A tensor of several `rows` is read row after row.
    """

    name: str
    size: int
    plus: float = 0.0
    times: float = 1.0
    rows: int = 1

    @property
    def key(self) -> str:
        """What it is called in memory, where a tensor may be more than one vector."""
        return self.name if self.times == 1.0 else f"{self.name} x {self.times}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its tensor."""
        return (self.size,) if self.rows == 1 else (self.rows, self.size // self.rows)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: position * base**(-2i / width) / (factor * factors[i]).

    `factors` names a tensor of width / 2 divisors (Llama 3's scaling), if there is one; else
    `divisors` may have them.
    """

    base: float
    width: int
    factor: float = 1.0
    factors: str | None = None
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Causal attention with grouped KV heads."""

    heads: int
    kv_heads: int
    head: int
    scale: float
    rope: Rope
    paired: bool
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    window: int = 0
    soft_cap: float = 0.0
    query_norm: Vector | None = None
    key_norm: Vector | None = None
    norm_together: bool = False  # over all heads, not over each


@dataclass(frozen=True)
class FeedForward:
    """down(activation(gate(x)) * up(x)); without a gate down(activation(up(x)))."""

    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: Activation

    @property
    def inner(self) -> int:
        """Values between up and down."""
        return self.up.rows

    @property
    def producer(self) -> str:
        """The kernels that make what down reads (`headrace.kernels.prepare`)."""
        return self.activation if self.gate is not None else f"{self.activation}_alone"

    def readers(self) -> tuple[Matrix, ...]:
        """What reads the same as the whole: gate, if there is one, and up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def matrices(self) -> Iterator[Matrix]:
        """In the order in which a pass reads them."""
        yield from (*self.readers(), self.down)


@dataclass(frozen=True)
class ZeroComputation:
    """An expert without a feed-forward (MoE++, 2410.07348): 0; x; or a[0] x + a[1] `constant`.

    The two numbers a are the softmax of `mix` times x; `mix` [2, width] is there row after row.
    """

    kind: Literal["zero", "copy", "constant"]
    mix: Vector | None = None
    constant: Vector | None = None

    def matrices(self) -> Iterator[Matrix]:
        """None: nothing of it is multiplied or streamed."""
        yield from ()

    def vectors(self) -> Iterator[Vector]:
        """What it reads; small, so that it stays in memory."""
        yield from (one for one in (self.mix, self.constant) if one is not None)


@dataclass(frozen=True)
class Experts:
    """Feed-forwards of which a router chooses a few for each token: a mixture of experts.

    The sum of the chosen ones (and `shared`, which all tokens take), each times its weight: the
    softmax of the router's logits over all, or over the chosen ones, or over those of them that are
    not the last expert, which is zero and has no weight ("counted"), or just one.

    Attributes:
        router: logits of experts [experts, width]; with `router_out` [hidden, width].
        each: the experts, first those with feed-forwards, which differ in their weights only.
        active: how many are chosen: those of the largest logits, of equal ones the first.
        shared_gate: of whose one row the sigmoid is the weight of `shared` (without: 1).
        router_out: the router's second layer [experts, hidden], behind a tanh.
        router_map: what it is multiplied by [experts, experts] is the logits of the mixture before;
            that is added to the router's.
        input_scale: what experts read is the norm's output times this; routers read that itself.
    """

    router: Matrix
    each: tuple[FeedForward | ZeroComputation, ...]
    active: int
    weighting: Literal["all", "chosen", "counted", "one"]
    shared: FeedForward | None = None
    shared_gate: Matrix | None = None
    router_out: Matrix | None = None
    router_map: Matrix | None = None
    input_scale: float = 1.0

    @property
    def computed(self) -> tuple[FeedForward, ...]:
        """The experts with feed-forwards, which come first."""
        return tuple(one for one in self.each if isinstance(one, FeedForward))

    @property
    def idle(self) -> tuple[ZeroComputation, ...]:
        """The others."""
        return tuple(one for one in self.each if isinstance(one, ZeroComputation))

    @property
    def producer(self) -> str:
        """Of all feed-forwards."""
        return self.computed[0].producer

    @property
    def inner(self) -> int:
        """Values between gate and down, at most."""
        return max(self.computed[0].inner, 0 if self.shared is None else self.shared.inner)

    def routers(self) -> Iterator[Matrix]:
        """What says which experts a token takes, and how much of the shared one."""
        yield self.router
        for one in (self.shared_gate, self.router_out, self.router_map):
            if one is not None:
                yield one

    def readers(self) -> Iterator[Matrix]:
        """What reads every token's normalised activations."""
        yield self.router
        if self.shared_gate is not None:
            yield self.shared_gate
        if self.shared is not None:
            yield from self.shared.readers()

    def expert_matrices(self) -> Iterator[Matrix]:
        """Those of the experts, one after the other."""
        for one in self.each:
            yield from one.matrices()

    def matrices(self) -> Iterator[Matrix]:
        """In the order in which a pass reads them, expert by expert."""
        yield from self.readers()
        yield from (one for one in (self.router_out, self.router_map) if one is not None)
        if self.shared is not None:
            yield self.shared.down
        yield from self.expert_matrices()


@dataclass(frozen=True)
class Cluster:
    """Neurons that are brought together: rows of up, columns of down."""

    up: Matrix
    down: Matrix

    def matrices(self) -> Iterator[Matrix]:
        """In the order in which a pass reads them."""
        yield from (self.up, self.down)


@dataclass(frozen=True)
class NeuronClusters:
    """down(relu(gate(x)) * up(x)), up and down cut into clusters of equal size.

    A neuron fires where its gate is above 0; a cluster of which none does adds nothing, and is
    left out. Row i of `gate` is row i % n of up of cluster i // n, where clusters have n neurons.
    """

    gate: Matrix
    each: tuple[Cluster, ...]

    activation: Activation = "relu"

    @property
    def inner(self) -> int:
        """Values between gate and down."""
        return self.gate.rows

    @property
    def producer(self) -> str:
        """The kernel that makes what down reads."""
        return self.activation

    @property
    def computed(self) -> tuple[Cluster, ...]:
        """Those that have weights: all."""
        return self.each

    @property
    def size(self) -> int:
        """Neurons of a cluster."""
        return self.inner // len(self.each)

    def expert_matrices(self) -> Iterator[Matrix]:
        """Those of the clusters, one after the other: what is brought as experts are."""
        for one in self.each:
            yield from one.matrices()

    def matrices(self) -> Iterator[Matrix]:
        """In the order in which a pass reads them."""
        yield self.gate
        yield from self.expert_matrices()


@dataclass(frozen=True)
class Layer:
    """One block: norm, attention, (norm,) add; norm, feed-forward, (norm,) add."""

    attention_norm: Vector
    attention: Attention
    attention_post_norm: Vector | None
    feed_forward_norm: Vector
    feed_forward: FeedForward | Experts | NeuronClusters
    feed_forward_post_norm: Vector | None

    @property
    def expert_norm(self) -> Vector:
        """The norm's weights that make what experts of a mixture read."""
        f = self.feed_forward
        scale = f.input_scale if isinstance(f, Experts) else 1.0
        return replace(self.feed_forward_norm, times=self.feed_forward_norm.times * scale)


@dataclass(frozen=True)
class Decoder:
    """A whole model. `embedding` and `head` may be the same matrix."""

    architecture: str
    width: int
    vocabulary: int
    context: int
    eps: float
    embedding: Matrix
    embedding_scale: float
    layers: tuple[Layer, ...]
    norm: Vector
    head: Matrix
    soft_cap: float = 0.0

    def mixtures(self) -> dict[int, Experts]:
        """The mixtures of experts, by layer."""
        found = ((i, layer.feed_forward) for i, layer in enumerate(self.layers))
        return {i: one for i, one in found if isinstance(one, Experts)}

    def clustered(self) -> dict[int, NeuronClusters]:
        """The feed-forwards cut into clusters of neurons, by layer."""
        found = ((i, layer.feed_forward) for i, layer in enumerate(self.layers))
        return {i: one for i, one in found if isinstance(one, NeuronClusters)}

    def in_parts(self) -> list[Experts | NeuronClusters]:
        """The feed-forwards of which tokens take some parts, which may be brought when wanted."""
        found = (layer.feed_forward for layer in self.layers)
        return [one for one in found if not isinstance(one, FeedForward)]

    @property
    def widest_input(self) -> int:
        """The most values that a matrix, or clusters together, read of a token."""
        inner = [one.inner for one in self.clustered().values()]
        return max([*inner, *(m.columns for m in self.matrices())])

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix once, in the order in which a pass reads them; the head last."""
        if self.embedding.name != self.head.name:
            yield self.embedding
        for layer in self.layers:
            a = layer.attention
            yield from (a.query, a.key, a.value, a.output)
            yield from layer.feed_forward.matrices()
        yield self.head

    def vectors(self) -> Iterator[Vector]:
        """Every vector: norms, then biases of matrices, then rope factors."""
        ropes = set()
        for layer in self.layers:
            yield layer.attention_norm
            yield layer.feed_forward_norm
            a, f = layer.attention, layer.feed_forward
            if isinstance(f, Experts):
                yield layer.expert_norm
                for one in f.idle:
                    yield from one.vectors()
            for extra in (
                layer.attention_post_norm,
                layer.feed_forward_post_norm,
                a.query_norm,
                a.key_norm,
            ):
                if extra is not None:
                    yield extra
            if a.rope.factors is not None:
                ropes.add(Vector(a.rope.factors, a.rope.width // 2))
        yield self.norm
        for matrix in self.matrices():
            if matrix.bias is not None:
                yield Vector(matrix.bias, matrix.rows)
        yield from ropes


def tensor_of(model: ModelFile, wanted: Matrix | Vector) -> TensorInfo:
    """The tensor that a matrix or vector names, its shape checked.

    Raises:
        ModelFileError: it is missing or has another shape.
        UnsupportedError: the file has a scale for all of the tensor, and it is not NVFP4.
    """
    info = model.tensors.get(wanted.name) or expert_slice(model, wanted.name)
    if info is None:
        raise ModelFileError(
            "the model file lacks this tensor; it is incomplete or of another architecture",
            path=model.paths[0],
            tensor=wanted.name,
        )
    info = as_matrix(info)
    shape = (wanted.rows, wanted.columns) if isinstance(wanted, Matrix) else wanted.shape
    if info.shape != shape:
        raise ModelFileError(
            f"has shape {list(info.shape)}, but the metadata call for {list(shape)}",
            path=info.path,
            tensor=info.name,
            offset=info.offset,
        )
    for scale in (f"{wanted.name.removesuffix('.weight')}.scale", f"{wanted.name}.scale"):
        if scale in model.tensors and info.scales is None:
            raise UnsupportedError(
                f"is to be multiplied by another tensor, {scale}, which Headrace does not do; "
                "convert the model to another type, for example to Q8_0",
                path=info.path,
                tensor=info.name,
                offset=info.offset,
            )
    return info


def rope_table(rope: Rope, factors: np.ndarray | None, positions: int) -> np.ndarray:
    """float32 [positions, width]: cosines of width / 2 angles, then their sines.

    Raises:
        ModelFileError: a factor is zero, negative or no number.
    """
    half = rope.width // 2
    frequency = rope.base ** -(np.arange(half, dtype=np.float64) * 2 / rope.width) / rope.factor
    if factors is not None:
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ModelFileError("rope factors must be positive numbers", tensor=rope.factors)
        frequency = frequency / factors.astype(np.float64)
    if rope.divisors:
        frequency = frequency / np.array(rope.divisors)
    angle = np.arange(positions, dtype=np.float64)[:, None] * frequency
    table = np.empty((positions, rope.width), np.float32)
    table[:, :half] = np.cos(angle)
    table[:, half:] = np.sin(angle)
    return table
