"""The `headrace` command.

Exit codes: 0 done; 1 a failure that nobody foresaw; 2 wrong usage, or a `HeadraceError` (one line
on stderr says what is wrong and what to do); 130 Ctrl-C; 141 the reader of stdout went away.
`HEADRACE_DEBUG=1` shows tracebacks.

The options stand in one table. A well-formed command line is parsed from it directly; typer, whose
import and app cost 75 ms, is built from the same table only to help and to complain.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.errors import HeadraceError, TemplateError
from headrace.peak import peak_rss_bytes
from headrace.sizes import format_size, parse_size

if TYPE_CHECKING:
    from pathlib import Path

    from typer import Typer

START_S = time.perf_counter()
DEFAULT_MODEL = "smollm2-135m"


class Opt(NamedTuple):
    """An option, or an argument when it has no flags; `name` is the keyword of the function."""

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    flags: tuple[str, ...] = ()
    many: bool = False


class Command(NamedTuple):
    """A subcommand: what carries it out, and its options."""

    function: Callable[..., int]
    options: tuple[Opt, ...]


_REQUIRED = object()


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
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if not prompt:
        raise HeadraceError(
            f'there is no prompt; write `headrace run {model} "Why is the sky blue?"`, pipe a text '
            f"into it, or use `headrace chat {model}`"
        )
    with _loaded(model, options) as loaded:
        load_s = time.perf_counter() - START_S
        generation = loaded.generate(prompt, max_tokens=max_tokens, raw=raw, **_sampling(options))
        text, first_token_s, code = _stream(generation, quiet=json)
    stats = generation.stats
    if json:
        _print_json(
            {
                "model": model,
                "text": text,
                "finish_reason": stats.finish_reason,
                "prompt_tokens": stats.prompt_tokens,
                "new_tokens": stats.new_tokens,
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
        parts = [f"{stats.new_tokens} tokens"]
        parts += [f"{rate:.0f} tok/s"] if rate is not None else []
        parts += [f"first token {first_token_s:.2f} s"] if first_token_s is not None else []
        parts += [f"peak memory {format_size(peak_rss_bytes())}"]
        _say(("interrupted · " if code else "") + " · ".join(parts))
    return code


def chat(*, model: str, max_tokens: int, **options: Any) -> int:
    """Talk with a model; Ctrl-C ends an answer, Ctrl-D or /exit the chat, /reset forgets it all."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    with _loaded(model, options) as loaded:
        conversation = loaded.chat()
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            if text == "/exit":
                return 0
            if text == "/reset":
                conversation = loaded.chat()
            elif text:
                send = conversation.send(text, max_tokens=max_tokens, **_sampling(options))
                _stream(send)


def plan(*, model: str, json: bool, **options: Any) -> int:
    """Say from the file's header alone what a model takes here, and how fast it will be."""
    from headrace.planning import plan_model

    _show(plan_model(_path(model), **options).to_dict(), json)
    return 0


def bench(*, model: str, json: bool, **options: Any) -> int:
    """Measure prefill and decode, and the memory's read bandwidth in the same run."""
    from headrace.bench import bench as measure

    _show(measure(_path(model), **options), json)
    return 0


def perplexity(*, model: str, text: str, window: int, chunks: int | None, **rest: Any) -> int:
    """Score a text file (`-` is stdin) as llama.cpp does: the second half of each window."""
    from headrace.perplexity import perplexity as score

    as_json = rest.pop("json")
    try:
        if text == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(text, "rb") as file:
                data = file.read()
    except OSError as error:
        raise HeadraceError(f"cannot read the text {text}: {error.strerror}") from error
    with _loaded(model, {**rest, "context": window}) as loaded, _progress() as progress:
        decoded = data.decode("utf-8", errors="replace")
        result = score(loaded, decoded, context=window, chunks=chunks, progress=progress)
    _show(result, as_json)
    return 0


def inspect(*, model: str, json: bool) -> int:
    """Show what is in a model file and how it would load."""
    facts = describe_model(_path(model))
    if json:
        _print_json(facts)
        return 0
    types, metadata = facts.pop("types"), facts.pop("metadata")
    _show(facts, False)
    print("\ntypes")
    _table(types)
    print("\nmetadata")
    for key, value in metadata.items():
        print(f"  {_printable(key)}  {_printable(_value_text(value))}")
    return 0


