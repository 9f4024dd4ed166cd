"""Run a planned network on an emulated chip: outputs, instructions, and the memory that it took."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.errors import KernelError
from headrace.micro.arithmetic import numbers_of
from headrace.micro.driver import BEHIND, DRIVER, HEADER
from headrace.micro.firmware import ARENA_SYMBOL, RUN, firmware_object, kernel_objects
from headrace.micro.network import Port
from headrace.micro.plan import MicroPlan
from headrace.targets import backend
from headrace.targets.bare_metal import board_of, linker_script
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import count_functions
from headrace.targets.emulation.machines import command_of, why_not
from headrace.targets.emulation.run import program_words, run_image
from headrace.targets.emulation.runtime import surroundings
from headrace.targets.freestanding import functions_object
from headrace.targets.ir_text import Place, argument_words
from headrace.targets.linker import link_bare, link_static
from headrace.targets.table import symbol_of

_ALIGNED = 16
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


class EmulatedNetwork:
    """A network as a program for an emulator, linked.

    Args:
        plan: of the network.
        folder: where the program goes, which has to stay.

    Raises:
        KernelError: nothing here emulates the chip, or a kernel does not compile.
    """

    def __init__(self, plan: MicroPlan, folder: str | Path) -> None:
        self.plan, target = plan, plan.target
        (self.machine,) = target.machines[:1] or ("",)
        if reason := why_not(self.machine):
            raise KernelError(f"{target.name} cannot be emulated: {reason}")
        self._folder, self._path = str(folder), Path(folder, "network.elf")
        board = board_of(self.machine)
        if board is not None:
            board = board.with_data(plan.arena_bytes + _BESIDE)
        text, word = surroundings(target, board)
        objects = [
            backend.emit_plain(text + self._main(word), target),
            firmware_object(plan, BEHIND),
            functions_object(target),
            *kernel_objects(plan),
            *KernelStore(target).objects([DRIVER]).values(),
        ]
        if board is None:
            link_static(objects, self._path)
        else:
            link_bare(objects, self._path, linker_script(board), {})
        self._what = f"network {plan.network.name} of {target.name} on {self.machine}"

    def _main(self, word: str) -> str:
        ends = []
        for ports in (self.plan.network.inputs, self.plan.network.outputs):
            ends.append(
                [x for p in ports for x in (self.plan.places[p.value.name], self._bytes(p))]
            )
        words = self.plan.target.word_bytes
        slots = [
            Place("image"), Place(ARENA_SYMBOL), self.plan.arena_bytes, Place(RUN),
            Place("inputs"), len(ends[0]) // 2, Place("outputs"), len(ends[1]) // 2,
        ]  # fmt: skip
        return f"""
@{ARENA_SYMBOL} = external global i8
declare void @{RUN}()
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

    def _bytes(self, port: Port) -> int:
        return port.value.elements * numbers_of(self.plan.network).dtype.itemsize

    def _image(self, runs: Sequence[Arrays], *, painting: bool) -> _Image:
        dtype = numbers_of(self.plan.network).dtype
        given = bytearray(HEADER)
        for arrays in runs:
            for port in self.plan.network.inputs:
                array = np.asarray(arrays[port.value.name])
                if array.shape != port.value.shape or array.dtype != dtype:
                    raise ValueError(
                        f"{port.name} is {array.dtype} {list(array.shape)}, and {dtype} "
                        f"{list(port.value.shape)} is wanted"
                    )
                given += np.ascontiguousarray(array).tobytes()
                given += bytes(-len(given) % _ALIGNED)
        header = np.array([len(runs), painting, len(given), 0], np.int64)
        given[:HEADER] = header.tobytes()
        one = sum(
            -(-self._bytes(port) // _ALIGNED) * _ALIGNED for port in self.plan.network.outputs
        )
        room = 16 if painting else 16 + one * len(runs)
        return _Image(bytes(given) + bytes(room), len(given))

    def _outputs(self, data: bytes, count: int) -> list[dict[str, np.ndarray]]:
        dtype, at, found = numbers_of(self.plan.network).dtype, 0, []
        for _ in range(count):
            arrays = {}
            for port in self.plan.network.outputs:
                flat = np.frombuffer(data, dtype, port.value.elements, at)
                arrays[port.value.name] = flat.reshape(port.value.shape)
                at += -(-self._bytes(port) // _ALIGNED) * _ALIGNED
            found.append(arrays)
        return found

    def run(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """Outputs by the values' names, for each of the inputs, which are so as well.

        Raises:
            IllegalInstructionError: the chip lacks an instruction.
            KernelError: the program fails otherwise.
        """
        image = self._image(runs, painting=False)
        command = [*(command_of(self.machine) or []), *program_words(self.machine, self._path)]
        run_image(command, image, self._what, self._own_folder)
        return self._outputs(image.came, len(runs))

    @property
    def _own_folder(self) -> str | None:
        return None if board_of(self.machine) is None else self._folder

    def used(self, arrays: Arrays) -> Used:
        """Memory that a run takes, by painting it before.

        Raises:
            KernelError: the program fails.
        """
        image = self._image([arrays], painting=True)
        command = [*(command_of(self.machine) or []), *program_words(self.machine, self._path)]
        run_image(command, image, self._what, self._own_folder)
        arena, stack = np.frombuffer(image.came, np.int64, 2)
        return Used(int(arena), int(stack))

    def instructions(self, arrays: Arrays) -> dict[str, int]:
        """Instructions of a run by kernel; `RUN` is what calls them.

        Raises:
            KernelError: the program cannot be counted.
        """
        names = {call.kernel: symbol_of(call.kernel) for call in self.plan.calls}
        image = self._image([arrays], painting=False)
        counts = count_functions(
            [RUN, *names.values()], self.plan.target, self.machine, self._path, image, self._what
        )
        return {RUN: counts[RUN], **{name: counts[symbol] for name, symbol in names.items()}}


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


def emulated(plan: MicroPlan, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """Outputs of a network on its chip, in an emulator; see `EmulatedNetwork.run`."""
    with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
        return EmulatedNetwork(plan, folder).run(runs)
