"""Make an executable that holds a model and needs nothing: no Python, no libc, no files."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.atomic_file import check_replaceable, publish
from headrace.errors import BudgetError, ContextOverflowError, KernelError, UnsupportedError
from headrace.loaders.tiled import open_model
from headrace.plan import ZERO, buffer_sizes, kernels_of, kv_bytes, modes
from headrace.planning import Prepared, prepare_for
from headrace.sizes import format_size
from headrace.standalone import driver
from headrace.standalone.constants import constant_sizes, vocabulary_pieces, write_constants
from headrace.standalone.places import DATA, ProgramPlaces, place_of
from headrace.standalone.program import Argument, program_ir
from headrace.steps import Forward
from headrace.targets import backend
from headrace.targets.cache import KernelStore
from headrace.targets.freestanding import functions_object
from headrace.targets.linker import find_linker, link_program
from headrace.targets.linux import system_of
from headrace.targets.target import Target
from headrace.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]

ADDRESS_SPACE_32 = 2 << 30  # bytes that 32-bit Linux surely has for a program


@dataclass(frozen=True)
class Exported:
    """What an executable takes: bytes of its file, and of what it has in memory beside it."""

    path: Path
    file_bytes: int
    buffer_bytes: int
    context: int


def export(
    path: Path, target: Target, output: str | Path, *, context: int | None = None,
    n_workers: int = 1, progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """Write an executable for Linux that continues token ids with a model.

    Args:
        path: the model's file.
        target: the CPU level; it must not be above the CPU's that runs it.
        output: the executable.
        context: tokens that fit, at least 2; default: the model's own, at most 4096.
        n_workers: processes that compile at once.
        progress: called with (done, total, what).

    Raises:
        ModelFileError, UnsupportedError: the model cannot be used.
        ContextOverflowError: the context is longer than the model's, or has no room for an answer.
        BudgetError: it does not fit in a 32-bit target's address space.
        KernelError: a kernel does not compile, there is no linker, the target runs no Linux, or
            `output` is empty.
        OSError: `output` cannot be written, or is no file, or the model.
    """
    if not os.fspath(output):
        raise KernelError("an executable needs a name: give one, such as ./smol")
    output = Path(output)
    system_of(target)
    find_linker()
    file = open_model(path)
    check_replaceable(output)
    if output.exists() and any(output.samefile(one) for one in file.paths):
        raise FileExistsError(errno.EEXIST, "that is the model itself", str(output))
    prepared = prepare_for(target, file, context, threads=1)
    if prepared.shape.context < 2:
        raise ContextOverflowError(
            "a context of 1 token has no room for a prompt and an answer: take 2 or more"
        )
    if prepared.stack is not None:
        raise UnsupportedError(
            "weights are stacks of blocks, which executables cannot run: export another file of "
            "this model",
            path=path,
        )
    decoder, shape = prepared.decoder, prepared.shape
    if decoder.in_parts():
        raise UnsupportedError(
            "executables cannot run mixtures of experts or clusters of neurons", path=path
        )
    tokenizer = Tokenizer.from_metadata(file.metadata, path)
    vocabulary = vocabulary_pieces(tokenizer, decoder.vocabulary)
    buffers = buffer_sizes(decoder, prepared.placed, target, shape)
    del buffers["few_logits"]  # nothing is guessed
    places = ProgramPlaces(
        constant_sizes(prepared, vocabulary),
        {
            **buffers,
            "prompt": shape.context * 8,
            "digits": driver.DIGITS,
            "request": 3 * 8,
        },
        decoder.embedding.name,
    )
    kv = kv_bytes(decoder, shape.context)
    _check_space(path, target, places, kv)
    placed = {one.matrix.name: one for one in prepared.placed}
    forward = Forward(decoder, placed, shape, places, target)
    programs = {name: forward.steps(mode) for name, mode in modes(target).items()}
    used = {step.kernel for steps in programs.values() for step in steps}
    kernels = [k for k in kernels_of(decoder, prepared.placed, target) if k.name in used]
    kernels.append(driver.ROW)
    state = place_of(places.buffer("state", False))
    assert state is not None
    text = program_ir(
        target, programs, _arguments(prepared, places, sorted(tokenizer.eos_ids)), state, ZERO,
        places.buffer_bytes, kv,
    )  # fmt: skip
    # Beside the output: there is room for it, and it gets its name when it is whole. Made before
    # kernels are compiled, which takes long, so that a folder that cannot be written is known.
    with tempfile.TemporaryDirectory(prefix=".headrace-", dir=output.parent) as folder:
        objects = KernelStore(target, n_workers).objects(kernels, progress)
        code = [backend.emit_plain(text, target), functions_object(target), *objects.values()]
        data, program = Path(folder, "constants.bin"), Path(folder, "program")
        write_constants(
            data, prepared, vocabulary, places.constants, places.constant_bytes, progress
        )
        link_program(code, data, DATA, program)
        publish(program, output)
    return Exported(output, output.stat().st_size, places.buffer_bytes + kv, shape.context)


def _check_space(path: Path, target: Target, places: ProgramPlaces, kv: int) -> None:
    needed = places.constant_bytes + places.buffer_bytes + kv
    if target.word_bytes == 4 and needed > ADDRESS_SPACE_32:
        raise BudgetError(
            f"{path}: weights, buffers and cache take {format_size(needed)}, more than the "
            f"{format_size(ADDRESS_SPACE_32)} of a program for {target.name}: take a smaller model "
            "or a shorter context",
            needed_bytes=needed,
        )


def _arguments(
    prepared: Prepared, places: ProgramPlaces, ends: Sequence[int]
) -> dict[str, Argument]:
    size, context = prepared.decoder.vocabulary, prepared.shape.context
    return {
        **{
            name: places.buffer(name, False)
            for name in ("state", "ids", "logits", "prompt", "digits", "request")
        },
        **{name: places.constant(name) for name in ("pieces", "text", "flags")},
        "vocabulary": size,
        "context": context,
        "chunk": prepared.shape.chunk,
        "ends": list(ends),
        "n_ends": len(ends),
        "option_ids": "--ids",
        "option_n": "-n",
        "option_print_ids": "--print-ids",
        "option_help": "--help",
        "usage": (
            "usage: --ids ID,ID,... [-n TOKENS] [--print-ids]\n"
            f"Continues token ids with {prepared.file.source.name}, greedily, by "
            f"{driver.DEFAULT_TOKENS} tokens or -n; --print-ids shows ids instead of text.\n"
        ),
        "unknown": ": no such option; a value follows its option after a space\n",
        "no_value": " needs a value\n",
        "bad_ids": f"--ids takes 1 to {context - 1} ids from 0 to {size - 1}, such as 1,2,3\n",
        "bad_n": "-n takes a number of tokens\n",
        "too_long": f"the ids and the new tokens do not fit in the context of {context} tokens\n",
        "newline": "\n",
    }
