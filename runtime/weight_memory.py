"""A loaded model's weights: what of them stays in memory, what streams, and how that changes."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

from headrace import plan as plans
from headrace.embedding import EmbeddingRows
from headrace.errors import BudgetError
from headrace.expert_memory import cache_of
from headrace.limits import LimitWatch
from headrace.loaders.progress import Progress
from headrace.machine import known_read_bandwidth
from headrace.memory_plan import MemoryPlan, memory_plan
from headrace.offload.expert_cache import ExpertCache, ExpertCounts
from headrace.offload.files import StreamedFile, close_all, reader_of
from headrace.offload.modes import MODES
from headrace.offload.revision import Revision
from headrace.placing import dense
from headrace.planning import Prepared, open_files
from headrace.prediction import Passes, Rates
from headrace.promises import promise
from headrace.rates import measure_flash
from headrace.refit import least, refit
from headrace.router_weights import check_routers
from headrace.streaming import Streaming
from headrace.targets.pack import Kernels
from headrace.team import default_threads
from headrace.weights import Weights


class WeightMemory:
    """The weights of a prepared model, kept or streamed as it says.

    Attributes:
        prepared: what it was loaded from, with what stays in memory now.
        plan: the same for people.
        addresses: kernels by name; more come when something is streamed for the first time.
        weights: what is in memory.
        streaming: what is read for every pass; None: nothing is.
        experts: where those of mixtures are brought when they are wanted; None: all are in memory.
    """

    def __init__(
        self, prepared: Prepared, store: Kernels, rates: Rates, progress: Progress | None
    ) -> None:
        """Load what stays; `rates` are those of this machine as far as they are known.

        Raises:
            KernelError: a kernel cannot be had.
            BudgetError: the system does not give the memory.
            ModelFileError: the file cannot be read, or has routers of what is no finite number.
        """
        self._store = store
        check_routers(prepared.file, prepared.decoder)
        stack = prepared.stack
        needed = plans.kernels_of(prepared.decoder, prepared.placed, prepared.target, stack)
        self.addresses = store.load(needed, progress)
        whole = stack is not None or prepared.residency is None
        kept = None if whole or prepared.residency is None else prepared.residency.kept
        self.weights = Weights(
            prepared.file, prepared.decoder, prepared.placed, kept, stack, not prepared.slots
        )
        self._rates = rates
        self._revision = None if rates.flash is None else Revision(rates.flash)
        self._files: dict[Path, StreamedFile] = {}  # open as soon as something is streamed
        self.streaming: Streaming | None = None
        self.experts: ExpertCache | None = None
        self.cancel = 0  # address of the word that cancels a pass
        self._told_reads = 0  # failed reads up to which nothing more is said
        self._passes: Passes
        self.plan: MemoryPlan
        # Of caches and windows that have been given up: the next ones begin anew.
        self._counted: ExpertCounts | None = None
        self._mended, self._waited_s = 0, 0.0
        self._began = self._stalled_s = 0.0  # the time, and `stall_s`, when the pass began
        self._take_up(prepared)
        files = self._files or open_files(prepared)
        try:
            reader = reader_of(files)
            self.weights.load(reader, self.addresses, prepared.shape.threads, progress)
            if stack is not None:
                self._files = files
                self.weights.keep_blocks(prepared.blocks, reader)
            for file in files.values():  # else what was read may be of two files
                file.check()
        finally:
            if files is not self._files:
                close_all(files.values())
        self._limits = LimitWatch()

    def change(self, prepared: Prepared) -> None:
        """Keep what `prepared` says; all is as before if that fails.

        In any case parts of the weights may lie elsewhere afterwards.

        Raises:
            BudgetError, ModelFileError: as when loading.
        """
        before = self.prepared
        self._stop_streaming()
        try:
            # What may fail comes before anything is given up.
            if prepared.parts["weights"] < before.parts["weights"]:
                self._take_up(prepared)
                self._keep(prepared)
            else:
                self._keep(prepared)
                self._take_up(prepared)
        except BaseException:
            self._stop_streaming()
            self._keep(before)
            self._take_up(before)
            raise

    @property
    def expert_counts(self) -> ExpertCounts | None:
        """What caches of experts have been asked for so far; None: there was none."""
        if self.experts is None:
            return self._counted
        return self.experts.counts.and_before(self._counted)

    @property
    def stall_s(self) -> float:
        """Seconds that passes have waited for flash."""
        found = self._waited_s + (0.0 if self.experts is None else self.experts.stall_s)
        return found if self.streaming is None else found + self.streaming.window.flow.stall_s

    @property
    def _mended_reads(self) -> int:
        found = self._mended + (0 if self.experts is None else self.experts.mended_reads)
        return found if self.streaming is None else found + self.streaming.window.flow.mended_reads

    def asked_from_outside(self) -> Prepared | None:
        """What to change to, as limits were changed since the last look; None: nothing."""
        if not self._limits.changed():
            return None
        try:
            prepared = refit(self.prepared, self.prepared.budget, self)
        except BudgetError as error:
            warnings.warn(f"a limit cannot be kept: {error}", RuntimeWarning, stacklevel=3)
            prepared = least(self.prepared)
        return None if prepared.parts == self.prepared.parts else prepared

    def rows(self) -> EmbeddingRows | None:
        """Rows of the embedding from the file; None if it lies in memory in one piece."""
        name = self.prepared.decoder.embedding.name
        whole = self.streaming is None or self.prepared.stack is not None
        if whole and len(self.weights.parts(name)) == 1:
            return None
        return EmbeddingRows(
            dense(self.weights.placed[name]), self.prepared.shape.chunk, self.addresses,
            reader_of(self._files),
        )  # fmt: skip

    def begin(self, n_tokens: int) -> int:
        """Begin a pass over so many tokens; gives the address of the window for the native loop.

        Long ones compute more than they read, so that other ways to read may be better for them.

        Raises:
            ModelFileError: a file has changed, or could not be read.
        """
        if self.streaming is None and self.experts is None:
            return 0
        mode = self._passes.mode(1 if n_tokens <= plans.SHORT_TOKENS else n_tokens)
        self._began = time.perf_counter()
        if self.experts is not None:
            self.experts.begin(mode or MODES[-1], self.cancel)
        if self.streaming is None:
            return 0 if self.experts is None else self.experts.span_address
        address = self.streaming.window.begin(mode)
        self._stalled_s = self.streaming.window.flow.stall_s
        return address

    def end(self, finished: bool) -> None:
        """End a pass.

        Raises:
            ModelFileError: it stopped because a read failed.
        """
        seconds = time.perf_counter() - self._began
        if self.experts is not None:
            ticks = 0 if self.streaming is None else self.streaming.window.span
            self.experts.end(finished, seconds, ticks)
        if self.streaming is not None:
            self.streaming.window.end(finished)
        self._tell_of_mended_reads()
        if self.streaming is None or not finished or self._revision is None:
            return
        window = self.streaming.window
        n_bytes, stall_s = self.streaming.residency.streamed_bytes, window.flow.stall_s
        if self._revision.add(window.mode, n_bytes, seconds, stall_s - self._stalled_s):
            self._rates = replace(self._rates, flash=self._revision.rates)
            self._passes = replace(self._passes, rates=self._rates)
            self.plan = memory_plan(self.prepared, self._rates)

    def _tell_of_mended_reads(self) -> None:
        mended = self._mended_reads
        if mended > self._told_reads:
            warnings.warn(
                f"{mended} reads of {self.prepared.file.paths[0]} failed and were made again, "
                "which is slow: look after the disk or its driver",
                RuntimeWarning,
                stacklevel=3,
            )
            self._told_reads = 2 * mended

    def halt(self) -> None:
        """End the readers until the next pass begins."""
        if self.experts is not None:
            self.experts.halt()
        if self.streaming is not None:
            self.streaming.window.halt()

    def close(self) -> None:
        """End the readers, close the files."""
        self._stop_streaming()
        close_all(self._files.values())

    def _keep(self, prepared: Prepared) -> None:
        kept = None if prepared.residency is None else prepared.residency.kept
        if prepared.parts["weights"] > self.prepared.parts["weights"]:
            for file in self._files.values():
                file.check()
        if prepared.stack is not None:
            self.weights.keep_blocks(prepared.blocks, reader_of(self._files))
            return
        self.weights.change(
            kept, prepared.pieces, reader_of(self._files), self.addresses, prepared.shape.threads,
            not prepared.slots,
        )  # fmt: skip

    def _take_up(self, prepared: Prepared) -> None:
        """Stream what `prepared` says is not kept."""
        if prepared.residency is not None or prepared.slots:
            more = plans.streaming_kernels(prepared.decoder, self.weights.placed)
            self.addresses |= self._store.load(more)
            if not self._files:
                self._files = open_files(prepared)
            if self._rates.flash is None:
                reader = self.addresses["window_read"]
                memory = known_read_bandwidth(prepared.target.name, prepared.shape.threads)
                self._rates = replace(
                    self._rates, memory=memory, cores=default_threads(),
                    flash=(found := measure_flash(prepared, reader, self._files)),
                )  # fmt: skip
                self._revision = Revision(found)
        if prepared.residency is not None:
            self.streaming = Streaming(
                prepared.infos, self.weights.placed, prepared.residency, self.addresses,
                self._files,
            )  # fmt: skip
        if prepared.slots:
            self.experts = cache_of(
                prepared.decoder,
                self.weights.placed,
                prepared.slots,
                self.addresses,
                self._files,
                prepared.predictor,
                prepared.learned,
                prepared.fired,
            )
        self.prepared = prepared
        promise(self, sum(prepared.parts.values()) - prepared.parts["the process"])
        self._passes = Passes(
            self._rates,
            prepared.residency,
            prepared.read_bytes,
            prepared.shape.threads,
            prepared.expert_bytes,
        )
        self.plan = memory_plan(prepared, self._rates)

    def _stop_streaming(self) -> None:
        if self.streaming is not None:
            self.streaming.close()
        if self.experts is not None:
            self.experts.close()
        counted = self.expert_counts, self._mended_reads, self.stall_s
        self.streaming = self.experts = None
        self._counted, self._mended, self._waited_s = counted
