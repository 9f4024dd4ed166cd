"""The `headrace` command.

Exit codes: 0 done; 1 a failure that nobody foresaw; 2 wrong usage, or a `HeadraceError` (one line
on stderr says what is wrong and what to do); 130 Ctrl-C; 141 the reader of stdout went away.
`HEADRACE_DEBUG=1` shows tracebacks.

The options stand in one table; see `headrace.cli_options`.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from headrace.cli_options import REQUIRED, Command, Opt, build_app, parse
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
from headrace.errors import HeadraceError, TemplateError
from headrace.peak import peak_rss_bytes
from headrace.sizes import format_size, parse_size

if TYPE_CHECKING:
    from pathlib import Path


START_S = time.perf_counter()
DEFAULT_MODEL = "smollm2-135m"


# ---- commands -----------------------------------------------------------------------------------


def run(
    *, model: str, prompt: str | None, max_tokens: int, raw: bool, json: bool, **options: Any
) -> int:
    """Answer a prompt, printing the text as it is generated.

    PROMPT may be `-` or come through a pipe. With one argument that has spaces in it, that is the
    prompt, and the model is smollm2-135m.
    """
    if prompt is None and " " in model and not os.path.exists(model):
        model, prompt = DEFAULT_MODEL, model
    if prompt == "-" or (prompt is None and sys.stdin is not None and not sys.stdin.isatty()):
        prompt = _stdin().buffer.read().decode("utf-8", errors="replace")
    if not prompt:
        if model.endswith(".gguf") and ":" not in model:
            _path(model)  # that there is no such file is the more useful complaint
        raise HeadraceError(
            f'there is no prompt; write `headrace run {model} "Why is the sky blue?"`, pipe a text '
            f"into it, or use `headrace chat {model}`"
        )
    with (
        _drafting(options) as draft,
        _loaded(model, _beside(draft, options), quiet=json) as loaded,
    ):
        load_s = time.perf_counter() - START_S
        chosen = {**_sampling(options), "draft": draft}
        generation = loaded.generate(prompt, max_tokens=max_tokens, raw=raw, **chosen)
        text, first_token_s, code = _stream(generation, quiet=json)
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
                "prefill_s": stats.prefill_s,
                "decode_s": stats.decode_s,
                "decode_tok_s": _decode_tok_s(stats),
                "load_s": load_s,
                "first_token_s": first_token_s,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    else:
        rate = _decode_tok_s(stats)
        parts = [f"{stats.new_tokens} token{'s' if stats.new_tokens != 1 else ''}"]
        parts += [f"{rate:.0f} tok/s"] if rate is not None else []
        per_pass = stats.tokens_per_pass if generation.lookup else None
        parts += [f"{per_pass:.1f} tokens per pass"] if per_pass is not None else []
        parts += [f"first token {first_token_s:.2f} s"] if first_token_s is not None else []
        parts += [f"peak memory {format_size(peak_rss_bytes())}"]
        say(("interrupted · " if code else "") + " · ".join(parts))
    return code


def chat(*, model: str, max_tokens: int, system: str | None, **options: Any) -> int:
    """Talk with a model; Ctrl-C ends an answer, Ctrl-D or /exit the chat, /reset forgets it all."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    lines = _stdin()
    typed = is_terminal(lines)
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="replace")
    with _drafting(options) as draft, _loaded(model, _beside(draft, options)) as loaded:
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
                    send = conversation.send(text, max_tokens=max_tokens, **chosen)
                    _stream(send)
                except HeadraceError as error:
                    if not typed:
                        raise
                    say(f"headrace: {error} (/reset begins a new conversation)")


def plan(*, model: str, json: bool, **options: Any) -> int:
    """Say from the file's header alone what a model takes here, and how fast it will be."""
    from headrace.planning import plan_model

    path = _path(model)
    with progress_bar() as progress:
        found = plan_model(path, progress=progress, **options)
    show(found.to_dict(), json)
    return 0


