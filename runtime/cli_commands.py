"""The commands about models. What each needs is imported when it runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headrace import cli_learning
from headrace.cli_options import is_given
from headrace.cli_output import (
    is_terminal,
    print_json,
    printable,
    progress_bar,
    say,
    show,
    table,
    value_text,
)
from headrace.cli_sampling import given_of_sampling
from headrace.cli_text import stdin, text_of
from headrace.errors import BudgetError, HeadraceError
from headrace.peak import peak_rss_bytes
from headrace.sizes import format_rate, format_size

if TYPE_CHECKING:
    from pathlib import Path

START_S = time.perf_counter()
DEFAULT_MODEL = "smollm2-135m"


def run(
    *, model: str, prompt: str | None, max_tokens: int, raw: bool, json: bool,
    inputs: Sequence[str] = (), output: str | None = None, patches: str | None = None,
    sram: int | None = None, emulate: bool = False, weights: str | None = None, **options: Any,
) -> int:  # fmt: skip
    """Answer a prompt, printing the text as it is generated; or run an ONNX file.

    PROMPT may be `-` or come through a pipe. With one argument that has spaces in it, that is the
    prompt, and the model is smollm2-135m. An ONNX file takes --input, and has no prompt.
    """
    learning = cli_learning.taken(options)
    given = options | {"prompt": prompt, "max_tokens": max_tokens, "raw": raw}
    if is_for_chip(
        model, options["target"], sram=sram, emulate=emulate, weights=weights, **learning
    ):
        from headrace import cli_micro

        cli_micro.refuse(given | {"patches": patches})
        if not emulate:
            raise HeadraceError(f"{options['target']} is no CPU of this machine: add --emulate")
        return cli_micro.run(
            model=model, target=options["target"], weights=weights, sram=sram, learning=learning,
            inputs=inputs, output=output, json=json,
        )  # fmt: skip
    if is_network(model):
        from headrace import cli_networks

        return cli_networks.run(
            model=model, inputs=inputs, output=output, json=json,
            options=_for_networks(given, patches),
        )  # fmt: skip
    _refuse_for_language_models(inputs, output, patches)
    if prompt is None and " " in model and not os.path.exists(model):
        model, prompt = DEFAULT_MODEL, model
    if prompt == "-" or (prompt is None and sys.stdin is not None and not sys.stdin.isatty()):
        prompt = stdin().buffer.read().decode("utf-8", errors="replace")
    if not prompt:
        if model.endswith(".gguf") and ":" not in model:
            model_path(model)  # that there is no such file is the more useful complaint
        raise HeadraceError(
            f'there is no prompt; write `headrace run {model} "Why is the sky blue?"`, pipe a text '
            f"into it, or use `headrace chat {model}`"
        )
    code = None
    while code is None:
        with (
            _drafting(model, options) as draft,
            _loaded(model, options, quiet=json, taken=_taken(draft)) as loaded,
        ):
            load_s = time.perf_counter() - START_S
            # What a prompt takes is known only with the model's tokenizer.
            asked = options["context"] is not None
            longer = None if asked else _context_for(loaded, prompt, max_tokens, raw)
            if longer is None:
                chosen = {**_sampling(options), "draft": draft}
                generation = loaded.generate(prompt, max_tokens=max_tokens, raw=raw, **chosen)
                text, first_token_s, code = _stream(generation, quiet=json)
                plan = loaded.plan
        del loaded, draft
        if longer is not None:
            import gc

            from headrace.memory import give_back_heap

            say(f"the prompt asks for a context of {longer} tokens: loading again")
            options["context"] = longer
            gc.collect()
            give_back_heap()  # or the next model has what the last one left beside it
    stats = generation.stats
    if json:
        print_json(
            {
                "model": model,
                "text": text,
                "finish_reason": stats.finish_reason,
                "prompt_tokens": stats.prompt_tokens,
                "new_tokens": stats.new_tokens,
                "passes": stats.passes,
                "accepted_tokens": stats.accepted_tokens,
                "tokens_per_pass": stats.tokens_per_pass,
                "budget_bytes": plan.budget,
                "context": plan.context,
                "resident_weights_bytes": plan.resident_weights,
                "bytes_read_per_token": plan.flash_bytes_per_token,
                "notices": plan.notices(),
                "prefill_s": stats.prefill_s,
                "decode_s": stats.decode_s,
                "decode_tok_s": _decode_tok_s(stats),
                "load_s": load_s,
                "first_token_s": first_token_s,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    else:
        parts = _figures(stats, generation.lookup)
        parts += [f"first token {first_token_s:.2f} s"] if first_token_s is not None else []
        parts += [f"peak memory {format_size(peak_rss_bytes())}"]
        say(("interrupted · " if code else "") + " · ".join(parts))
    return code


def chat(*, model: str, max_tokens: int, system: str | None, **options: Any) -> int:
    """Talk with a model; Ctrl-C ends an answer, Ctrl-D or /exit the chat, /reset forgets it all."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    lines = stdin()
    typed = is_terminal(lines)
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="replace")
    with _drafting(model, options) as draft, _loaded(model, options, taken=_taken(draft)) as loaded:
        conversation = loaded.chat(system)
        while True:
            try:
                text = input("> " if typed else "").strip()
            except EOFError:
                return 0
            if text == "/exit":
                return 0
            if text == "/reset":
                conversation = loaded.chat(system)
            elif text:
                try:
                    chosen = {**_sampling(options), "draft": draft}
                    answer = conversation.send(text, max_tokens=max_tokens, **chosen)
                    _stream(answer)
                    if typed:
                        say(" · ".join(_figures(answer.stats, answer.lookup)))
                except HeadraceError as error:
                    if not typed:
                        raise
                    say(f"headrace: {error} (/reset begins a new conversation)")


