"""What a model takes in memory, what a token reads, how fast it is: as it is printed."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace import plan as plans
from headrace.errors import NoCompilerError
from headrace.expert_memory import hits_in_time
from headrace.kernels import kv_cache
from headrace.loaders.progress import Progress
from headrace.offload.recall import Predictor
from headrace.offload.routing_replay import EARLY_TOKENS
from headrace.planning import Prepared, kernel_store, prepare
from headrace.prediction import Passes, Rates, Speed
from headrace.price import price_of
from headrace.rates import PROMPT_TOKENS, measure_rates
from headrace.sizes import format_rate, format_size
from headrace.stack_price import price_at, shown_price

_UNIFORM = "as uniform, the worst case (`headrace trace MODEL TEXT --learn` finds out)"
NEARLY = 0.99  # of a budget: what is missing is not worth a word


@dataclass(frozen=True)
class MemoryPlan:
    """What loading and running a model takes; all sizes in bytes.

    Attributes:
        wanted_context: tokens of context, were there memory enough.
        budget, limit: memory that was asked for, and what of it (or at all) there is.
        all_in_memory: whether no weights stream and none are left out.
        blocks: in memory, of the `blocks_in_file` of a model that is a stack of them.
        weights: matrices as they would lie in memory; `file` is what the model file has.
        resident_weights: what of them stays in memory; the rest is streamed through a `window`.
        expanded: tensors whose type has no kernel: name, type in the file, format, both sizes.
        bytes_per_token: weights that a decode step reads; each token of context adds
            `kv_bytes_per_context_token` to it.
        flash_bytes_per_token: of the file, read for each pass.
        predicted_tok_s: decode speed at an empty context from `memory_read_gb_s` and
            `flash_read_gb_s`, measured on this machine.
        predicted_first_token_s: from a loaded model to the first token of an answer to 128 tokens.
        experts: that have room of all the `experts_in_file`, where they are brought when wanted;
            or clusters of neurons.
        neurons_fire: of models with such clusters, the share of the neurons that fires for a token.
        expected_hit_rate: share of the uses of experts that wait for nothing.
        expected_early_hit_rate: that of the first tokens of an answer, where it is known.
        expected_stall_s: that a token waits for flash, as predicted.
        routing: what that is taken from.
        price: how far a compressed model is from its source, as its file says.
        price_in_memory: the same of a stack of which not all blocks are in memory; see
            `headrace.stack_price`.
        advice: what would change the speed most.
    """

    model: str
    architecture: str
    target: str
    threads: int
    context: int
    wanted_context: int
    chunk: int
    file: int
    weights: int
    resident_weights: int
    window: int
    vectors: int
    kv_cache: int
    activations: int
    process: int
    peak_bytes: int
    parameters: int
    layers: int
    bytes_per_token: int
    flash_bytes_per_token: int
    kv_bytes_per_context_token: int
    memory_read_gb_s: float | None
    flash_read_gb_s: float | None
    read_mode: str | None
    predicted_tok_s: float | None
    predicted_first_token_s: float | None
    advice: str | None
    experts: int
    experts_in_file: int
    neurons_fire: float | None
    expected_hit_rate: float | None
    expected_early_hit_rate: float | None
    expected_stall_s: float | None
    routing: str | None
    budget: int | None
    limit: int | None
    all_in_memory: bool
    blocks: int
    blocks_in_file: int
    expanded: tuple[dict[str, Any], ...]
    price: dict[str, Any] | None
    price_in_memory: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def notices(self) -> list[str]:
        """What a user should know before the wait, where memory is short."""
        found = []
        if self.budget is not None and self.limit is not None and self.limit < NEARLY * self.budget:
            found.append(
                f"only {format_size(self.limit)} of the {format_size(self.budget)} asked for are "
                "free: the model is held to that"
            )
        if self.flash_bytes_per_token:
            rate = self.flash_read_gb_s
            how = "" if rate is None else f" at {rate:.1f} GB/s ({self.read_mode})"
            speed = self.predicted_tok_s
            about = "" if speed is None else f", about {format_rate(speed)} tok/s"
            missing = self.peak_bytes + self.weights - self.resident_weights - self.window
            found.append(
                f"{format_size(self.flash_bytes_per_token)} of weights are read from the file for "
                f"each token{how}{about}; with {format_size(missing)} of memory none would be"
            )
        if self.blocks < self.blocks_in_file and not self.flash_bytes_per_token:
            missing, price = self.weights - self.resident_weights, self.price_in_memory
            cost = ""
            if price is not None:
                ratio, whole = price["perplexity_ratio"], (self.price or {})["perplexity_ratio"]
                cost = (
                    f" (perplexity {ratio:.3g} times the source's on the text of the price tag, "
                    f"{price['how']}; with all {whole:.3g} times)"
                )
            found.append(
                f"{self.blocks} of {self.blocks_in_file} blocks of weights are in memory{cost}: "
                f"the answers are the better, the more; all take {format_size(missing)} more"
            )
        if self.expected_hit_rate is not None and self.routing is not None:
            what, how = "experts", "routing taken"
            if self.neurons_fire is not None:
                what, how = "clusters of neurons", f"{self.neurons_fire:.0%} of the neurons firing"
            early = ""
            if self.expected_early_hit_rate is not None:
                early = f" ({self.expected_early_hit_rate:.0%} of the first {EARLY_TOKENS} tokens')"
            found.append(
                f"{self.experts:,} of {self.experts_in_file:,} {what} have room: "
                f"{self.expected_hit_rate:.0%} of the uses{early} wait for nothing, "
                f"{how} {self.routing}"
            )
        if self.context < self.wanted_context:
            found.append(
                f"the context is {self.context} tokens, as memory is short: --context asks for more"
            )
        return found


def memory_plan(prepared: Prepared, rates: Rates | None = None) -> MemoryPlan:
    """Sizes and a prediction for a prepared model."""
    p, d, parts = prepared, prepared.decoder, prepared.parts
    rates = rates or Rates()
    peak = sum(parts.values())
    blocks = p.stack.n_bytes(len(p.stack)) if p.stack else 0
    stacked = p.stack.weights if p.stack else 0
    prompt_tokens = min(PROMPT_TOKENS, p.shape.context)
    passes = Passes(rates, p.residency, p.read_bytes, p.shape.threads, p.expert_bytes)
    speed = passes.prediction(prompt_tokens)
    return MemoryPlan(
        model=str(p.file.source),
        architecture=d.architecture,
        target=p.target.name,
        threads=p.shape.threads,
        context=p.shape.context,
        wanted_context=p.wanted_context,
        chunk=p.shape.chunk,
        file=p.file.size_bytes,
        weights=sum(one.n_bytes for one in p.placed) + blocks,
        resident_weights=parts["weights"] + parts.get("experts", 0),
        window=parts.get("window", 0),
        vectors=parts["vectors"],
        kv_cache=parts["KV cache"],
        activations=parts["activations"],
        process=parts["the process"],
        peak_bytes=peak,
        parameters=sum(one.matrix.rows * one.matrix.columns for one in p.placed) + stacked,
        layers=len(d.layers),
        bytes_per_token=p.read_bytes,
        flash_bytes_per_token=passes.flash_bytes(1),
        kv_bytes_per_context_token=plans.kv_bytes(d, 1) // kv_cache.CHUNK,
        memory_read_gb_s=None if rates.memory is None else rates.memory / 1e9,
        flash_read_gb_s=None if speed.flash is None else speed.flash / 1e9,
        read_mode=None if speed.mode is None else str(speed.mode),
        predicted_tok_s=speed.tok_s,
        predicted_first_token_s=speed.first_token_s,
        advice=speed.advice,
        experts=p.slots or (0 if p.room is None else p.room.count),
        experts_in_file=0 if p.room is None else p.room.count,
        neurons_fire=None if p.fired is None else p.fired.neurons,
        expected_hit_rate=p.expert_rate and hits_in_time(p.expert_rate, passes.in_time),
        expected_early_hit_rate=p.early_expert_rate
        and hits_in_time(p.early_expert_rate, passes.in_time),
        expected_stall_s=_stall_s(speed) if p.slots else None,
        routing=_routing_of(p),
        budget=p.budget,
        limit=p.limit,
        all_in_memory=p.residency is None
        and not p.slots
        and not (p.stack and p.blocks < len(p.stack)),
        blocks=p.blocks,
        blocks_in_file=len(p.stack) if p.stack else 0,
        expanded=tuple(
            {
                "tensor": one.matrix.name,
                "type": one.info.type,
                "loads_as": one.format.name,
                "file_bytes": one.info.n_bytes,
                "bytes": one.n_bytes,
            }
            for one in p.placed
            if one.expanded
        ),
        price=shown_price(p.file),
        price_in_memory=_price_in_memory(p),
    )


def _price_in_memory(p: Prepared) -> dict[str, Any] | None:
    if p.stack is None or p.used_blocks == len(p.stack):
        return None
    price = price_of(p.file)
    return None if price is None else price_at(price, p.stack, p.used_blocks)


def _stall_s(speed: Speed) -> float | None:
    if speed.tok_s is None or speed.compute_s is None:
        return None
    return max(0.0, 1 / speed.tok_s - speed.compute_s)


def _routing_of(p: Prepared) -> str | None:
    if not p.slots:
        return None
    if p.fired is not None:
        return "as on the text that the clusters were made with"
    if p.learned is not None:
        return f"as in {p.learned.tokens:,} tokens of text"
    return _UNIFORM if p.not_learned is None else f"{_UNIFORM}; {p.not_learned}"


def plan_model(
    path: str | Path,
    *,
    memory: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    target: str | None = None,
    kernels: str | Path | None = None,
    whole_stack: bool = False,
    predictor: Predictor = "fitted",
    measure: bool = True,
    progress: Progress | None = None,
) -> MemoryPlan:
    """Plan a model from its header; with `measure`, predict its speed on this machine.

    Without a compiler and without kernels that were built ahead there is no prediction.

    Raises:
        what `prepare` raises.
    """
    prepared = prepare(
        Path(path),
        context=context,
        threads=threads,
        target=target,
        kernels=kernels,
        budget=memory,
        whole_stack=whole_stack,
        predictor=predictor,
    )
    rates = Rates()
    if measure:
        # Without kernels to measure with, the rest of the plan is as good.
        with contextlib.suppress(NoCompilerError):
            rates = measure_rates(prepared, kernel_store(prepared), progress=progress)
    return memory_plan(prepared, rates)
