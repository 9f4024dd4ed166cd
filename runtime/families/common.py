"""What the families share: reading sizes, naming a block's tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families.decoder import (
    Activation,
    Attention,
    Decoder,
    Experts,
    FeedForward,
    Layer,
    Matrix,
    Rope,
    Vector,
    tensor_of,
)
from headrace.loaders.expert_tensors import MAX_EXPERTS, expert_name, whole_name
from headrace.loaders.gguf import ModelFile

# Far above any known model: a hostile header must not make us build millions of layers.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_CONTEXT = 1 << 28
MAX_ACTIVE = 16  # experts of a token, as many as a short chunk has tokens


@dataclass(frozen=True)
class Sizes:
    """The numbers that every decoder has, from `<architecture>.*` metadata.

    `norm_offset` is what the file's weights of norms lack: 1 in Gemma's own files, where norms
    multiply by 1 + w; in GGUF files it has been added.
    """

    prefix: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    rotated: int
    context: int
    vocabulary: int
    eps: float
    norm_offset: float


def read_sizes(model: ModelFile, prefix: str) -> Sizes:
    """Sizes of a model whose keys start with `prefix`.

    Raises:
        ModelFileError: a key is missing, out of bounds or contradicts another.
        UnsupportedError: layers differ in their sizes.
    """
    layers = model.get(f"{prefix}.block_count", int, low=1, high=MAX_LAYERS)

    def uniform(key: str, default: int | None = None) -> int:
        values = model.get_per_layer(f"{prefix}.{key}", layers, default, low=1, high=MAX_WIDTH)
        if len(set(values)) > 1:
            raise UnsupportedError(
                f"{prefix}.{key} differs from layer to layer; such models are not supported",
                path=model.paths[0],
            )
        return values[0]

    width = model.get(f"{prefix}.embedding_length", int, low=1, high=MAX_WIDTH)
    heads = uniform("attention.head_count")
    kv_heads = uniform("attention.head_count_kv", heads)
    head = model.get(f"{prefix}.attention.key_length", int, width // heads, low=1, high=4096)
    value = model.get(f"{prefix}.attention.value_length", int, head, low=1, high=4096)
    rotated = model.get(f"{prefix}.rope.dimension_count", int, head, low=0, high=4096)
    for problem, wrong in (
        (f"{heads} heads do not divide among {kv_heads} KV heads", heads % kv_heads != 0),
        (f"keys of {head} and values of {value} differ", head != value),
        (f"{rotated} rotated of {head} values of a head", rotated > head or rotated % 2 != 0),
        ("heads have no width", head < 1),
    ):
        if wrong:
            raise ModelFileError(f"inconsistent metadata: {problem}", path=model.paths[0])
    embedding = model.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(
            "no token embedding matrix: this file holds no language model that can run alone",
            path=model.paths[0],
            tensor="token_embd.weight",
        )
    return Sizes(
        prefix=prefix,
        layers=layers,
        width=width,
        feed_forward=uniform("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        rotated=rotated,
        context=model.get(f"{prefix}.context_length", int, 2048, low=1, high=MAX_CONTEXT),
        vocabulary=embedding.shape[0],
        eps=model.get(f"{prefix}.attention.layer_norm_rms_epsilon", float, 1e-5, low=0.0, high=1.0),
        norm_offset=model.get(f"{prefix}.norm_offset", float, 0.0, low=0.0, high=1.0),
    )


def read_rope(model: ModelFile, sizes: Sizes, base: float = 10000.0) -> Rope:
    """The rotary embedding, with linear scaling or Llama 3's factors where the file has them.

    Raises:
        UnsupportedError: another kind of scaling.
    """
    key = f"{sizes.prefix}.rope.scaling"
    kind = model.get(f"{key}.type", str, "none")
    factor = model.get(f"{key}.factor", float, 1.0, low=1e-3, high=1e6)
    if kind not in ("none", "linear", "llama3"):
        raise UnsupportedError(
            f"rope scaling {kind!r} is not supported (none, linear and Llama 3's are)",
            path=model.paths[0],
        )
    has_factors = "rope_freqs.weight" in model.tensors
    base = model.get(f"{sizes.prefix}.rope.freq_base", float, base, low=1.0, high=1e12)
    return Rope(
        base=base,
        width=sizes.rotated,
        factor=factor if kind == "linear" else 1.0,
        factors="rope_freqs.weight" if has_factors else None,
        divisors=_llama3_divisors(model, key, sizes, base) if kind == "llama3" else (),
    )


def _llama3_divisors(model: ModelFile, key: str, sizes: Sizes, base: float) -> tuple[float, ...]:
    """Llama 3's scaling: what turns seldom in the context of old is slowed down, the rest is not.

    Safetensors directories have its four numbers, GGUF files the divisors that follow from them.
    """
    factor = model.get(f"{key}.factor", float, low=1e-3, high=1e6)
    low = model.get(f"{key}.low_freq_factor", float, low=0.0, high=1e6)
    high = model.get(f"{key}.high_freq_factor", float, low=0.0, high=1e6)
    before = model.get(f"{key}.original_context_length", int, low=1, high=MAX_CONTEXT)
    if high <= low:
        raise ModelFileError(
            f"inconsistent metadata: high_freq_factor {high} is not above low_freq_factor {low}",
            path=model.paths[0],
        )
    divisors = []
    for i in range(sizes.rotated // 2):
        turns = before * base ** (-2 * i / sizes.rotated) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def _matrix(model: ModelFile, stem: str, rows: int, columns: int) -> Matrix:
    bias = f"{stem}.bias"
    return Matrix(f"{stem}.weight", rows, columns, bias if bias in model.tensors else None)


def _norm(model: ModelFile, sizes: Sizes, stem: str, size: int) -> Vector | None:
    name = f"{stem}.weight"
    return Vector(name, size, sizes.norm_offset) if name in model.tensors else None


def query_scale(model: ModelFile, sizes: Sizes, default: float) -> float:
    """What scores of attention are multiplied by."""
    key = f"{sizes.prefix}.attention.scale"
    return model.get(key, float, default, low=1e-6, high=1e6)


def attention(
    model: ModelFile,
    sizes: Sizes,
    layer: int,
    rope: Rope,
    *,
    paired: bool,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    norm_together: bool = False,
) -> Attention:
    """Attention of one layer by GGUF's tensor names; QK norms and biases where the file has any.

    With `norm_together`, QK norms are over all heads.
    """
    block = f"blk.{layer}"
    q, kv = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    normed = (q, kv) if norm_together else (sizes.head, sizes.head)
    return Attention(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head=sizes.head,
        scale=sizes.head**-0.5 if scale is None else scale,
        rope=rope,
        paired=paired,
        query=_matrix(model, f"{block}.attn_q", q, sizes.width),
        key=_matrix(model, f"{block}.attn_k", kv, sizes.width),
        value=_matrix(model, f"{block}.attn_v", kv, sizes.width),
        output=_matrix(model, f"{block}.attn_output", sizes.width, q),
        window=window,
        soft_cap=soft_cap,
        query_norm=_norm(model, sizes, f"{block}.attn_q_norm", normed[0]),
        key_norm=_norm(model, sizes, f"{block}.attn_k_norm", normed[1]),
        norm_together=norm_together,
    )


def _activation(model: ModelFile, sizes: Sizes, default: Activation) -> Activation:
    """A key of our own: GGUF has none, as families always use the same one, or did."""
    key = f"{sizes.prefix}.feed_forward_activation"
    named = model.get(key, str, default)
    for one in get_args(Activation):
        if one == named:
            known: Activation = one
            return known
    raise UnsupportedError(
        f"{key} is {named[:40]!r}, expected one of {', '.join(get_args(Activation))}",
        path=model.paths[0],
    )


def _feed_forward(
    model: ModelFile, sizes: Sizes, stem: str, inner: int, activation: Activation
) -> FeedForward:
    activation = _activation(model, sizes, activation)
    return FeedForward(
        gate=_matrix(model, stem.format("gate"), inner, sizes.width),
        up=_matrix(model, stem.format("up"), inner, sizes.width),
        down=_matrix(model, stem.format("down"), sizes.width, inner),
        activation=activation,
    )


def experts(
    model: ModelFile,
    sizes: Sizes,
    index: int,
    *,
    normalised: bool,
    inner: int | None = None,
    shared: int = 0,
    activation: Activation = "silu",
    gated: bool = True,
    idle: int = 0,
    hidden: int = 0,
    only: int | None = None,
) -> Experts:
    """The mixture of experts of one layer by GGUF's tensor names.

    Args:
        normalised: whether the weights of the chosen experts sum to one, where the file is silent.
        inner: values between gate and down of an expert, where the file is silent.
        shared: the same of a shared expert; 0: there is none.
        gated: whether experts have a gate; without one there are two matrices, and the activation
            is ReLU, the only one for which there is a kernel.
        idle: how many of the last experts have no feed-forward: the caller says what they are.
        hidden: values between the router's layers; 0: it has one.
        only: experts that every token of such a model takes; None: as the file says.

    Raises:
        ModelFileError: a number is missing or out of bounds, or the router's shape is another.
        UnsupportedError: more than `MAX_ACTIVE` experts for a token or others than `only`, or
            another way to choose.
    """
    key = f"{sizes.prefix}.expert"
    count = model.get(f"{key}_count", int, low=1, high=MAX_EXPERTS)
    active = only or 0
    if only is None or f"{key}_used_count" in model.metadata:
        active = model.get(f"{key}_used_count", int, low=1, high=count)
    gating = model.get(f"{key}_gating_func", int, 1)
    scale = model.get(f"{key}_weights_scale", float, 1.0, low=0.0, high=1e6)
    for problem, wrong in (
        (f"{key}_used_count is {active}; a token takes {only} here", active != (only or active)),
        (f"{active} experts for a token; at most {MAX_ACTIVE} are supported", active > MAX_ACTIVE),
        (f"{key}_gating_func {gating}; only 1, softmax, is supported", gating != 1),
        (f"{key}_weights_scale {scale}; only 1 is supported", scale not in (0.0, 1.0)),
    ):
        if wrong:
            raise UnsupportedError(problem, path=model.paths[0])
    activation = _activation(model, sizes, activation)
    inner = model.get(
        f"{key}_feed_forward_length", int, inner or sizes.feed_forward, low=1, high=MAX_WIDTH
    )
    block = f"blk.{index}"
    if count <= idle:
        raise ModelFileError(
            f"inconsistent metadata: {key}_count is {count}, of which {idle} compute nothing",
            path=model.paths[0],
        )
    router = _matrix(model, f"{block}.ffn_gate_inp", count, hidden or sizes.width)
    tensor_of(model, router)  # a header may claim more experts than it has; each one takes memory
    if not gated and activation != "relu":
        raise UnsupportedError(
            f"experts without a gate whose activation is {activation!r}; only 'relu' is supported",
            path=model.paths[0],
        )
    for part in ("gate", "up", "down"):
        whole = model.tensors.get(whole_name(expert_name(index, part, 0)))
        if whole is not None and (len(whole.shape) != 3 or whole.shape[0] != count - idle):
            raise ModelFileError(
                f"has shape {list(whole.shape)}, but {key}_count calls for {count - idle} matrices",
                path=whole.path,
                tensor=whole.name,
                offset=whole.offset,
            )

    def one(expert: int) -> FeedForward:
        gate, up, down = (expert_name(index, part, expert) for part in ("gate", "up", "down"))
        return FeedForward(
            Matrix(gate, inner, sizes.width) if gated else None,
            Matrix(up, inner, sizes.width),
            Matrix(down, sizes.width, inner),
            activation,
        )

    gate = f"{block}.ffn_gate_inp_shexp.weight"
    return Experts(
        router=_matrix(model, f"{block}.ffn_gate_inp_hidden", hidden, sizes.width)
        if hidden
        else router,
        router_out=router if hidden else None,
        each=tuple(one(expert) for expert in range(count - idle)),
        active=active,
        weighting="chosen" if model.get(f"{key}_weights_norm", bool, normalised) else "all",
        shared=_feed_forward(model, sizes, f"{block}.ffn_{{}}_shexp", shared, activation)
        if shared
        else None,
        shared_gate=Matrix(gate, 1, sizes.width) if shared and gate in model.tensors else None,
    )


def layer(
    model: ModelFile,
    sizes: Sizes,
    index: int,
    attending: Attention,
    activation: Activation = "silu",
    experts: Experts | None = None,
) -> Layer:
    """A block around its attention, with GGUF's tensor names."""
    block = f"blk.{index}"
    return Layer(
        attention_norm=Vector(f"{block}.attn_norm.weight", sizes.width, sizes.norm_offset),
        attention=attending,
        attention_post_norm=_norm(model, sizes, f"{block}.post_attention_norm", sizes.width),
        feed_forward_norm=Vector(f"{block}.ffn_norm.weight", sizes.width, sizes.norm_offset),
        feed_forward=experts
        or _feed_forward(model, sizes, f"{block}.ffn_{{}}", sizes.feed_forward, activation),
        feed_forward_post_norm=_norm(model, sizes, f"{block}.post_ffw_norm", sizes.width),
    )


def decoder(
    model: ModelFile,
    sizes: Sizes,
    layers: list[Layer],
    *,
    embedding_scale: float = 1.0,
    soft_cap: float = 0.0,
) -> Decoder:
    """A decoder of these layers; its head is the embedding where the file has no own."""
    embedding = Matrix("token_embd.weight", sizes.vocabulary, sizes.width)
    tied = "output.weight" not in model.tensors
    return Decoder(
        architecture=sizes.prefix,
        width=sizes.width,
        vocabulary=sizes.vocabulary,
        context=sizes.context,
        eps=sizes.eps,
        embedding=embedding,
        embedding_scale=embedding_scale,
        layers=tuple(layers),
        norm=Vector("output_norm.weight", sizes.width, sizes.norm_offset),
        head=embedding if tied else _matrix(model, "output", sizes.vocabulary, sizes.width),
        soft_cap=soft_cap,
    )
