"""Run a program on an emulated chip: outputs, instructions, and the memory that it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.errors import KernelError
from headrace.micro.driver import BEHIND, DRIVER, HEADER
from headrace.micro.firmware import ARENA_SYMBOL, INIT, firmware_object, kernel_objects
from headrace.micro.packing import ALIGNED
from headrace.micro.program import Program
from headrace.targets import backend
from headrace.targets.bare_metal import board_of, linker_script
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import FunctionCounts, count_functions
from headrace.targets.emulation.machines import command_of, why_not
from headrace.targets.emulation.run import program_words, run_image
from headrace.targets.emulation.runtime import surroundings
from headrace.targets.freestanding import functions_object
from headrace.targets.ir_text import Place, argument_words
from headrace.targets.linker import link_bare, link_static
from headrace.targets.table import symbol_of

FILE = "network.elf"
_OTHER_DATA = 4096  # bytes, at most, of variables beside the arena
_BESIDE = 64 << 10  # bytes of variables and constants beside the arena
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Used:
    """Memory that a run took.

    Attributes:
        arena_bytes: up to the last byte that was written to.
        stack_bytes: of the network's functions.
    """

    arena_bytes: int
    stack_bytes: int


class Emulated:
    """A program for a chip, linked for an emulator.

    Args:
        program: what it is.
        folder: where its file goes, which has to stay.

    Raises:
        KernelError: nothing here emulates the chip, or a kernel does not compile.
    """

    def __init__(self, program: Program, folder: str | Path) -> None:
        self.program, target = program, program.target
        (self.machine,) = target.machines[:1] or ("",)
        if reason := why_not(self.machine):
            raise KernelError(f"{target.name} cannot be emulated: {reason}")
        self._functions = list(program.functions)
        self._path = Path(folder, FILE)
        board = board_of(self.machine)
        if board is not None:
            board = board.with_data(program.arena_bytes + BEHIND + _OTHER_DATA)
        text, word = surroundings(target, board)
        objects = [
            backend.emit_plain(text + self._main(word), target),
            firmware_object(program, BEHIND),
            functions_object(target),
            *kernel_objects(program),
            *KernelStore(target).objects([DRIVER]).values(),
        ]
        if board is None:
            link_static(objects, self._path)
        else:
            link_bare(objects, self._path, linker_script(board, len(program.constants)), {})
        self._folder = None if board is None else str(folder)
        self._what = f"{program.name} of {target.name} on {self.machine}"

    def _main(self, word: str) -> str:
        words = self.program.target.word_bytes
        ends = [
            [x for one in arrays for x in (one.offset, one.n_bytes)] or [0]
            for arrays in (self.program.inputs, self.program.outputs)
        ]
        first, second = self._functions[0], self._functions[-1]
        slots: list[int | float | Place] = [
            Place("image"), Place(ARENA_SYMBOL), self.program.arena_bytes, Place(first),
            Place(second), Place(INIT), Place("inputs"), len(self.program.inputs),
            Place("outputs"), len(self.program.outputs),
        ]  # fmt: skip
        functions = {first, second, INIT}
        return f"""
@{ARENA_SYMBOL} = external global i8
{"".join(f"declare void @{name}()" + chr(10) for name in sorted(functions))}
declare void @{symbol_of(DRIVER.name)}(ptr, i64, i64)
{argument_words("inputs", ends[0], words)}{argument_words("outputs", ends[1], words)}
{argument_words("arguments", slots, words)}
define void @main() noinline {{
  %n = call {word} @read_image()
  call void @{symbol_of(DRIVER.name)}(ptr @arguments, i64 0, i64 1)
  call void @write_image({word} %n)
  ret void
}}
"""

    def _image(self, runs: Sequence[Arrays], names: Sequence[str], *, painting: bool) -> _Image:
        given = bytearray(HEADER)
        for arrays in runs:
            for one in self.program.inputs:
                array = np.asarray(arrays[one.name])
                if array.shape != one.shape or array.dtype != one.dtype:
                    raise ValueError(
                        f"{one.name} is {array.dtype} {list(array.shape)}, and {one.dtype} "
                        f"{list(one.shape)} is wanted"
                    )
                given += np.ascontiguousarray(array).tobytes()
                given += bytes(-len(given) % ALIGNED)
        kinds = len(given)
        given += bytes(self._functions.index(name) for name in names)
        given += bytes(-len(given) % ALIGNED)
        header = np.array([len(runs), painting, len(given), kinds], np.int64)
        given[:HEADER] = header.tobytes()
        one_run = sum(_aligned(one.n_bytes) for one in self.program.outputs)
        room = ALIGNED if painting else ALIGNED + one_run * len(runs)
        return _Image(bytes(given) + bytes(room), len(given))

    def _outputs(self, data: bytes, count: int) -> list[dict[str, np.ndarray]]:
        at, found = 0, []
        for _ in range(count):
            arrays = {}
            for one in self.program.outputs:
                flat = np.frombuffer(data, one.dtype, int(np.prod(one.shape)), at)
                arrays[one.name] = flat.reshape(one.shape)
                at += _aligned(one.n_bytes)
            found.append(arrays)
        return found

    def _ran(self, image: _Image) -> bytes:
        command = [*(command_of(self.machine) or []), *program_words(self.machine, self._path)]
        run_image(command, image, self._what, self._folder)
        return image.came

    def run(
        self, runs: Sequence[Arrays], functions: Sequence[str] | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Outputs by name for each of the inputs, one run after the other in one memory.

        Args:
            runs: inputs by name.
            functions: what each run calls; None: the program's first function.

        Raises:
            IllegalInstructionError: the chip lacks an instruction.
            KernelError: the program fails otherwise.
            ValueError: an input has another shape or type.
        """
        names = [self._functions[0]] * len(runs) if functions is None else functions
        return self._outputs(self._ran(self._image(runs, names, painting=False)), len(runs))

    def used(self, arrays: Arrays, function: str | None = None) -> Used:
        """Memory that a run takes, by painting it before.

        Raises:
            KernelError: the program fails.
        """
        name = self._functions[0] if function is None else function
        came = self._ran(self._image([arrays], [name], painting=True))
        arena, stack = np.frombuffer(came, np.int64, 2)
        return Used(int(arena), int(stack))

    def counts(self, arrays: Arrays, function: str | None = None) -> dict[str, FunctionCounts]:
        """What a run does by kernel; the function's own part is what calls them.

        Raises:
            KernelError: the program cannot be counted.
        """
        name = self._functions[0] if function is None else function
        calls = self.program.functions[name]
        names = {call.kernel: symbol_of(call.kernel) for call in calls}
        counts = count_functions(
            [name, *names.values()], self.program.target, self.machine, self._path,
            self._image([arrays], [name], painting=False), self._what,
        )  # fmt: skip
        return {name: counts[name], **{kernel: counts[symbol] for kernel, symbol in names.items()}}


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNED) * ALIGNED


class _Image:
    """What the driver reads, and its results."""

    def __init__(self, data: bytes, results: int) -> None:
        self.data, self._results = data, results
        self.came = b""

    def restore(self, data: bytes) -> None:
        """Take what came back."""
        if len(data) != len(self.data):
            raise KernelError(f"{len(data)} bytes came back instead of {len(self.data)}")
        self.came = data[self._results :]


def total(counts: Mapping[str, FunctionCounts]) -> FunctionCounts:
    """Of all kernels."""
    return FunctionCounts(
        sum(one.instructions for one in counts.values()), sum(one.cycles for one in counts.values())
    )