def plan(
    *, model: str, json: bool, inputs: Sequence[str] = (), patches: str | None = None,
    sram: int | None = None, flash: int | None = None, weights: str | None = None, **options: Any,
) -> int:  # fmt: skip
    """Say from the file's header alone what a model takes here, and how fast it will be."""
    from headrace.memory_plan import plan_model

    learning = cli_learning.taken(options)
    if is_for_chip(model, options["target"], sram=sram, flash=flash, weights=weights, **learning):
        from headrace import cli_micro

        cli_micro.refuse(options | {"patches": patches, "input": inputs})
        return cli_micro.plan(
            model=model, target=options["target"], weights=weights, sram=sram, flash=flash,
            learning=learning, json=json,
        )  # fmt: skip
    if is_network(model):
        from headrace import cli_networks

        return cli_networks.plan(
            model=model, inputs=inputs, json=json, options=_for_networks(options, patches)
        )
    _refuse_for_language_models(inputs, patches=patches)
    path = model_path(model)
    if options["predictor"] is None:
        del options["predictor"]
    with progress_bar() as progress:
        found = plan_model(path, progress=progress, **options)
    _show_with_price(found.to_dict(), json)
    return 0


def bench(
    *, model: str, json: bool, inputs: Sequence[str] = (), patches: str | None = None,
    sram: int | None = None, weights: str | None = None, **options: Any,
) -> int:  # fmt: skip
    """Measure prefill and decode, and the memory's read bandwidth in the same run.

    Of an ONNX file: calls, with random inputs where --input gives none. For a microcontroller:
    instructions and predicted cycles, layer by layer.
    """
    if is_for_chip(model, options["target"], sram=sram, weights=weights):
        from headrace import cli_micro

        cli_micro.refuse(options | {"patches": patches, "input": inputs})
        return cli_micro.bench(
            model=model, target=options["target"], weights=weights, sram=sram, json=json
        )
    if is_network(model):
        from headrace import cli_networks

        return cli_networks.bench(
            model=model, inputs=inputs, runs=options["runs"], json=json,
            options=_for_networks(options, patches),
        )  # fmt: skip
    _refuse_for_language_models(inputs, patches=patches)
    from headrace.bench import bench as measure

    if options["predictor"] is None:
        del options["predictor"]
    show(measure(model_path(model), **options), json)
    return 0


def embed(**options: Any) -> int:
    """Turn texts into vectors: those given, or each line of stdin.

    Shows how alike they are (cosines of their vectors); -o writes the vectors as a .npy file.
    """
    from headrace import cli_networks

    return cli_networks.embed(**options)


def perplexity(*, model: str, text: str, window: int, chunks: int | None, **rest: Any) -> int:
    """Score a text file (`-` is stdin) as llama.cpp does: the second half of each window."""
    from headrace.perplexity import perplexity as score
    from headrace.windows import scored_of

    as_json = rest.pop("json")
    decoded = text_of(text)
    with (
        _loaded(
            model, {**rest, "context": window, "logits_rows": scored_of(window)}, quiet=as_json
        ) as loaded,
        progress_bar() as progress,
    ):
        result = score(loaded, decoded, context=window, chunks=chunks, progress=progress)
    show(result, as_json)
    return 0


