"""The matrices of a model's layers decomposed into blocks, on the disk until their order is known.

They lie in a file that can be gone on with (`headrace.partial_file`): of each matrix all its
blocks, then by how much each lessens the error of the matrix's output, float64 [levels].
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from headrace.errors import UnsupportedError
from headrace.families.decoder import Matrix
from headrace.finite import check_matrix
from headrace.least_memory import Need
from headrace.loaders.gguf import TensorReader
from headrace.loaders.progress import Progress
from headrace.partial_file import PartialFile
from headrace.placing import PlacedMatrix
from headrace.rounding import Factors, Inputs, factor_bytes, too_little
from headrace.rows import raw_rows
from headrace.share import share
from headrace.sparse.bitstack import BlockShape, decompose, pack
from headrace.sparse.bitstack_fit import decompose_for, error
from headrace.sparse.format import Floats

InputsOf = Callable[[str], Inputs | None]

# What decomposing takes for each weight at a time: the matrix, what is left, temporaries.
_BYTES_PER_WEIGHT = 56


@dataclass(frozen=True)
class MadeBlock:
    """A block in the file, and by how much it lessens the error of its matrix's output."""

    matrix: Matrix
    level: int
    index: int  # of the matrix in a pass
    offset: int
    n_bytes: int
    gain: float


