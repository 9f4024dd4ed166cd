"""Run a program on an emulated chip: outputs, instructions, and the memory that it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.errors import KernelError
from headrace.micro.driver import BEHIND, CLOSE, DRIVER, HEADER
from headrace.micro.firmware import ARENA_SYMBOL, INIT, firmware_object, kernel_objects
from headrace.micro.packing import ALIGNED
from headrace.micro.program import PlacedArray, Program
from headrace.micro.stack import stack_bytes
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
from headrace.targets.soft_float_calls import routines_in
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
        stack_bytes: of the network's functions, to 16 bytes. Of 64 and less it is unknown how much
            is used: it is 64, or the bound of `headrace.micro.stack`, if that is less.
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
        kernels = kernel_objects(program)
        self._routines = routines_in(kernels)
        objects = [
            backend.emit_plain(text + self._main(word), target),
            firmware_object(program, BEHIND),
            functions_object(target),
            *kernels,
            *KernelStore(target).objects([DRIVER]).values(),
        ]
        if board is None:
            link_static(objects, self._path)
        else:
            link_bare(objects, self._path, linker_script(board, len(program.constants)), {})
        self._folder = None if board is None else str(folder)
        self._what = f"{program.name} of {target.name} on {self.machine}"

    def _main(self, word: str) -> str:
        program, words = self.program, self.program.target.word_bytes
        ports = {"inputs": program.inputs, "outputs": program.outputs, "state": program.state}
        ends = {
            name: [x for one in arrays for x in (one.offset, one.n_bytes)] or [0]
            for name, arrays in ports.items()
        }
        slots: list[int | float | Place] = [
            Place("image"), Place(ARENA_SYMBOL), program.arena_bytes, Place("functions"),
            Place(INIT),
        ]  # fmt: skip
        for name, arrays in ports.items():
            slots += [Place(name), len(arrays)]
        slots += [Place("mark"), Place("marked")]
        functions = [Place(name) for name in self._functions]
        return f"""
@{ARENA_SYMBOL} = external global i8
{"".join(f"declare void @{name}()" + chr(10) for name in sorted({*self._functions, INIT}))}
declare void @{symbol_of(DRIVER.name)}(ptr, i64, i64)
{"".join(argument_words(name, values, words) for name, values in ends.items())}
{argument_words("functions", functions, words)}
{argument_words("arguments", slots, words)}
@marked = global i64 0
declare ptr @llvm.stacksave.p0()
define void @mark() noinline {{
  %sp = call ptr @llvm.stacksave.p0()
  store ptr %sp, ptr @marked
  ret void
}}
define void @main() noinline {{
  %n = call {word} @read_image()
  call void @{symbol_of(DRIVER.name)}(ptr @arguments, i64 0, i64 1)
  call void @write_image({word} %n)
  ret void
}}
"""

    def _image(
        self, runs: Sequence[Arrays], names: Sequence[str], *, painting: bool,
        state: Arrays | None = None,
    ) -> _Image:  # fmt: skip
        given = bytearray(HEADER)
        for arrays in runs:
            for one in self.program.inputs:
                given += _checked(one, arrays).tobytes()
                given += bytes(-len(given) % ALIGNED)
        kinds = len(given)
        given += bytes(self._functions.index(name) for name in names)
        given += bytes(-len(given) % ALIGNED)
        known = len(given) if state is not None else 0
        if state is not None:
            for one in self.program.state:
                given += _checked(one, state).tobytes()
                given += bytes(-len(given) % ALIGNED)
        header = np.array([len(runs), painting, len(given), kinds, known], np.int64)
        given[: header.nbytes] = header.tobytes()
        room = ALIGNED if painting else ALIGNED + self._result_bytes(len(runs))
        return _Image(bytes(given) + bytes(room), len(given))

    def _result_bytes(self, runs: int) -> int:
        one_run = sum(_aligned(one.n_bytes) for one in self.program.outputs)
        return one_run * runs + sum(_aligned(one.n_bytes) for one in self.program.state)

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
        return self.run_on(runs, functions)[0]

    def run_on(
        self, runs: Sequence[Arrays], functions: Sequence[str] | None = None,
        state: Arrays | None = None,
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:  # fmt: skip
        """The same, and what stays from run to run, as it is behind the last one.

        Args:
            state: what that is at first, by name; None: as the program has it.

        Raises:
            IllegalInstructionError, KernelError, ValueError: as `run`.
        """
        names = [self._functions[0]] * len(runs) if functions is None else functions
        data, at = self._ran(self._image(runs, names, painting=False, state=state)), 0
        found: list[dict[str, np.ndarray]] = []
        for arrays in (*[self.program.outputs] * len(runs), self.program.state):
            found.append({})
            for one in arrays:
                flat = np.frombuffer(data, one.dtype, int(np.prod(one.shape)), at)
                found[-1][one.name] = flat.reshape(one.shape)
                at += _aligned(one.n_bytes)
        return found[:-1], found[-1]

    def used(self, arrays: Arrays, function: str | None = None) -> Used:
        """Memory that a run takes, by painting it before.

        Raises:
            KernelError: the program fails.
        """
        name = self._functions[0] if function is None else function
        came = self._ran(self._image([arrays], [name], painting=True))
        arena, stack = (int(n) for n in np.frombuffer(came, np.int64, 2))
        return Used(arena, stack if stack > CLOSE else min(stack, stack_bytes(self.program)))

    def counts(self, arrays: Arrays, function: str | None = None) -> dict[str, FunctionCounts]:
        """What a run does by kernel; the function's own part is what calls them.

        Where the chip has no floating-point unit, what is called in its place is beside kernels.

        Raises:
            KernelError: the program cannot be counted.
        """
        name = self._functions[0] if function is None else function
        calls = self.program.functions[name]
        kernels = dict.fromkeys(call.kernel for call in calls)
        names = {one: symbol_of(one) for one in (*kernels, *self._routines)}
        counts = count_functions(
            [name, *names.values()], self.program.target, self.machine, self._path,
            self._image([arrays], [name], painting=False), self._what,
        )  # fmt: skip
        return {name: counts[name], **{kernel: counts[symbol] for kernel, symbol in names.items()}}


def _checked(one: PlacedArray, arrays: Arrays) -> np.ndarray:
    array = np.asarray(arrays[one.name])
    if array.shape != one.shape or array.dtype != one.dtype:
        raise ValueError(
            f"{one.name} is {array.dtype} {list(array.shape)}, and {one.dtype} {list(one.shape)} "
            "is wanted"
        )
    return np.ascontiguousarray(array)


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