def bench(*, model: str, json: bool, **options: Any) -> int:
    """Measure prefill and decode, and the memory's read bandwidth in the same run."""
    from headrace.bench import bench as measure

    show(measure(_path(model), **options), json)
    return 0


def perplexity(*, model: str, text: str, window: int, chunks: int | None, **rest: Any) -> int:
    """Score a text file (`-` is stdin) as llama.cpp does: the second half of each window."""
    from headrace.perplexity import perplexity as score

    as_json = rest.pop("json")
    try:
        if text == "-":
            data = _stdin().buffer.read()
        else:
            with open(text, "rb") as file:
                data = file.read()
    except OSError as error:
        raise HeadraceError(f"cannot read the text {text}: {error.strerror}") from error
    with (
        _loaded(model, {**rest, "context": window}, quiet=as_json) as loaded,
        progress_bar() as progress,
    ):
        decoded = data.decode("utf-8", errors="replace")
        result = score(loaded, decoded, context=window, chunks=chunks, progress=progress)
    show(result, as_json)
    return 0


def inspect(*, model: str, json: bool) -> int:
    """Show what is in a model file and how it would load."""
    from headrace.description import describe_model

    facts = describe_model(_path(model))
    if json:
        print_json(facts)
        return 0
    types, metadata = facts.pop("types"), facts.pop("metadata")
    show(facts, False)
    print("\ntypes")
    table(types)
    print("\nmetadata")
    for key, value in metadata.items():
        print(f"  {printable(key)}  {printable(value_text(value))}")
    return 0


def compress(*, src: str, dst: str, format: str, force: bool) -> int:
    """Write a model as a file of our own, which loads without repacking.

    Other programs can list what is in it, but not run it: keep the source if you need it elsewhere.
    """
    import shlex

    from headrace.compress import compress as write

    with progress_bar() as progress:
        done = write(src, dst, format=format, force=force, progress=progress)
    say(
        f"{done.path}: {format_size(done.size_bytes)} (from {format_size(done.source_bytes)}); "
        f'try `headrace run {shlex.quote(str(done.path))} "Why is the sky blue?"`'
    )
    return 0


def targets_list(*, json: bool) -> int:
    """List the CPUs that kernels are built for, and where they can be proven on this machine.

    --json adds LLVM's options and the emulators' command lines.
    """
    from headrace.target_list import describe_targets, for_people

    rows = describe_targets()
    if json:
        print_json(rows)
    else:
        table(for_people(rows))
    return 0


def targets_build(*, target: str, output: str, cpu: str | None) -> int:
    """Build a kernel pack: shared libraries for devices that have no compiler.

    TARGET is a target's name (see `targets list`) or an architecture, such as aarch64-linux: then
    the pack has all of its CPU levels, or with --cpu those that this CPU runs. aarch64 and x86_64
    also with -macos and -windows.
    """
    from headrace.kernels.table import kernel_table
    from headrace.targets.naming import choose
    from headrace.targets.pack import Pack, build
    from headrace.targets.target import all_targets
    from headrace.team import default_threads

    chosen = choose(all_targets().values(), target, cpu)
    rows = list(kernel_table().values())
    try:
        with progress_bar() as progress:
            folder = build(chosen, rows, output, n_workers=default_threads(), progress=progress)
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    names = ", ".join(one.name for one in chosen)
    say(f"{folder}: {format_size(Pack(folder).n_bytes)}, {len(rows)} kernels for {names}")
    return 0


