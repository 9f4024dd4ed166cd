"""A model that is being compressed: its source, its target, and what the work may take."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.calibration import LayerInputs
from headrace.choices import PROCESS_BYTES, VOCABULARY_ENTRY_BYTES
from headrace.compress_options import Options
from headrace.errors import HeadraceError
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.least_memory import Need, check_memory
from headrace.loaders.gguf import ModelFile
from headrace.loaders.progress import Progress
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import open_model
from headrace.offload.budget import Limit
from headrace.planning import limit_of
from headrace.price import WINDOW, check_text, least_bytes, measure_price
from headrace.sparse.gqs import GROUP_FORMATS
from headrace.stack import refuse_stack

Notice = Callable[[str], None]
COMPARING = "comparing with the source (--evaluate)"


@dataclass(frozen=True)
class Compressed:
    """What was written; sizes in bytes.

    Attributes:
        formats: bytes of matrices by format.
        remarks: what could not be as it was asked for.
        price: how far it is from its source, if that was measured; see `headrace.price`.
    """

    path: Path
    source_bytes: int
    size_bytes: int
    formats: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    price: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """Work that was checked as far as it can be before it begins.

    Attributes:
        options: what is asked for.
        path: the source's file; `model`, `decoder`: what it says.
        target: the file to be; `force`: it may be there, and is replaced.
        memory: what the user allows the process, in bytes; `limit`: what it can have.
        threads: as the user said; `options.threads` is their number.
        say: takes a line that the user should know.
    """

    options: Options
    path: Path
    model: ModelFile
    decoder: Decoder
    target: Path
    force: bool
    memory: int | None
    limit: Limit
    threads: int | None
    progress: Progress | None
    say: Notice

    @property
    def process(self) -> int:
        """Bytes that the process takes beside the work."""
        return PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * self.decoder.vocabulary

    @property
    def room(self) -> int | None:
        """Bytes for the work; None: no limit."""
        return None if self.limit.n_bytes is None else self.limit.n_bytes - self.process

    def check_target(self) -> None:
        """Raises HeadraceError: the target may not be written."""
        check_target(self.target, self.force)

    def check_memory(self, needs: list[Need], threads: int = 1) -> None:
        """Raises BudgetError: a part of the work has no room."""
        check_memory(self.path, self.limit, self.process, needs, threads)

    def comparing(self) -> list[Need]:
        """What the comparison with the source takes, where the result is about as large."""
        if self.options.evaluate is None:
            return []
        groups = GROUP_FORMATS.get(self.options.format)
        both = least_bytes(self.path, self.threads, None if groups is None else groups.group)
        return [(COMPARING, both - self.process)]

    def inputs(self, watched: bool = False, quiet: bool = False) -> LayerInputs | None:
        """Statistics of the calibration text; None: there is none. Arguments as they have them."""
        o = self.options
        if o.calibrate is None:
            return None
        return LayerInputs(
            self.model, self.decoder, o.calibrate, o.calibrate_tokens, o.threads, self.room,
            self.progress, None if quiet else self.say, watched,
        )  # fmt: skip

    def measure(self, written: Path, levels: tuple[int, ...] = ()) -> dict[str, Any]:
        """The price of what was written; `levels` of a stack, too."""
        o = self.options
        assert o.evaluate is not None
        return measure_price(
            self.path, written, o.evaluate, tokens=o.evaluate_tokens, threads=self.threads,
            memory=self.memory, progress=self.progress, levels=levels,
        )  # fmt: skip


def job_of(
    options: Options, src: str | Path, dst: str | Path, *, force: bool, threads: int | None,
    memory: int | None, progress: Progress | None, notice: Notice | None,
) -> Job:  # fmt: skip
    """Open the source and look at the target; arguments as in `headrace.compress.compress`.

    Raises:
        what `headrace.compress.compress` raises.
    """
    limit = limit_of(memory)
    target = Path(os.path.expanduser(dst))
    check_target(target, force)
    path = resolve(src, progress=progress)
    model = open_model(path)
    if target.exists() and any(os.path.samefile(path, target) for path in model.paths):
        raise HeadraceError(f"{target} is the model to be read; write to another file")
    decoder = describe(model)
    refuse_stack(model, decoder)
    say: Notice = notice or (lambda line: None)
    if options.evaluate is not None:  # not after the wait
        check_text(model, options.evaluate, options.evaluate_tokens)
        window = min(WINDOW, decoder.context)
        if options.evaluate_tokens < window:
            say(
                f"--evaluate-tokens {options.evaluate_tokens}: a text is read in windows of "
                f"{window} tokens, of which one is the least"
            )
        if options.evaluate == options.calibrate:
            say(
                "--evaluate has the text of --calibrate, on which the result is nearer to its "
                "source than elsewhere: take another one"
            )
    return Job(options, path, model, decoder, target, force, memory, limit, threads, progress, say)


def check_target(target: Path, force: bool) -> None:
    """Raises HeadraceError: a file may not be written."""
    if target.is_dir():
        raise HeadraceError(f"{target} is a directory; name the file to write in it")
    if not target.parent.is_dir():
        raise HeadraceError(f"{target.parent} is not a directory; make it first")
    if os.path.lexists(target) and not (force and target.is_file()):
        advice = "use --force to replace it" if target.is_file() else "name another"
        raise HeadraceError(f"{target} exists; {advice}")