def compress(*, src: str, dst: str, format: str, force: bool) -> int:
    """Write a model as a file of our own, which loads without repacking.

    Other programs can list what is in it, but not run it: keep the source if you need it elsewhere.
    """
    import shlex

    from headrace.compress import compress as write

    with _progress() as progress:
        done = write(src, dst, format=format, force=force, progress=progress)
    _say(
        f"{done.path}: {format_size(done.size_bytes)} (from {format_size(done.source_bytes)}); "
        f'try `headrace run {shlex.quote(str(done.path))} "Why is the sky blue?"`'
    )
    return 0


def pull(*, name: str, file: str | None) -> int:
    """Fetch a model into the cache and print its path."""
    from headrace.loaders.pull import pull as fetch

    with _progress() as progress:
        path = fetch(name, file=file, progress=progress, verify=True)
    print(path)
    return 0


# ---- the table of options -----------------------------------------------------------------------


def _size(text: str) -> int:
    return parse_size(text)


_MODEL = Opt(
    "model", str, _REQUIRED, "a file, a directory, org/repo[:file.gguf], or a name to pull"
)
_JSON = Opt("json", bool, False, "print one JSON object", ("--json",))
_TARGET = Opt("target", str, None, "a CPU target, such as x86-64-v3", ("--target",))
_MACHINE = (
    Opt("memory", _size, None, "memory to use: 300MB, 1.5GiB, 50%", ("--memory",)),
    Opt("threads", int, None, "threads; default: the physical cores", ("--threads", "-t")),
    _TARGET,
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
)
_PROMPT = Opt("prompt", str, None, "the question; - reads stdin")
_RAW = Opt("raw", bool, False, "continue the prompt as it is, without chat template", ("--raw",))
_DEFAULTED = _MODEL._replace(default=DEFAULT_MODEL)

COMMANDS: dict[str, Command] = {
    "run": Command(run, (_DEFAULTED, _PROMPT, *_SAMPLING, *_MACHINE, _CONTEXT, _RAW, _JSON)),
    "chat": Command(chat, (_DEFAULTED, *_SAMPLING, *_MACHINE, _CONTEXT)),
    "plan": Command(plan, (_MODEL, *_MACHINE, _CONTEXT, _JSON)),
    "bench": Command(
        bench,
        (
            _MODEL,
            Opt("prompt_tokens", int, 512, "tokens of the prefill", ("-p", "--prompt-tokens")),
            Opt("new_tokens", int, 128, "tokens of the decode", ("-n", "--new-tokens")),
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
            Opt("text", str, _REQUIRED, "a text file; - reads stdin"),
            Opt("window", int, 512, "tokens of a window", ("--context",)),
            Opt("chunks", int, None, "only so many windows", ("--chunks",)),
            *_MACHINE,
            _JSON,
        ),
    ),
    "compress": Command(
        compress,
        (
            Opt("src", str, _REQUIRED, _MODEL.help),
            Opt("dst", str, _REQUIRED, "the file to write, such as model.headrace.gguf"),
            Opt("format", str, "keep", "keep: each matrix as it loads", ("--format",)),
            Opt("force", bool, False, "replace the file if it exists", ("--force",)),
        ),
    ),
    "pull": Command(
        pull,
        (
            Opt("name", str, _REQUIRED, "smollm2-135m, org/repo or org/repo:file.gguf"),
            Opt("file", str, None, "the file in the repository, if it has several"),
        ),
    ),
}


# ---- parsing ------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == ["--version"]:
        return _guarded(_print_version, {})
    command = COMMANDS.get(arguments[0]) if arguments else None
    values = _parse(command, arguments[1:]) if command else None
    if command is not None and values is not None:
        return _guarded(command.function, values)
    return _typer_main(arguments)


def _parse(command: Command, arguments: list[str]) -> dict[str, Any] | None:
    """The values of a well-formed command line; None leaves help and errors to typer."""
    by_flag = {flag: option for option in command.options for flag in option.flags}
    positional = [option for option in command.options if not option.flags]
    values: dict[str, Any] = {option.name: option.default for option in command.options}
    rest = iter(arguments)
    try:
        for word in rest:
            flag, equals, value = word.partition("=")
            option = by_flag.get(flag)
            if option is None:
                if (word.startswith("-") and word != "-") or not positional:
                    return None
                option, value = positional.pop(0), word
            elif option.kind is bool:
                if equals:
                    return None
                value = "yes"
            elif not equals:
                value = next(rest)
            converted = option.kind(value)
            if option.many:
                converted = (*values[option.name], converted)
            values[option.name] = converted
    except (ValueError, StopIteration):
        return None
    return None if any(value is _REQUIRED for value in values.values()) else values