def compare(
    *, reference: str, model: str, text: str, window: int, chunks: int | None, **rest: Any
) -> int:
    """Say how far MODEL is from REFERENCE on a text file (`-` is stdin).

    Kullback-Leibler divergence of what they expect next (nats a token; 0: the same), how often they
    find the same token likeliest, and the ratio of their perplexities. Both must have the same
    vocabulary. --memory is for both together.
    """
    from headrace.compare import compare as score
    from headrace.pair import load_pair
    from headrace.windows import scored_of

    as_json = rest.pop("json")
    decoded = text_of(text)
    options = {name: rest[name] for name in ("threads", "target", "kernels")}
    with (
        progress_bar() as progress,
        load_pair(
            model_path(reference), model_path(model), memory=rest["memory"], progress=progress,
            context=window, logits_rows=scored_of(window), **options,
        ) as models,
    ):  # fmt: skip
        for one in models:
            for notice in [] if as_json else one.plan.notices():
                say(f"{one.prepared.file.paths[0].name}: {notice}")
        result = score(*models, decoded, context=window, chunks=chunks, progress=progress)
    show(result, as_json)
    return 0


def inspect(
    *, model: str, json: bool, inputs: Sequence[str] = (), target: str | None = None
) -> int:
    """Show what is in a model file and how it would load.

    For a microcontroller: a network's layers, their quantisation, and what it takes on each chip.
    """
    if is_for_chip(model, target):
        from headrace import cli_micro

        cli_micro.refuse({"input": inputs})
        return cli_micro.inspect(model=model, json=json)
    if is_network(model):
        from headrace import cli_networks

        return cli_networks.inspect(model=model, inputs=inputs, target=target, json=json)
    _refuse_for_language_models(inputs)
    if target is not None:
        raise HeadraceError(
            "`inspect` takes --target for ONNX files; with this model use it in `plan`"
        )
    from headrace.description import describe_model

    facts = describe_model(model_path(model))
    if json:
        print_json(facts)
        return 0
    types, metadata = facts.pop("types"), facts.pop("metadata")
    _show_with_price(facts, False)
    print("\ntypes")
    table(types)
    print("\nmetadata")
    for key, value in metadata.items():
        print(f"  {printable(key)}  {printable(value_text(value))}")
    return 0


def pull(*, name: str, file: str | None) -> int:
    """Fetch a model into the cache and print its path."""
    from headrace.loaders.pull import pull as fetch

    with progress_bar() as progress:
        path = fetch(name, file=file, progress=progress, verify=True)
    print(path)
    return 0


_SELF = "self"  # as a draft: `headrace.draft.SELF`

# ---- what they share ----------------------------------------------------------------------------


def _show_with_price(values: dict[str, Any], as_json: bool) -> None:
    """Facts about a model; for people, its price stands below them as `compress` shows it."""
    if as_json:
        print_json(values)
        return
    price = values.get("price")
    show({key: value for key, value in values.items() if key != "price"}, False)
    if price is not None:
        print("\nprice")
        show(price, False)


def is_network(model: str) -> bool:
    """Whether MODEL is an ONNX or TFLite file, which have commands of their own."""
    from headrace.loaders.sources import is_network as found

    return found(model)


def is_for_chip(model: str, target: str | None, **of_chips: Any) -> bool:
    """Whether a target is a microcontroller; its options are for nothing else."""
    from headrace.targets.target import microcontrollers

    if target is not None and target in microcontrollers():
        if not is_network(model):
            raise HeadraceError(f"{target} runs networks of ONNX and TFLite files only")
        return True
    for name, value in of_chips.items():
        if is_given(value):
            chips = ", ".join(microcontrollers())
            option = name.replace("_", "-")
            raise HeadraceError(f"--{option} is for microcontrollers: --target is one of {chips}")
    return False


def _for_networks(options: Mapping[str, Any], patches: str | None) -> dict[str, Any]:
    """How an ONNX file is opened; options that say nothing to one are not ignored."""
    none = ("prompt", "kernels", "context", "whole_stack", "predictor")
    given = [name for name in none if is_given(options.get(name))] + given_of_sampling(options)
    if given:
        name = given[0].replace("_", "-")
        raise HeadraceError(f"an ONNX file takes no {name} (yet); leave it out")
    return {"patches": patches} | {n: options[n] for n in ("threads", "memory", "target")}


def _refuse_for_language_models(
    inputs: Sequence[str], output: str | None = None, patches: str | None = None
) -> None:
    if inputs or output is not None or patches is not None:
        raise HeadraceError(
            "--input, --output and --patches are for ONNX files; this model takes a prompt"
        )


def model_path(model: str) -> Path:
    """The file that MODEL names, fetched if need be."""
    from headrace.loaders.sources import resolve

    with progress_bar() as progress:
        return resolve(model, progress=progress)