def targets_export(
    *, model: str, target: str, output: str, cpu: str | None, context: int | None
) -> int:
    """Make a static executable of a model for Linux: no Python, no libc, no other file.

    It continues token ids: `./smol --ids 504,3575,282,4649,314 -n 16`; with --print-ids it prints
    ids instead of text. TARGET is a target's name (see `targets list`) or an architecture, such as
    aarch64-linux: then the executable is for any CPU of it, or with --cpu of the best level that
    this CPU runs.
    """
    from headrace.targets.need import compiler_needed

    with compiler_needed():
        from headrace.standalone.export import export
    from headrace.targets.naming import choose_one
    from headrace.targets.target import all_targets
    from headrace.team import default_threads

    chosen = choose_one(all_targets().values(), target, cpu)
    path = _path(model)
    try:
        with progress_bar() as progress:
            made = export(
                path, chosen, output, context=context, n_workers=default_threads(),
                progress=progress,
            )  # fmt: skip
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    say(
        f"{made.path}: {format_size(made.file_bytes)} for {chosen.name} ({chosen.cpu}), "
        f"{format_size(made.buffer_bytes)} of buffers for {made.context} tokens"
    )
    return 0


def targets_test(*, target: str | None, kernel: str | None, report: bool, json: bool) -> int:
    """Prove kernels on this CPU and on emulated ones: every case against its numpy reference.

    TARGET is as in `targets build`; without it all are proven, which takes long. With --report also
    what matrix products cost: instructions per multiply-add, bytes loaded per byte of weights (as
    far as an emulator shows them), and the size of a pack.
    """
    from headrace.kernels.table import kernel_table
    from headrace.target_test import machines_of, outcomes
    from headrace.target_test import report as costs
    from headrace.targets.cache import KernelStore
    from headrace.targets.naming import choose
    from headrace.targets.target import all_targets
    from headrace.team import default_threads

    every = list(all_targets().values())
    chosen = every if target is None else choose(every, target, None)
    rows = {name: row for name, row in kernel_table().items() if kernel in (None, name)}
    if not rows:
        raise HeadraceError(f"unknown kernel {kernel!r}; kernels: {', '.join(kernel_table())}")
    found, tables = [], []
    for one in chosen:
        available = [machine for machine, missing in machines_of(one) if missing is None]
        if available:
            with progress_bar() as progress:
                KernelStore(one, default_threads()).objects(rows.values(), progress)
        for outcome in outcomes([one], rows.values()):
            found.append(vars(outcome))
            if not json:
                print(*vars(outcome).values(), sep="  ", flush=True)
        if report and available:
            tables.append(costs(one, kernel_table().values(), available[0]))
            if not json:
                print()
                show(tables[-1], False)
                print()
    if json:
        print_json({"kernels": found, "reports": tables})
    failed = [f"{one['kernel']} of {one['target']}" for one in found if one["result"] == "failed"]
    if failed:
        raise HeadraceError(f"{len(failed)} failed: {', '.join(failed[:5])}")
    return 0


def pull(*, name: str, file: str | None) -> int:
    """Fetch a model into the cache and print its path."""
    from headrace.loaders.pull import pull as fetch

    with progress_bar() as progress:
        path = fetch(name, file=file, progress=progress, verify=True)
    print(path)
    return 0


# ---- the table of options -----------------------------------------------------------------------