def _typer_main(arguments: list[str]) -> int:
    try:
        build_app()(arguments, prog_name="headrace")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def build_app() -> Typer:
    """The typer application of the same table: help, completion and messages on wrong usage."""
    import typer

    app = typer.Typer(no_args_is_help=True, help="Run language models on this machine.")

    def show_version(wanted: bool) -> None:
        if wanted:
            raise typer.Exit(_guarded(_print_version, {}))

    shown = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=show_version
    )

    @app.callback()
    def _root(version: bool = shown) -> None:
        pass

    for name, command in COMMANDS.items():
        app.command(name, help=command.function.__doc__)(_typer_function(command))
    return app


def _typer_function(command: Command) -> Callable[..., None]:
    from inspect import Parameter, Signature

    import typer

    def checked(option: Opt) -> Callable[[Any], Any]:
        def convert(value: Any) -> Any:
            try:
                return option.kind(value) if isinstance(value, str) else value
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error

        return convert

    def call(**values: Any) -> None:
        raise typer.Exit(_guarded(command.function, values))

    parameters = []
    for option in command.options:
        default = ... if option.default is _REQUIRED else option.default
        kind: Any = str if option.kind is _size else option.kind
        extra: dict[str, Any] = {"help": option.help}
        if option.kind is _size:
            extra |= {"callback": checked(option), "metavar": "SIZE"}
        if option.many:
            kind, default = list[str], []
        elif default is None:
            kind = kind | None
        info = (typer.Option if option.flags else typer.Argument)(default, *option.flags, **extra)
        parameters.append(
            Parameter(option.name, Parameter.KEYWORD_ONLY, default=info, annotation=kind)
        )
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _guarded(function: Callable[..., int], values: Mapping[str, Any]) -> int:
    try:
        code = function(**values)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except HeadraceError as error:
        _trace()
        hint = " (`run --raw` needs no chat template)" if isinstance(error, TemplateError) else ""
        _say(f"headrace: {error}{hint}")
        return 2
    except ValueError as error:  # what the API raises for an argument out of bounds
        _trace()
        _say(f"headrace: {error}")
        return 2
    except Exception as error:
        _trace()
        _say(f"headrace: unexpected {type(error).__name__}: {error} (HEADRACE_DEBUG=1 shows where)")
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


def _path(model: str) -> Path:
    from headrace.loaders.sources import resolve

    with _progress() as progress:
        return resolve(model, progress=progress)


@contextmanager
def _loaded(model: str, options: Mapping[str, Any]) -> Iterator[Any]:
    from headrace.model import load

    names = ("memory", "threads", "context", "target")
    with _progress() as progress:
        chosen = {name: options[name] for name in names if options.get(name) is not None}
        loaded = load(model, progress=progress, **chosen)
    with loaded:
        yield loaded


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop")
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


_BAR_AFTER_S = 0.3