@contextmanager
def _drafting(model: str, options: Mapping[str, Any]) -> Iterator[Any]:
    """The small model that guesses tokens for `model`, if there is to be one; "self": itself.

    It remembers no more of the text than that one could without it.
    """
    if options.get("draft") in (None, _SELF):
        yield options.get("draft")
        return
    path = model_path(options["draft"])
    small = {**options, "draft": None, "context": None, "whole_stack": False, "predictor": None}
    contexts = (_planned(model_path(model), options), _planned(path, small))
    small["context"] = min(one.shape.context for one in contexts)
    with _loaded(str(path), small, quiet=True) as loaded:
        yield loaded


def _planned(path: Path, options: Mapping[str, Any]) -> Any:
    """What `prepare` decides, from the header alone."""
    from headrace.planning import prepare

    given = options.get
    return prepare(
        path, context=given("context"), threads=given("threads"), target=given("target"),
        kernels=given("kernels"), budget=given("memory"),
        whole_stack=bool(given("whole_stack")) or given("draft") == _SELF,
        predictor=given("predictor") or "fitted",
    )  # fmt: skip


def _taken(draft: Any) -> int:
    """Bytes that a draft takes of the memory of the model whose process it shares."""
    return 0 if draft in (None, _SELF) else draft.plan.peak_bytes - draft.plan.process


@contextmanager
def _loaded(
    model: str, options: Mapping[str, Any], quiet: bool = False, taken: int = 0
) -> Iterator[Any]:
    """A model; of `memory`, another one in this process has taken so many bytes."""
    from headrace.model import load

    names = ("memory", "threads", "context", "target", "kernels", "logits_rows", "predictor")
    chosen = {name: options[name] for name in names if options.get(name) is not None}
    # One that guesses for itself checks that with all of itself.
    if options.get("whole_stack") or options.get("draft") == _SELF:
        chosen["whole_stack"] = True
    memory = chosen.get("memory")
    if memory is not None:
        chosen["memory"] = max(1, memory - taken)
    try:
        with progress_bar() as progress:
            loaded = load(model, progress=progress, **chosen)
    except BudgetError as error:
        if memory is None or not taken or error.needed_bytes is None:
            raise
        from headrace.offload.budget import round_up

        needed = format_size(round_up(error.needed_bytes + taken))
        raise BudgetError(
            f"two models do not fit in {format_size(memory)}: the other one takes "
            f"{format_size(taken)} of it. For both, allow at least {needed} ({error})",
            needed_bytes=error.needed_bytes + taken,
        ) from error
    with loaded:
        if not quiet:
            for notice in loaded.plan.notices():
                say(notice)
            more = loaded.plan.flash_bytes_per_token
            if taken and more:
                alone = _planned(loaded.prepared.file.paths[0], options).residency
                more -= alone.streamed_bytes if alone else 0
            if taken and more > 0:
                say(
                    f"the draft takes {format_size(taken)} of memory: {format_size(more)} more are "
                    "read for each token than without it"
                )
        yield loaded


def _context_for(loaded: Any, prompt: str, max_tokens: int, raw: bool) -> int | None:
    """The context that a prompt and its answer take, if what was chosen has no room for the one."""
    if loaded.plan.context >= loaded.plan.wanted_context:
        return None
    if raw:
        n = len(loaded.tokenize(prompt))
    else:
        n = len(loaded.tokenize_chat([{"role": "user", "content": prompt}]))
    longest: int = loaded.prepared.decoder.context
    if n <= loaded.context or n > longest:
        return None
    return min(-(-(n + max_tokens) // 256) * 256, longest)


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop", "lookup")
    return {name: options[name] for name in names}


def _stream(generation: Iterable[str], *, quiet: bool = False) -> tuple[str, float | None, int]:
    """Print the pieces as they come: (text, seconds from the start to the first, exit code)."""
    pieces: list[str] = []
    first_s, code = None, 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        for piece in generation:
            first_s = time.perf_counter() - START_S if first_s is None else first_s
            pieces.append(piece)
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    if not quiet and pieces and not pieces[-1].endswith("\n"):
        print(flush=True)
    return "".join(pieces), first_s, code


def _figures(stats: Any, lookup: bool) -> list[str]:
    """How many tokens there are, and how fast they came."""
    rate, per_pass = _decode_tok_s(stats), stats.tokens_per_pass if lookup else None
    parts = [f"{stats.new_tokens} token{'s' if stats.new_tokens != 1 else ''}"]
    parts += [f"{format_rate(rate)} tok/s"] if rate is not None else []
    return parts + ([f"{per_pass:.1f} tokens per pass"] if per_pass is not None else [])


def _decode_tok_s(stats: Any) -> float | None:
    # The first token comes out of the prefill.
    steps = stats.new_tokens - 1
    return steps / stats.decode_s if steps > 0 and stats.decode_s > 0 else None
