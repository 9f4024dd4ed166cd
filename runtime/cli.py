"""The `headrace` command.

Exit codes: 0 done; 1 a failure that nobody foresaw; 2 wrong usage, or a `HeadraceError` (one line
on stderr says what is wrong and what to do); 130 Ctrl-C; 141 the reader of stdout went away.
`HEADRACE_DEBUG=1` shows tracebacks.

The options stand in one table; see `headrace.cli_options`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from headrace import cli_learning
from headrace.cli_commands import (
    DEFAULT_MODEL,
    bench,
    chat,
    compare,
    embed,
    inspect,
    perplexity,
    plan,
    pull,
    run,
)
from headrace.cli_compress import compress
from headrace.cli_options import REQUIRED, Command, Opt, bits, build_app, parse
from headrace.cli_output import say
from headrace.cli_routing import trace
from headrace.cli_sampling import RAW, SAMPLING
from headrace.cli_targets import targets_build, targets_export, targets_list, targets_test
from headrace.errors import HeadraceError, TemplateError
from headrace.sizes import parse_size

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
_WHOLE_STACK = Opt(
    "whole_stack",
    bool,
    False,
    "compute with all blocks of a stack, reading for each token what does not fit",
    ("--whole-stack",),
)
_PREDICTOR = Opt(
    "predictor",
    str,
    None,
    "asks for experts ahead: fitted (the default), gates, pairs, affinity, none",
    ("--predictor",),
)
_CONTEXT = Opt("context", int, None, "tokens of context; default: the model's", ("--context",))
_PROMPT = Opt("prompt", str, None, "the question; - reads stdin")
_INPUTS = Opt(
    "inputs", str, (), "of an ONNX file: NAME=FILE.npy (again for others)", ("--input",), many=True
)
_SHAPED = _INPUTS._replace(help="of an ONNX file: NAME=FILE.npy, or DIMENSION=SIZE")
_PATCHES = Opt("patches", str, None, "of an ONNX file: auto, off, or 3 for 3 x 3", ("--patches",))
_SRAM = Opt("sram", parse_size, None, "of a microcontroller: 64KiB", ("--sram",))
_FLASH = Opt("flash", parse_size, None, "of a microcontroller: 1MiB", ("--flash",))
_EMULATE = Opt("emulate", bool, False, "run on an emulated microcontroller", ("--emulate",))
_OUTPUT = Opt("output", str, None, "folder for outputs, or for what is learned", ("-o", "--output"))
_SYSTEM = Opt("system", str, None, "what the model is told before the conversation", ("--system",))
_DEFAULTED = _MODEL._replace(default=DEFAULT_MODEL)

COMMANDS: dict[str, Command] = {
    "run": Command(
        run,
        (
            _DEFAULTED,
            _PROMPT,
            *SAMPLING,
            *_MACHINE,
            _WHOLE_STACK,
            _PREDICTOR,
            _CONTEXT,
            RAW,
            _INPUTS,
            _PATCHES,
            _SRAM,
            _EMULATE,
            cli_learning.WEIGHTS,
            cli_learning.TRAIN,
            *cli_learning.HOW,
            *cli_learning.LESSONS,
            _OUTPUT,
            _JSON,
        ),
    ),
    "chat": Command(
        chat, (_DEFAULTED, _SYSTEM, *SAMPLING, *_MACHINE, _WHOLE_STACK, _PREDICTOR, _CONTEXT)
    ),
    "plan": Command(
        plan,
        (
            _MODEL,
            *_MACHINE,
            _WHOLE_STACK,
            _PREDICTOR,
            _CONTEXT,
            _SHAPED,
            _PATCHES,
            _SRAM,
            _FLASH,
            cli_learning.WEIGHTS,
            cli_learning.TRAIN,
            *cli_learning.HOW,
            _JSON,
        ),
    ),
    "bench": Command(
        bench,
        (
            _MODEL,
            Opt("prompt_tokens", int, 512, "tokens of the prefill", ("-p", "--prompt-tokens")),
            Opt("new_tokens", int, 128, "tokens of the decode", ("-n", "--new-tokens")),
            Opt("context_tokens", int, 0, "decode after so many tokens", ("--context-tokens",)),
            _CONTEXT._replace(help="tokens of context; default: as many as are needed"),
            Opt("runs", int, 3, "take the best of so many", ("--runs",)),
            _PREDICTOR,
            *_MACHINE,
            _WHOLE_STACK,
            _SHAPED,
            _PATCHES,
            _SRAM,
            cli_learning.WEIGHTS,
            _JSON,
        ),
    ),
    "inspect": Command(inspect, (_MODEL, _SHAPED, _TARGET, _JSON)),
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
    "embed": Command(
        embed,
        (
            Opt("model", str, REQUIRED, "directory of a text encoder, or its .onnx file"),
            Opt("texts", str, (), "texts; without any, the lines of stdin", many=True),
            Opt("output", str, None, "write the vectors to this .npy file", ("-o", "--output")),
            Opt("threads", int, None, "threads; default: the physical cores", ("--threads", "-t")),
            _MACHINE[0],
            _TARGET,
            _JSON,
        ),
    ),
    "compare": Command(
        compare,
        (
            Opt("reference", str, REQUIRED, "what it should equal: " + _MODEL.help),
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
            Opt("format", str, "keep", "q4_0, gqs_g32 ...; keep: as it loads", ("--format",)),
            Opt("ends", str, None, "format of embedding and head", ("--ends",)),
            Opt("method", str, None, "rtn, search or gptq", ("--method",)),
            Opt("sparsity", float, None, "share to leave out (gqs_...: 0.5)", ("--sparsity",)),
            Opt("pattern", str, None, "outputs x inputs of ONNX files: 1x1, 4x1", ("--pattern",)),
            Opt("rank", int, None, "vectors of a block of bitstack", ("--rank",)),
            Opt("sort", str, "error", "a stack's blocks: error or perplexity", ("--sort",)),
            Opt("to_moe", bool, False, "cut feed-forwards into experts", ("--to-moe",)),
            Opt("experts", int, None, "so many for a layer (16)", ("--experts",)),
            Opt("active", int, None, "so many of them for a token (4)", ("--active",)),
            Opt("shared", float, None, "share that all tokens take (1/3)", ("--shared",)),
            Opt("fit_shared", bool, False, "fit these to what is missing", ("--fit-shared",)),
            Opt("neuron_clusters", int, None, "cut ReLU neurons so", ("--neuron-clusters",)),
            Opt("expert_bits", bits, None, "widths of experts: 2,4,8", ("--expert-bits",)),
            Opt("expert_loss", float, None, "what that may cost (0.02)", ("--expert-loss",)),
            Opt("expert_over", int, None, "over all at so many bits", ("--expert-over",)),
            Opt("calibrate", str, None, "a text (ONNX: .npy) to look at", ("--calibrate",)),
            Opt("calibrate_tokens", int, None, "so much of it (65536)", ("--calibrate-tokens",)),
            Opt("evaluate", str, None, "another, for the price tag", ("--evaluate",)),
            Opt("evaluate_tokens", int, None, "so much of it (32768)", ("--evaluate-tokens",)),
            Opt("force", bool, False, "replace the file if it exists", ("--force",)),
            *_MACHINE[:2],
            _JSON,
        ),
    ),
    "trace": Command(
        trace,
        (
            _MODEL,
            Opt("text", str, REQUIRED, "a text file; - reads stdin"),
            Opt("output", str, None, "the file to write", ("-o", "--output")),
            Opt("learn", bool, False, "keep statistics beside the model", ("--learn",)),
            Opt("tokens", int, None, "so much of the text (32768)", ("--tokens",)),
            *_MACHINE[:2],
            _JSON,
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
            Opt("output", str, REQUIRED, "the executable, or folder, to write", ("-o", "--output")),
            Opt("cpu", str, None, "the best for this CPU, such as cortex-a76", ("--cpu",)),
            Opt("context", int, None, "tokens; default: the model's, at most 4096", ("--context",)),
            _SRAM,
            cli_learning.WEIGHTS,
            cli_learning.TRAIN,
            *cli_learning.HOW,
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
        where = "" if error.filename is None else f"{error.filename}: "
        say(f"headrace: {where}{error.strerror or error}")
        return 1
    except Exception as error:
        _trace()
        say(f"headrace: unexpected {type(error).__name__}: {error} (HEADRACE_DEBUG=1 shows where)")
        return 1


def _trace() -> None:
    if os.environ.get("HEADRACE_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()


def _print_version() -> int:
    from headrace import __version__

    print(f"headrace {__version__}")
    return 0