@contextmanager
def _progress() -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on stderr if that is a terminal, and only for what takes a while."""
    first_s = time.perf_counter()
    bar: Any = None
    tasks: dict[str, Any] = {}

    def report(done: int, total: int | None, label: str) -> None:
        nonlocal bar
        if not terminal or (bar is None and time.perf_counter() - first_s < _BAR_AFTER_S):
            return
        if bar is None:
            bar = _make_bar()
            bar.start()
        if label not in tasks:
            tasks[label] = bar.add_task(_printable(label), total=total)
        bar.update(tasks[label], completed=done, total=total)

    terminal = sys.stderr.isatty()
    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _make_bar() -> Any:
    from rich import progress
    from rich.console import Console

    class Amount(progress.ProgressColumn):
        def render(self, task: Any) -> Any:
            big = (task.total or task.completed) >= 100_000  # bytes, and not kernels or windows
            shown = [format_size(n) if big else str(n) for n in (task.completed, task.total or 0)]
            return "/".join(shown if task.total else shown[:1])

    columns = ("{task.description}", progress.BarColumn(), Amount(), progress.TimeRemainingColumn())
    return progress.Progress(*columns, console=Console(stderr=True))


def describe_model(path: Path) -> dict[str, Any]:
    """What `headrace inspect` shows; only the header is read."""
    import math

    from headrace.loaders.tiled import open_model

    model = open_model(path)
    get = model.metadata.get
    vocabulary = get("tokenizer.ggml.tokens")
    types: dict[str, dict[str, Any]] = {}
    for tensor in model.tensors.values():
        row = types.setdefault(
            tensor.type,
            {"type": tensor.type, "tensors": 0, "parameters": 0, "bytes": 0, "loaded_bytes": 0},
        )
        row["tensors"] += 1
        row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.n_bytes
        loads_as, loaded_bytes = _how_it_loads(tensor)
        row["loaded_bytes"] += loaded_bytes
        row["loads_as"] = loads_as
    return {
        "file": str(path),
        "files": len(model.paths),
        "size_bytes": model.size_bytes,
        "gguf_version": model.version,
        "architecture": get("general.architecture"),
        "name": get("general.name"),
        "parameters": sum(row["parameters"] for row in types.values()),
        "tokenizer": get("tokenizer.ggml.model"),
        "pre_tokenizer": get("tokenizer.ggml.pre"),
        "vocabulary": len(vocabulary) if isinstance(vocabulary, Sequence) else None,
        "chat_template": "tokenizer.chat_template" in model.metadata,
        "types": sorted(types.values(), key=lambda row: -row["bytes"]),
        "metadata": {key: _shortened(value) for key, value in model.metadata.items()},
    }


def _how_it_loads(tensor: Any) -> tuple[str, int]:
    """(the kernel's format or what it is expanded to, bytes then)."""
    import math

    from headrace.loaders.tiled import format_name
    from headrace.sparse.expand import plan_expansion
    from headrace.sparse.registry import by_ggml_type

    if format_name(tensor.type) is not None:
        from headrace.weights import tiled_format

        tiled_format(tensor)
        return "kernel", tensor.n_bytes
    if by_ggml_type(tensor.type) is not None:
        return "kernel", tensor.n_bytes
    try:
        target = plan_expansion(tensor.type)
        rows, n = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        return f"expanded to {target.ggml_type}", rows * target.row_bytes(n)
    except (HeadraceError, ValueError):
        return "not supported", 0


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 2000 else {"characters": len(value), "first": value[:200]}
    if isinstance(value, int | float | bool):
        return value
    count = len(value)
    first = [_shortened(x.item() if hasattr(x, "item") else x) for x in value[:8]]
    return first if count <= 8 else {"count": count, "first": first}


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        if "characters" in value:
            return f"{value['first'][:80]!r}... ({value['characters']} characters)"
        return f"[{', '.join(_value_text(x) for x in value['first'][:4])}, ...] ({value['count']})"
    if isinstance(value, list):
        return f"[{', '.join(_value_text(x) for x in value)}]"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({len(text)} characters)"


def _printable(text: str) -> str:
    """A file's text without what could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, default=_jsonable), flush=True)


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _show(values: Mapping[str, Any], as_json: bool) -> None:
    """A dict as JSON or for people, who read `peak_bytes: 123456789` as `peak  123 MB`."""
    if as_json:
        _print_json(values)
        return
    tables = {k: v for k, v in values.items() if _is_table(v)}
    plain = {k: v for k, v in values.items() if k not in tables and v not in (None, [], ())}
    width = max((len(_label(k)) for k in plain), default=0)
    for key, value in plain.items():
        print(f"{_label(key):<{width}}  {_printable(_human(key, value))}")
    for key, rows in tables.items():
        print(f"\n{_label(key)}")
        _table(rows)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _label(key: str) -> str:
    for suffix in ("_bytes", "_tok_s", "_gb_s", "_s"):
        key = key.removesuffix(suffix)
    return key.replace("_", " ")


# The parts of a `MemoryPlan` are bytes whose names do not say so.
_PLAN_PARTS = {"file", "weights", "vectors", "kv_cache", "activations", "process", "budget"}


def _human(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_label(k)} {_human(k, v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_human(key, v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if "bytes" in key or key in _PLAN_PARTS:
            return format_size(value)
        units = {"_tok_s": " tok/s", "_gb_s": " GB/s", "_s": " s"}
        unit = next((text for end, text in units.items() if key.endswith(end)), "")
        return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + unit
    return str(value)


def _table(rows: list[dict[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_label(key) for key in keys]]
    cells += [[_printable(_human(key, row.get(key, ""))) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    numeric = [all(isinstance(r.get(key, 0), int | float) for r in rows) for key in keys]
    for line in cells:
        row = (
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        )
        print("  " + "  ".join(row).rstrip())


if __name__ == "__main__":
    sys.exit(main())