@dataclass(frozen=True)
class Blocks:
    """What is to be made, and where in the file.

    Attributes:
        stacked: the matrices, in the order of a pass.
        rank: vectors of a block.
        levels: blocks of a matrix.
    """

    stacked: tuple[PlacedMatrix, ...]
    rank: int
    levels: int

    def _shape(self, index: int) -> BlockShape:
        matrix = self.stacked[index].matrix
        return BlockShape(matrix.rows, matrix.columns, self.rank)

    def _bytes(self, index: int) -> int:
        return self.levels * (self._shape(index).n_bytes + 8)

    @property
    def offsets(self) -> list[int]:
        """Where the blocks of each matrix begin, and the end."""
        sizes = (self._bytes(i) for i in range(len(self.stacked)))
        return list(accumulate(sizes, initial=0))

    def in_order(self, file: PartialFile | None, losses: Floats | None = None) -> list[MadeBlock]:
        """All blocks, when all are in the file: level by level, those first that are worth most.

        The first blocks of all matrices are in the order of a pass.

        Args:
            file: with all blocks; None: as if all were worth the same, to know what they take.
            losses: of the model with each block but the first ones, the lower, the better:
                [levels - 1, matrices], NaN of whole levels that were not measured.

        Raises:
            OSError: the file cannot be read.
        """
        made = []
        for i, start in enumerate(self.offsets[:-1]):
            size = self._shape(i).n_bytes
            gains = np.zeros(self.levels)
            if file is not None:
                gains = np.frombuffer(file.read(start + self.levels * size, 8 * self.levels))
            for level, gain in enumerate(gains.tolist()):
                matrix = self.stacked[i].matrix
                made.append(MadeBlock(matrix, level, i, start + level * size, size, gain))

        def key(one: MadeBlock) -> tuple[int, float, float, int]:
            if one.level == 0:
                return 0, 0.0, 0.0, one.index
            loss = float("nan") if losses is None else float(losses[one.level - 1, one.index])
            return one.level, 0.0 if np.isnan(loss) else loss, -one.gain, one.index

        return sorted(made, key=key)

    def make(
        self, reader: TensorReader, file: PartialFile, inputs: InputsOf | None, n_threads: int,
        room: int | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        """Decompose what the file has not got yet.

        Args:
            inputs: what the inputs of a matrix were like on some text, by its name; called in the
                order of a pass. Without it all inputs count the same.
            n_threads: that decompose, a matrix each; fewer where memory is short.
            room: bytes that this may take; None: no limit.
            progress: called with (done, total, what).

        Raises:
            BudgetError: the work on one matrix does not fit.
            ModelFileError: the source cannot be read, or has weights that are no finite numbers.
            UnsupportedError: a weight is beyond what blocks can hold.
            OSError: the disk cannot take it.
        """
        offsets, lock, done = self.offsets, threading.Lock(), set(range(file.done))
        complete = file.done

        def jobs() -> Iterator[tuple[int, Inputs | None, Floats | None]]:
            """One at a time, so that inputs are asked for in the order of a pass."""
            factors = Factors(room)
            for i in range(file.done, len(self.stacked)):
                name = self.stacked[i].matrix.name
                found = None if inputs is None else inputs(name)
                yield i, found, None if found is None else factors.of(name, found)

        def work(job: tuple[int, Inputs | None, Floats | None]) -> None:
            nonlocal complete
            index, found, factor = job
            at, gains = offsets[index], []
            with np.errstate(all="ignore"):  # what is beyond float16 becomes an error
                for raw, gain in self._decomposed(index, reader, found, factor):
                    file.write(at, raw)
                    at += raw.nbytes
                    gains.append(gain)
            file.write(at, np.array(gains, np.float64).view(np.uint8))
            with lock:
                done.add(index)
                while complete in done:
                    complete += 1
                file.finish(complete)

        def report() -> None:
            if progress is not None:
                progress(len(done), len(self.stacked), "decomposing")

        share(jobs(), work, self._threads(n_threads, room), report)

    def needs(self, held: Callable[[str], int] | None) -> list[Need]:
        """What each matrix takes at least, on one thread.

        Args:
            held: bytes of the statistics that are in memory with those of a matrix, by its name;
                None: there are none.
        """
        beside = self._beside()
        found = []
        for p in self.stacked:
            m = p.matrix
            factor = 0 if held is None else factor_bytes(m.columns, held(m.name))
            found.append((m.name, max(beside + _work_bytes(m), factor)))
        return found

    def _beside(self) -> int:
        """Bytes of the statistics of two inputs, and what is made of them."""
        most: int = max((p.matrix.columns for p in self.stacked), default=0)
        return 4 * 4 * most**2

    def _threads(self, n_threads: int, room: int | None) -> int:
        """As many as have room, with the statistics of two inputs."""
        if room is None:
            return n_threads
        largest = max(self.stacked, key=lambda p: p.matrix.rows * p.matrix.columns).matrix
        each, beside = _work_bytes(largest), self._beside()
        if room < beside + each:
            raise too_little(largest.name, beside + each, room)
        return min(n_threads, (room - beside) // each)

    def _decomposed(
        self, index: int, reader: TensorReader, found: Inputs | None, factor: Floats | None
    ) -> Iterator[tuple[np.ndarray, float]]:
        """The blocks of a matrix as bytes, and what each gains, as a part of the whole output.

        Raises what `_weights` and `_beyond` do.
        """
        w = self._weights(index, reader)
        if found is None or factor is None:
            h, blocks = None, decompose(w, self.rank, self.levels)
        else:
            h, blocks = found.h, decompose_for(w, found.h, factor, self.rank, self.levels)
        try:
            before = size = error(w, h)
            for block, left in blocks:
                after = error(left, h)
                if not np.isfinite(after):
                    raise self._beyond(index, w)
                yield pack(block), (before - after) / max(size, 1e-30)
                before = after
        except np.linalg.LinAlgError as failed:
            raise self._beyond(index, w) from failed

    def _weights(self, index: int, reader: TensorReader) -> Floats:
        """A matrix: float32 [rows, n], all of them finite.

        Raises:
            ModelFileError: they are not, or cannot be read.
        """
        p = self.stacked[index]
        w = p.format.decode(raw_rows(reader, p, 0, p.matrix.rows))[: p.matrix.rows]
        if not np.isfinite(w).all():
            check_matrix(reader, p.matrix, p.info)
        return w

    def _beyond(self, index: int, w: Floats) -> UnsupportedError:
        info = self.stacked[index].info
        return UnsupportedError(
            f"a weight of {np.abs(w).max():.6g} is beyond what blocks of float16 vectors hold; "
            "use --format bf16 or f32", path=info.path, tensor=info.name,
        )  # fmt: skip


def _work_bytes(matrix: Matrix) -> int:
    """What a thread takes that decomposes a matrix."""
    return _BYTES_PER_WEIGHT * matrix.rows * matrix.columns