_MODEL = Opt("model", str, REQUIRED, "a file, a directory, org/repo[:file.gguf], or a name to pull")
_JSON = Opt("json", bool, False, "print one JSON object", ("--json",))
_TARGET = Opt("target", str, None, "a CPU target, such as x86-64-v3", ("--target",))
_BUILT_FOR = Opt(
    "target", str, REQUIRED, "a target, or an architecture: aarch64-linux", ("--target",)
)
_MACHINE = (
    Opt("memory", parse_size, None, "memory to use: 300MB, 1.5GiB, 50%", ("--memory",)),
    Opt("threads", int, None, "threads; default: the physical cores", ("--threads", "-t")),
    _TARGET,
    Opt("kernels", str, None, "a kernel pack to use (see `targets build`)", ("--kernels",)),
)
_CONTEXT = Opt("context", int, None, "tokens of context; default: the model's", ("--context",))
_SAMPLING = (
    Opt("max_tokens", int, 256, "at most so many new tokens", ("-n", "--max-tokens")),
    Opt("temperature", float, 0.0, "0 takes the likeliest token", ("--temperature",)),
    Opt("top_k", int, 0, "sample from the k likeliest (0: all)", ("--top-k",)),
    Opt("top_p", float, 1.0, "sample from this share of the probability", ("--top-p",)),
    Opt("min_p", float, 0.0, "drop tokens below this share of the likeliest", ("--min-p",)),
    Opt("repeat_penalty", float, 1.0, "above 1: repeat less", ("--repeat-penalty",)),
    Opt("seed", int, None, "makes sampling repeatable", ("--seed",)),
    Opt("stop", str, (), "end at this text (may be given again)", ("--stop",), many=True),
    Opt(
        "lookup",
        bool,
        None,
        "guess from the text so far; same answer. Default: if weights stream",
        ("--lookup", "--no-lookup"),
    ),
    Opt("draft", str, None, "a small model of the same vocabulary that guesses", ("--draft",)),
)
_PROMPT = Opt("prompt", str, None, "the question; - reads stdin")
_SYSTEM = Opt("system", str, None, "what the model is told before the conversation", ("--system",))
_RAW = Opt("raw", bool, False, "continue the prompt as it is, without chat template", ("--raw",))
_DEFAULTED = _MODEL._replace(default=DEFAULT_MODEL)

COMMANDS: dict[str, Command] = {
    "run": Command(run, (_DEFAULTED, _PROMPT, *_SAMPLING, *_MACHINE, _CONTEXT, _RAW, _JSON)),
    "chat": Command(chat, (_DEFAULTED, _SYSTEM, *_SAMPLING, *_MACHINE, _CONTEXT)),
    "plan": Command(plan, (_MODEL, *_MACHINE, _CONTEXT, _JSON)),
    "bench": Command(
        bench,
        (
            _MODEL,
            Opt("prompt_tokens", int, 512, "tokens of the prefill", ("-p", "--prompt-tokens")),
            Opt("new_tokens", int, 128, "tokens of the decode", ("-n", "--new-tokens")),
            Opt("context_tokens", int, 0, "decode after so many tokens", ("--context-tokens",)),
            Opt("runs", int, 3, "take the best of so many", ("--runs",)),
            *_MACHINE,
            _JSON,
        ),
    ),
    "inspect": Command(inspect, (_MODEL, _JSON)),
    "perplexity": Command(
        perplexity,
        (
            _MODEL,
            Opt("text", str, REQUIRED, "a text file; - reads stdin"),
            Opt("window", int, 512, "tokens of a window", ("--context",)),
            Opt("chunks", int, None, "only so many windows", ("--chunks",)),
            *_MACHINE,
            _JSON,
        ),
    ),
    "compress": Command(
        compress,
        (
            Opt("src", str, REQUIRED, _MODEL.help),
            Opt("dst", str, REQUIRED, "the file to write, such as model.headrace.gguf"),
            Opt("format", str, "keep", "keep: each matrix as it loads", ("--format",)),
            Opt("force", bool, False, "replace the file if it exists", ("--force",)),
        ),
    ),
    "targets list": Command(targets_list, (_JSON,)),
    "targets build": Command(
        targets_build,
        (
            _BUILT_FOR,
            Opt("output", str, REQUIRED, "the folder to write", ("-o", "--output")),
            Opt("cpu", str, None, "levels that this CPU runs, such as cortex-a76", ("--cpu",)),
        ),
    ),
    "targets export": Command(
        targets_export,
        (
            _MODEL,
            _BUILT_FOR,
            Opt("output", str, REQUIRED, "the executable to write", ("-o", "--output")),
            Opt("cpu", str, None, "the best for this CPU, such as cortex-a76", ("--cpu",)),
            Opt("context", int, None, "tokens; default: the model's, at most 4096", ("--context",)),
        ),
    ),
    "targets test": Command(
        targets_test,
        (
            Opt("target", str, None, "a target or an architecture; default: all", ("--target",)),
            Opt("kernel", str, None, "only this kernel, such as gemv_q4_0", ("--kernel",)),
            Opt("report", bool, False, "also what matrix products cost", ("--report",)),
            _JSON,
        ),
    ),
    "pull": Command(
        pull,
        (
            Opt("name", str, REQUIRED, "smollm2-135m, org/repo or org/repo:file.gguf"),
            Opt("file", str, None, "the file in the repository, if it has several"),
        ),
    ),
}


