"""Load a model and generate text with it."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from headrace.arguments import one_text, size_of, switch, token_ids, whole
from headrace.conversation import Chat
from headrace.detokenizer import Detokenizer
from headrace.errors import (
    BudgetError,
    BusyError,
    CancelledError,
    ContextOverflowError,
    HeadraceError,
    ModelFileError,
    ModelNotFoundError,
)
from headrace.generation import Generation, common_prefix
from headrace.hold import Hold, Holder
from headrace.interruptible import run_aside, undisturbed
from headrace.loaders.progress import Progress
from headrace.loaders.sources import resolve
from headrace.memory import give_back_heap
from headrace.memory_plan import MemoryPlan
from headrace.offload.expert_cache import ExpertCounts
from headrace.offload.pieces import Residency
from headrace.offload.recall import Predictor
from headrace.pace import PassTimes
from headrace.placing import Activations
from headrace.planning import Prepared, kernel_store, prepare
from headrace.prediction import Rates
from headrace.programs import Program, Programs
from headrace.rates import measure_rates
from headrace.refit import refit
from headrace.sampling import SamplingParams
from headrace.stack import StackBlocks, block_format
from headrace.targets.pack import Kernels
from headrace.team import Team
from headrace.tokenizer import Tokenizer
from headrace.trace import Trace, trace_from_environment
from headrace.weight_memory import WeightMemory

# Work that may take longer than this runs where Ctrl-C can interrupt it at once.
PATIENCE_S = 0.1
_CLOSED = "this model is closed"
_FURTHER_UP = "this model is at work further up in this thread; call it when that is done"
_SLOW_BYTES_S = 10e9
_SLOW_PRODUCTS_S = 50e9
_SLOW_FLASH_S = 0.5e9


def load(
    model: str | Path,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    context: int | None = None,
    progress: Progress | None = None,
    target: str | None = None,
    activations: Activations = "q8",
    kernels: str | Path | None = None,
    logits_rows: int = 0,
    whole_stack: bool = False,
    predictor: Predictor = "fitted",
    patches: int | str | None = None,
) -> Model:
    """Load a language model into memory.

    Args:
        model: a GGUF file, a directory with one or with safetensors files, a Hugging Face id or a
            name `headrace pull` knows.
        memory: the most memory that a process with this model may take: bytes, "300MB", "1.5GiB"
            or "50%"; default: what is free. Weights that do not fit are read from the file for
            every token. Each model is held to its own; what else the process has is not counted.
        threads: native threads; default: the physical cores that this process may use.
        context: tokens of context to keep; default: the model's own, at most 4096, and less where
            memory is short (`model.context` says).
        progress: called with (done, total or None, what) while fetching, compiling and loading.
        target: CPU level to use, such as "x86-64-v3"; default: the best that this CPU has.
        activations: "q8" multiplies coded weights by 8-bit activations; "f32" is a switch for
            debugging that expands the weights to float32.
        kernels: a kernel pack (`headrace targets build`) to use instead of compiling.
        logits_rows: tokens whose logits are asked for (`perplexity`, `compare`): what as many of
            them take as fit is then counted in `memory` (`Model.logits_at_once`).
        whole_stack: of a model that is a stack of blocks, compute with all, and read those that do
            not fit from the file for every token; by default only what fits is computed with. Other
            models are refused.
        predictor: what asks for experts of a mixture ahead of time, where not all have room:
            "fitted", routers that `headrace trace --learn` fits to that, or else "gates", the
            routers of the next layers; "pairs" or "affinity", tables of what followed what in a
            text (also learned); "none". It changes speed, and no token.
        patches: nothing to a language model, which refuses it.

    Raises:
        ModelNotFoundError, DownloadError, ModelFileError, UnsupportedError: no usable model.
        KernelError: no kernels for this CPU or `target`, or `kernels` is no usable pack.
        BudgetError: not even the least of the model fits in `memory`, or in what is free.
        ContextOverflowError: `context` is longer than the model's.
        TypeError, ValueError: an argument is of the wrong type, or out of range.
    """
    if patches is not None:
        raise TypeError(f"{model}: a language model takes no 'patches'; leave it out")
    budget = None if memory is None else size_of(memory)
    path = resolve(model, progress=progress)
    prepared = prepare(
        path, context=context, threads=threads, target=target, activations=activations,
        kernels=kernels, budget=budget, logits_rows=whole("logits_rows", logits_rows, low=0),
        whole_stack=switch("whole_stack", whole_stack), predictor=predictor,
    )  # fmt: skip
    return Model(prepared, progress)


class Model:
    """A loaded language model; made by `headrace.load`.

    One thread at a time may use it: a second one gets `BusyError`. Starting a new generation ends
    one that was left half read. `cancel` may be called from any thread.
    """

    def __init__(
        self, prepared: Prepared, progress: Progress | None, rates: Rates | None = None
    ) -> None:
        self._decoder = prepared.decoder
        self._metadata: Mapping[str, Any] = prepared.file.metadata
        self._path = prepared.file.paths[0]
        self._holder = Holder()
        # Who waits for a turn: threads that set `memory`, and steps. Each lets those of the other
        # kind go first who asked earlier, so that neither waits without end.
        self._changers: list[Hold] = []
        self._steps: list[Hold] = []
        self._owner: object | None = None
        self._cancels = 0  # how often `cancel` was called
        self._heeded = 0  # the calls before the present work began, which do not concern it
        self._closed = False
        self._ended = False
        self._kept: list[int] = []  # tokens whose keys and values are in the cache
        self._of_other_blocks = False  # some were computed with another part of a stack
        self._pass_times = PassTimes()
        self._tokenizer: Tokenizer | None = None
        self._template: Any = None
        self._store = kernel_store(prepared)
        if rates is None and (prepared.residency is not None or prepared.slots):
            rates = measure_rates(prepared, self._store, probe=False, progress=progress)
        self._held = held = WeightMemory(prepared, self._store, rates or Rates(), progress)
        self._programs = Programs(
            prepared.decoder, held.weights, prepared.target, held.addresses, prepared.shape,
            held.streaming, held.rows(), held.experts,
        )  # fmt: skip
        self._team = Team(held.addresses, prepared.shape.threads)
        held.cancel = self._team.cancel_address
        self._trace: Trace | None = trace_from_environment()

    # --- properties -----------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """Tokens of context that the KV cache holds."""
        return self._programs.shape.context

    @property
    def threads(self) -> int:
        """Native threads."""
        return self._team.n_threads

    @property
    def target(self) -> str:
        """Name of the CPU level whose kernels run."""
        return self._store.target.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built on first use."""
        if self._tokenizer is None:
            # Aside: the library's conversions drop a KeyboardInterrupt that falls into them.
            built = run_aside(lambda: Tokenizer.from_metadata(self._metadata, self._path))
            if built.n_vocab > self._decoder.vocabulary:
                raise ModelFileError(
                    f"the vocabulary has {built.n_vocab} tokens, but the embedding only "
                    f"{self._decoder.vocabulary} rows",
                    path=self._path,
                )
            self._tokenizer = built
        return self._tokenizer

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself."""
        return self._metadata

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids lie below it."""
        return self._decoder.vocabulary

    @property
    def format(self) -> str:
        """The weight format that holds most bytes."""
        sizes: dict[str, int] = {}
        for placed in self._held.weights.placed.values():
            sizes[placed.format.name] = sizes.get(placed.format.name, 0) + placed.n_bytes
        for block in self.blocks:
            kind = block_format(block.shape.rank)
            sizes[kind] = sizes.get(kind, 0) + block.shape.n_bytes
        return max(sizes, key=lambda name: sizes[name])

    @property
    def blocks(self) -> StackBlocks:
        """Blocks in memory, of a model that is a stack of them."""
        prepared = self._held.prepared
        return StackBlocks(prepared.stack.blocks[: prepared.blocks] if prepared.stack else ())

    @property
    def streams(self) -> bool:
        """Whether weights are read from the file for every pass."""
        return self._held.streaming is not None or self._held.experts is not None

    @property
    def prepared(self) -> Prepared:
        """What the model was loaded from."""
        return self._held.prepared

    @property
    def plan(self) -> MemoryPlan:
        """What it takes in memory, and how fast it should be."""
        return self._held.plan

    @property
    def residency(self) -> Residency | None:
        """Which weights stay in memory; None: all."""
        streaming = self._held.streaming
        return None if streaming is None else streaming.residency

    @property
    def stall_s(self) -> float:
        """Seconds that passes have waited for flash."""
        return self._held.stall_s

    @property
    def expert_counts(self) -> ExpertCounts | None:
        """What experts were found in memory, whatever it was set to; None: none were brought."""
        return self._held.expert_counts

    @property
    def kernel_store(self) -> Kernels:
        """The kernels of this model's target."""
        return self._store

    @property
    def team(self) -> Team:
        """The native threads."""
        return self._team

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text, with the model's begin-of-text token where it wants one."""
        return self.tokenizer.encode(one_text("text", text), add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids; what is no whole character becomes U+FFFD, control tokens nothing."""
        pieces = Detokenizer(self.tokenizer)
        return "".join([*map(pieces.push, self._known(ids)), pieces.finish()])

    def tokenize_chat(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> list[int]:
        """Token ids of a conversation as `render_chat` writes it.

        A begin-of-text token that the model wants and its template forgets is put in front.

        Raises:
            TemplateError: the file has no template, or it is broken.
        """
        tokenizer = self.tokenizer
        ids = tokenizer.encode(self.render_chat(messages, **extra), add_special=False)
        bos = tokenizer.bos_id
        if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        """A conversation as a prompt, by the file's chat template.

        Raises:
            TemplateError: the file has no template, or it is broken.
        """
        if self._template is None:
            from headrace.chat import ChatTemplate

            self._template = ChatTemplate.from_metadata(self._metadata, self.tokenizer)
        return str(self._template.render(messages, **extra))

    # --- memory -----------------------------------------------------------------------------------

    @property
    def memory(self) -> int:
        """Bytes that the process may take with this model; set it to let more or fewer weights stay
        in memory. What was read before stays, and so does the context.

        Raises (when set):
            BudgetError: the model does not fit in it.
            ModelFileError: weights that are to stay cannot be read.
        """
        return self.plan.peak_bytes if self.plan.budget is None else self.plan.budget

    @memory.setter
    def memory(self, memory: int | str) -> None:
        budget = size_of(memory)
        # Not a step: a generation goes on afterwards, and if it is at work it waits for this.
        hold = Hold(sys._getframe())
        self._changers.append(hold)
        try:
            while any(step.comes_before(hold) for step in list(self._steps)):
                time.sleep(0.0005)
            if not self._holder.wait(hold):
                raise BusyError(_FURTHER_UP)
            if self._closed:
                raise HeadraceError(_CLOSED)
            self._change(refit(self._held.prepared, budget, self._held))
        finally:
            if self._closed:
                self._end()
            self._holder.give_back(hold)
            self._changers.remove(hold)

    def _change(self, prepared: Prepared) -> None:
        """Keep what `prepared` says in memory; all is as before if that fails.

        Ctrl-C takes effect when it is done: steps have addresses of what changes hands.
        """
        undisturbed(lambda: self._change_now(prepared))

    def _change_now(self, prepared: Prepared) -> None:
        before = self._held.prepared.blocks
        try:
            self._held.change(prepared)
        finally:
            try:
                self._link()
            except BaseException:  # too little memory even for the steps
                self._closed = True
                self._end()
                raise
            if self._held.prepared.blocks != before and self._held.streaming is None:
                self._of_other_blocks = True
            self._pass_times = PassTimes()
            give_back_heap()

    def _obey(self) -> None:
        """Keep to limits that were changed from outside since the last look."""
        prepared = self._held.asked_from_outside()
        if prepared is None:
            return
        try:
            self._change(prepared)
        except (BudgetError, ModelFileError, ModelNotFoundError) as error:
            warnings.warn(f"a limit cannot be kept: {error}", RuntimeWarning, stacklevel=3)

    # --- running ----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        lookup: bool | None = None,
        draft: Model | Literal["self"] | None = None,
    ) -> Generation:
        """Answer a prompt; iterate over the result for pieces of text as they come.

        Args:
            prompt: a question for the chat template; with `raw`, text to continue; or token ids.
            max_tokens: end after so many new tokens.
            temperature, top_k, top_p, min_p, repeat_penalty, seed: see `SamplingParams`.
            stop: end before any of these texts.
            raw: do not apply the chat template.
            draft: a small model of the same vocabulary that guesses tokens where the text does not
                repeat itself; this model checks them, so the answer is the same. "self": of a stack
                that streams (`whole_stack`), the blocks in memory guess.
            lookup: guess tokens from the text so far and check several in one pass, where that is
                faster; the answer is the same. Default: where weights are read from disk.

        Raises:
            ContextOverflowError: the prompt does not fit in the context. Nothing is cut.
            TemplateError: not `raw`, and the model has no usable chat template.
            TypeError, ValueError: an argument is of the wrong type, or out of range.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed)
        if isinstance(prompt, str):
            if raw:
                ids = self.tokenize(prompt)
            else:
                ids = self.tokenize_chat([{"role": "user", "content": prompt}])
        else:
            ids = self._checked(prompt)
        return Generation(
            self, ids, max_tokens, params, stop, reuse=False, lookup=lookup, draft=draft
        )

    def likeliest(self, ids: Sequence[int], n: int) -> list[int]:
        """The n tokens that follow, each the likeliest; what was read of `ids` before is kept.

        Raises:
            ContextOverflowError: they do not fit in the context.
        """
        ids, found = self._checked(ids), list[int]()
        with self._begin():
            start = self._read_before(ids[:-1])
            logits = self._read(ids[start:], start)
            found.append(int(np.argmax(logits)))
            while len(found) < n:
                logits = self._read([found[-1]], len(ids) + len(found) - 1)
                found.append(int(np.argmax(logits)))
        return found

    def _guess(self, tokens: Sequence[int], n: int) -> list[int]:
        """The n tokens that follow by the blocks in memory alone, each the likeliest.

        All but the last of `tokens` have been read, and count as read afterwards: keys and values
        of what comes behind are written again by the pass that checks it.
        """
        program, position, found = self._programs.guess, len(tokens) - 1, list[int]()
        if program is None:
            return found
        token = tokens[-1]
        try:
            while len(found) < n:
                at = position + len(found)
                self._run_chunk([token], at, 1, self._programs.logits, program)
                token = int(np.argmax(self._logits()))
                found.append(token)
        finally:
            del self._kept[position:]
        return found

    def chat(self, system: str | None = None) -> Chat:
        """A conversation that remembers its turns and what the model has already read of them."""
        return Chat(self, system)

    def logits(
        self, ids: Sequence[int], *, last: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Logits after each token, read from an empty context: float32 [n, vocabulary].

        Args:
            ids: the tokens.
            last: only those of the last so many tokens.

        Raises:
            ContextOverflowError: more tokens than the context holds.
        """
        ids = self._checked(ids)
        wanted = len(ids) if last is None else min(whole("last", last, low=1), len(ids))
        with self._begin():
            self._kept = []
            return self._logits_of(ids, len(ids) - wanted, len(ids), progress)

    def logits_between(self, ids: Sequence[int], first: int, end: int) -> np.ndarray:
        """Logits after tokens `first` to `end` - 1 of a text: float32 [end - first, vocabulary].

        They are those of `logits`, bit for bit, where a text is read from one `forget` on, one part
        behind the other: what was read of it before is not read again, unless the blocks of a stack
        have changed since.

        Raises:
            ContextOverflowError: more tokens than the context holds.
            ValueError: there are no such tokens.
        """
        ids = self._checked(ids)
        if not 0 <= first < end <= len(ids):
            raise ValueError(f"there are no tokens {first} to {end} of {len(ids)}")
        with self._begin():
            return self._logits_of(ids, first, end, None)

    @property
    def logits_at_once(self) -> int | None:
        """Tokens whose logits have room in `memory` at a time; None: that was not asked for
        (`logits_rows` of `load`).
        """
        return self.prepared.logits_at_once or None

    def read_tokens(self, ids: Sequence[int], start: int = 0) -> None:
        """Read tokens at positions from `start` without sampling: the work that `bench` times.

        Raises:
            ValueError: `start` is beyond what has been read, or an id is no token.
            ContextOverflowError: they do not fit in the context.
        """
        ids = self._checked(ids)
        with self._begin():
            if start > len(self._kept) or start < 0:
                raise ValueError(f"only {len(self._kept)} tokens have been read, not {start}")
            if start + len(ids) > self.context:
                raise ContextOverflowError(
                    f"{start + len(ids)} tokens do not fit in a context of {self.context}"
                )
            self._read(ids, start)

    def compute_with(self, blocks: Mapping[str, int] | None) -> None:
        """Of a stack, compute with the first so many blocks of each matrix that is named.

        That is for measuring what blocks are worth; blocks that are not in memory are not read.
        None, and matrices that are not named: all that are in memory.
        """
        with self._begin():
            self._kept = []
            self._held.weights.limit_blocks(blocks or {})
            undisturbed(self._link)

    def _link(self) -> None:
        held = self._held
        self._programs.link(held.streaming, held.rows(), held.experts)

    def forget(self) -> None:
        """Drop what has been read: the next tokens start an empty context."""
        with self._begin():
            self._kept = []

    def cancel(self) -> None:
        """Stop what the model is doing, from any thread: generations end with "cancelled"."""
        self._cancels += 1
        self._team.cancel()

    def close(self) -> None:
        """End the threads. The memory goes when the model is no longer referenced."""
        if not self._closed:
            self._closed = True
            self.cancel()
            hold = Hold(sys._getframe())
            # Within a step (its progress callback, a signal handler) that step ends it.
            if self._holder.wait(hold):
                self._end()
            self._holder.give_back(hold)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._team.close()
            self._held.close()
            if self._trace is not None:
                self._trace.report()

    def __enter__(self) -> Model:
        if self._closed:
            raise HeadraceError(_CLOSED)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_team"):
            self.close()

    # --- inside -----------------------------------------------------------------------------------

    def _begin(self, owner: object = None, cancels: int | None = None) -> _Busy:
        """Hold the model for the first step of some work.

        Args:
            owner: a token that lets the work go on later; None for work that this step ends.
            cancels: how often `cancel` had been called when the work was asked for; default: now.
        """
        return _Busy(self, owner, self._cancels if cancels is None else cancels)

    def _resume(self, owner: object) -> _Busy:
        """Hold the model for a later step."""
        return _Busy(self, owner, None)

    def _known(self, given: Sequence[int]) -> list[int]:
        ids = token_ids(given)
        if ids and (min(ids) < 0 or max(ids) >= self._decoder.vocabulary):
            raise ValueError(f"token ids must lie in 0..{self._decoder.vocabulary - 1}")
        return ids

    def _checked(self, given: Sequence[int]) -> list[int]:
        ids = self._known(given)
        if not ids:
            raise ValueError("the prompt is empty: there must be at least one token")
        if len(ids) > self.context:
            raise ContextOverflowError(
                f"the prompt has {len(ids)} tokens, the context {self.context}; shorten it or load "
                f"the model with a longer context (`context`, --context; it was trained for "
                f"{self._decoder.context})"
            )
        return ids

    def _read_before(self, ids: list[int]) -> int:
        """How many of these tokens need not be read again, by work that begins."""
        if self._of_other_blocks:
            self._kept, self._of_other_blocks = [], False
        return common_prefix(self._kept, ids)

    def _read(self, ids: list[int], start: int) -> np.ndarray:
        """Run tokens at positions from `start`; logits after the last one (a view)."""
        step = self._programs.shape.chunk
        for first in range(0, len(ids), step):
            self._read_chunk(ids[first : first + step], start + first, len(ids))
        return self._logits()

    def _logits_of(
        self, ids: list[int], first: int, end: int, progress: Progress | None
    ) -> np.ndarray:
        """Read a text up to `end`, but for what is kept before `first`; logits from there on."""
        out = np.empty((end - first, self._decoder.vocabulary), np.float32)
        step = self._programs.shape.chunk
        for at in range(self._read_before(ids[:first]), end, step):
            stop = min(at + step, end)
            low = max(at, first)
            wanted = out[low - first : stop - first] if low < stop else None
            self._read_chunk(ids[at:stop], at, len(ids), out=wanted)
            if progress is not None:
                progress(stop, end, "reading")
        return out

    def _read_guessed(self, ids: list[int], position: int) -> list[np.ndarray]:
        """Run a token and some that may follow it; logits after each (views).

        Only the first counts as read; `_accept` adds those that turn out to be right.
        """
        self._obey()
        rows = self._programs.few_logits
        self._run_chunk(ids, position, len(ids), rows, self._programs.check)
        del self._kept[position + 1 :]
        return [self._capped(row[: self._decoder.vocabulary]) for row in rows[: len(ids)]]

    def _accept(self, token: int, position: int) -> None:
        """Count a token as read that `_read_guessed` has read at `position`."""
        if self._cancels != self._heeded:
            raise CancelledError("cancelled")
        self._kept[position:] = [token]

    def _logits(self) -> np.ndarray:
        return self._capped(self._programs.logits[0, : self._decoder.vocabulary])

    def _capped(self, logits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Logits as the model gives them: in `out`, or as they are where nothing is to be done."""
        cap = np.float32(self._decoder.soft_cap)
        if cap:
            out = np.divide(logits, cap, out=out)
            np.tanh(out, out=out)
            out *= cap
            return out
        if out is None:
            return logits
        out[:] = logits
        return out

    def _read_chunk(
        self, ids: list[int], position: int, of: int, out: np.ndarray | None = None
    ) -> None:
        """Run one chunk of a text of `of` tokens.

        With `out` [k, vocabulary], logits after the last k tokens go there.
        """
        self._obey()
        rows = self._programs.logits
        wanted = 1 if out is None else len(out)
        if wanted > 1:
            # Kernels write whole groups of tokens, none longer than the buffer.
            rows = np.empty((wanted + rows.shape[0] - 1, rows.shape[1]), np.float32)
        self._run_chunk(ids, position, wanted, rows, self._programs.for_tokens(of))
        if out is not None:
            self._capped(rows[:wanted, : self._decoder.vocabulary], out)

    def _run_chunk(
        self, ids: list[int], position: int, wanted: int, rows: np.ndarray, program: Program
    ) -> None:
        """Run one chunk; logits after the last `wanted` tokens go to `rows`, before soft-capping.

        Those of `decode` always go to the programs' own buffer.
        """
        if self._cancels != self._heeded:
            raise CancelledError("cancelled")
        if position > len(self._kept):
            raise AssertionError(f"{position} tokens before this one, {len(self._kept)} read")
        programs, n = self._programs, len(ids)
        programs.expect(n)
        try:
            programs.set_tokens(ids)
        except ModelFileError:
            self._held.halt()  # a file that cannot be read: what was read ahead is not believed
            raise
        programs.say(n, position, wanted)
        programs.write_logits_to(rows)
        # Until the step is done, what it overwrites must not count as kept.
        del self._kept[position:]
        finished = False
        try:
            finished = self._run(program, n)
        finally:
            if not finished:
                programs.restore()
        if not finished:
            raise CancelledError("cancelled")
        self._kept += ids

    def _run(self, program: Program, n_tokens: int) -> bool:
        seconds = max(
            self.plan.bytes_per_token / _SLOW_BYTES_S,
            self.plan.flash_bytes_per_token / _SLOW_FLASH_S,
            self.plan.parameters * n_tokens / _SLOW_PRODUCTS_S if n_tokens > 1 else 0,
        )
        interruptible = (
            seconds > PATIENCE_S and threading.current_thread() is threading.main_thread()
        )
        held, finished = self._held, False
        if program is self._programs.guess:  # for which nothing is read
            return self._walk(program, interruptible, 0)
        window = held.begin(n_tokens)
        try:
            finished = self._walk(program, interruptible, window)
        finally:
            held.end(finished)
        return finished

    def _walk(self, program: Program, interruptible: bool, window: int) -> bool:
        if self._trace is None:
            return self._team.run(program.table, interruptible=interruptible, window=window)
        with self._trace.measure(program) as ticks:
            return self._team.run(
                program.table, ticks=ticks, interruptible=interruptible, window=window
            )


class _Busy:
    """Holds the model for one step; refuses when another thread holds it."""

    def __init__(self, model: Model, owner: object, cancels: int | None) -> None:
        self._model = model
        self._owner = owner
        self._cancels = cancels  # None: a later step

    def __enter__(self) -> None:
        model = self._model
        self._hold = Hold(sys._getframe(1))
        found = self._take()
        if found is not self._hold:
            self._hold.end()
            here = found.thread == self._hold.thread
            raise BusyError(
                _FURTHER_UP
                if here
                else "this model is at work in another thread; wait for it, or load the model twice"
            )
        if model._closed:
            model._holder.give_back(self._hold)
            raise HeadraceError(_CLOSED)
        if self._cancels is not None:
            model._owner = self._owner
            model._heeded = self._cancels
        elif model._owner is not self._owner:
            model._holder.give_back(self._hold)
            raise BusyError("a newer generation has taken over this model; this one cannot go on")

    def _take(self) -> Hold:
        """The hold that there is: this one, or another step's."""
        model, own = self._model, self._hold
        model._steps.append(own)
        try:
            while True:
                if not any(changer.comes_before(own) for changer in list(model._changers)):
                    found = model._holder.take(own)
                    if found is own or found not in model._changers or found.thread == own.thread:
                        return found
                time.sleep(0.0005)
        finally:
            model._steps.remove(own)

    def __exit__(self, *_: object) -> None:
        if self._model._closed:  # by a callback or a signal handler of this thread
            self._model._end()
        self._model._holder.give_back(self._hold)