# ---- parsing ------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    if arguments == ["--version"]:
        return _guarded(_print_version, {})
    words = 2 if arguments[:1] == ["targets"] else 1
    command = COMMANDS.get(" ".join(arguments[:words]))
    values = parse(command, arguments[words:]) if command else None
    if command is not None and values is not None:
        return _guarded(command.function, values)
    return _typer_main(arguments)


def _typer_main(arguments: list[str]) -> int:
    try:
        build_app(COMMANDS, _guarded, _print_version)(arguments, prog_name="headrace")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _guarded(function: Callable[..., int], values: Mapping[str, Any]) -> int:
    warnings.showwarning = lambda message, *_, **__: say(f"headrace: warning: {message}")
    try:
        code = function(**values)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except HeadraceError as error:
        _trace()
        hint = " (`run --raw` needs no chat template)" if isinstance(error, TemplateError) else ""
        say(f"headrace: {error}{hint}")
        return 2
    except ValueError as error:  # what the API raises for an argument out of bounds
        _trace()
        say(f"headrace: {error}")
        return 2
    except OSError as error:  # stdout is a full disk, for one
        _trace()
        say(f"headrace: {error}")
        return 1
    except Exception as error:
        _trace()
        say(f"headrace: unexpected {type(error).__name__}: {error} (HEADRACE_DEBUG=1 shows where)")
        return 1


def _trace() -> None:
    if os.environ.get("HEADRACE_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()


# ---- helpers of the commands --------------------------------------------------------------------


def _print_version() -> int:
    from headrace import __version__

    print(f"headrace {__version__}")
    return 0


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise HeadraceError("stdin is closed, and the command is to read from it")
    return sys.stdin


def _path(model: str) -> Path:
    from headrace.loaders.sources import resolve

    with progress_bar() as progress:
        return resolve(model, progress=progress)


@contextmanager
def _drafting(options: Mapping[str, Any]) -> Iterator[Any]:
    """The small model that guesses tokens, if there is to be one."""
    if options.get("draft") is None:
        yield None
        return
    small = {name: options[name] for name in ("threads", "target", "kernels") if name in options}
    with _loaded(str(_path(options["draft"])), small, quiet=True) as loaded:
        yield loaded


def _beside(draft: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a model that shares its process and its memory with a small one."""
    if draft is None or options.get("memory") is None:
        return options
    return {**options, "memory": options["memory"] - draft.plan.peak_bytes + draft.plan.process}


@contextmanager
def _loaded(model: str, options: Mapping[str, Any], quiet: bool = False) -> Iterator[Any]:
    from headrace.model import load

    names = ("memory", "threads", "context", "target", "kernels")
    with progress_bar() as progress:
        chosen = {name: options[name] for name in names if options.get(name) is not None}
        loaded = load(model, progress=progress, **chosen)
    with loaded:
        if not quiet:
            for notice in loaded.plan.notices():
                say(notice)
        yield loaded


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


def _decode_tok_s(stats: Any) -> float | None:
    # The first token comes out of the prefill.
    steps = stats.new_tokens - 1
    return steps / stats.decode_s if steps > 0 and stats.decode_s > 0 else None


if __name__ == "__main__":
    sys.exit(main())
