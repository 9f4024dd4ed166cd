"""Compress a model matrix by matrix, or cut its feed-forwards into parts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from headrace.compress_job import Compressed, Job
from headrace.cut_model import CutModel, dense_parts
from headrace.entries import entry_of, others
from headrace.errors import HeadraceError, UnsupportedError
from headrace.expert_order import laid_out
from headrace.expert_trial import check_room, last_windows
from headrace.families.decoder import Decoder
from headrace.learned_routes import statistics_of, statistics_path
from headrace.least_memory import Need
from headrace.loaders.gguf import TensorInfo, TensorReader
from headrace.loaders.tiled import Entry, build_header, layout_key
from headrace.partial_file import PartialFile, check_disk, drop
from headrace.placing import place
from headrace.price import price_keys
from headrace.pruning import PrunedMatrix
from headrace.recipe import KEEP, Recipe, recipes, remarks
from headrace.rounding import Rounder
from headrace.rows import read_as_it_is
from headrace.shared_fit import needs as fitting_needs
from headrace.shared_fit import shared_downs
from headrace.sparse.format import Floats
from headrace.waiting_experts import WaitingExperts, waiting_experts, waiting_of
from headrace.write_clusters import ClusteredModel
from headrace.write_moe import Mixture, cut_of
from headrace.write_stack import beside


def compress_matrices(job: Job) -> Compressed:
    """Raises what `headrace.compress.compress` raises."""
    o = job.options
    if o.cuts:
        dense_parts(job.model, job.decoder)
    elif o.calibrate is not None and job.decoder.clustered():
        raise UnsupportedError(
            "clusters of neurons are rounded without --calibrate: use --method rtn or search, or "
            "give the weights the exact values before they are cut into clusters",
            path=job.model.paths[0],
        )
    if o.widths is not None and not job.decoder.mixtures():
        raise UnsupportedError("--expert-bits is for mixtures of experts", path=job.model.paths[0])
    learned, useless = statistics_of(job.path, job.model)
    if useless is not None:
        job.say(useless)
    try:
        with ExitStack() as stack:
            done = _Work(job, stack).write(learned)
            if learned is not None:  # routers stay, so routes do
                beside_it = statistics_path(job.target)
                learned.write(beside_it)
                job.say(f"what is known of the source's routes is in {beside_it}, too")
            return done
    except OSError as error:
        raise HeadraceError(f"cannot write {job.target}: {error.strerror or error}") from error


@dataclass
class _Layout:
    """What stands where in the file.

    Attributes:
        entries, sources: its tensors in the order in which they are made, and what becomes them.
        places: where each begins.
        size: of the file; `header` has the room for its price.
    """

    entries: list[Entry]
    sources: list[Recipe | TensorInfo]
    places: list[int]
    size: int
    header: bytes
    with_price: Callable[[dict[str, Any]], bytes]
    key: str


class _Work:
    """The work on one model; what it opens is closed with `stack`."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self._job, self._stack = job, stack
        o = job.options
        self._reader = stack.enter_context(TensorReader())
        self._rounder = Rounder(self._reader, o.threads, job.room)
        self._recipes = recipes(
            job.model, job.decoder, o.format, o.ends,
            "rtn" if o.format == KEEP and o.widths else o.method,
            self._reader, o.rate, job.progress,
        )  # fmt: skip
        self._inputs = job.inputs(watched=o.cuts)
        if self._inputs is not None:
            stack.enter_context(self._inputs)
        self._waiting: WaitingExperts | None = None
        self._cut: CutModel | None = None
        self._said = list[str]()

    def write(self, learned: Any) -> Compressed:
        """Write the file; `learned` is what is known of the routes of a mixture, if anything is."""
        job, o = self._job, self._job.options
        if o.widths is not None:
            self._waiting = self._wait_for_experts()
            self._recipes = [self._waiting.recipe(one) for one in self._recipes]
            self._said.append(self._waiting.said)
        laid = self._lay_out(learned)
        chosen = self._recipes
        self._said += remarks(chosen) if self._cut is None else self._cut.remarks()
        self._said += self._little_text()
        for line in self._said:
            job.say(line)
        if self._cut is not None and self._inputs is not None:
            job.check_memory(job.comparing() + self._cut.needs(self._inputs))
        else:
            job.check_memory(job.comparing() + self._needs(), o.threads)
        for other in (*beside(job.target), *([] if o.widths else [waiting_of(job.target)])):
            drop(other, job.say)
        file = self._stack.enter_context(PartialFile(job.target, laid.key, laid.size))
        check_disk(job.target, {job.target: laid.size})
        file.tell(job.say, len(laid.entries), "tensors")
        self._write_tensors(file, laid)
        file.complete()
        price = None
        if o.evaluate is not None:
            price = job.measure(file.path)
            file.write(0, laid.with_price(price))
        file.publish(job.check_target)  # another of that name may have come in the meantime
        sizes: dict[str, int] = {}
        for one in chosen:
            name = one.placed.format.name
            sizes[name] = sizes.get(name, 0) + one.placed.packed_bytes
        return Compressed(
            job.target, job.model.size_bytes, laid.size, sizes, tuple(self._said), price
        )

    def _wait_for_experts(self) -> WaitingExperts:
        """Experts of several widths, rounded and chosen."""
        job, o, inputs = self._job, self._job.options, self._inputs
        assert o.widths is not None and o.calibrate is not None and inputs is not None
        matrices, mixtures = place(job.model, job.decoder, "q8"), job.decoder.mixtures()
        downs = shared_downs(mixtures, matrices) if o.method == "gptq" else {}
        again = job.inputs(watched=True, quiet=True)
        assert again is not None
        self._stack.enter_context(again)
        needs = job.comparing() + self._needs()
        needs += fitting_needs(again, downs, mixtures, o.widths[0])
        job.check_memory(needs, o.threads)
        windows = last_windows(job.model, job.decoder, o.calibrate)
        check_room(job.path, windows.context, windows.scored, job.limit.n_bytes)
        return waiting_experts(
            job.path, job.target, matrices, mixtures, *o.widths, method=o.method, inputs=inputs,
            again=again, downs=downs, rounder=self._rounder, reader=self._reader,
            windows=windows, key=o.key(job.model, widths=False), stack=self._stack,
            threads=o.threads, memory=job.memory, progress=job.progress, notice=job.say,
        )  # fmt: skip

    def _lay_out(self, learned: Any) -> _Layout:
        job, o, model = self._job, self._job.options, self._job.model
        placed = [recipe.placed for recipe in self._recipes]
        vectors, rest = others(model, job.decoder, placed)
        sources: list[Recipe | TensorInfo] = [*vectors, *self._recipes, *rest]
        entries = [entry_of(one.placed if isinstance(one, Recipe) else one) for one in sources]
        more: dict[str, str | float] = {}
        if o.cutting is not None:
            how = cut_of(model, job.decoder, *o.cutting)
            self._cut = Mixture(model, job.decoder, how, o.cutting[2], entries, sources)
        elif o.clusters is not None:
            self._cut = ClusteredModel(model, job.decoder, o.clusters, entries, sources)
        if self._cut is not None:
            entries, more = self._cut.entries, self._cut.metadata
        order = laid_out([one.name for one in entries], job.decoder, learned)
        laid = [entries[i] for i in order]
        tag = {} if o.evaluate is None else price_keys(None)
        header, offsets, size = build_header(model, laid, {**more, **tag})

        def with_price(found: dict[str, Any]) -> bytes:
            priced, _, whole = build_header(model, laid, {**more, **price_keys(found)})
            if whole != size:
                raise AssertionError("the price tag has another size than announced")
            return priced

        at = dict(zip(order, offsets, strict=True))
        places = [at[i] for i in range(len(entries))]
        key = f"{o.key(model)} {layout_key(model, laid, size)}"
        return _Layout(entries, sources, places, size, header, with_price, key)

    def _write_tensors(self, file: PartialFile, laid: _Layout) -> None:
        """Write what is not there yet, and say what could not be done as it was asked for."""
        job, rounder, entries = self._job, self._rounder, laid.entries
        written = list(accumulate(one.n_bytes for one in entries))
        few = self._inputs.few if self._inputs is not None else set[tuple[int, int]]()
        for name, rows in file.notes.get("unmoved", {}).items():
            if name not in rounder.unmoved:  # parts of experts are known already
                rounder.remember(name, rows)
        few.update((layer, e) for layer, e in file.notes.get("few", []))
        file.write(0, laid.header)

        def wrote(i: int) -> None:
            file.notes.update(unmoved=rounder.unmoved, few=sorted(few))
            file.finish(i + 1)
            if job.progress is not None:
                last = i + 1 == len(entries)  # behind it there is nothing but padding
                job.progress(laid.size if last else written[i], laid.size, "writing")

        if self._cut is not None and self._inputs is not None:
            self._cut.write(
                file, dict(enumerate(laid.places)), self._inputs, self._reader,
                job.options.threads, wrote,
            )  # fmt: skip
        else:
            for i in range(file.done, len(entries)):
                self._write_tensor(
                    entries[i].name, laid.sources[i], partial(_write_at, file, laid.places[i])
                )
                wrote(i)
        known = few | (set() if self._waiting is None else self._waiting.few)
        last = [_few(known, job.decoder)] if known else []
        for line in (*last, *rounder.remarks()):
            job.say(line)
            self._said.append(line)

    def _write_tensor(
        self, name: str, source: Recipe | TensorInfo, write: Callable[[int, np.ndarray], None]
    ) -> None:
        instead: Floats | None = None
        if self._waiting is not None:
            data = self._waiting.tiles(name)
            if data is not None:
                return write(0, data)
            instead = self._waiting.changed(name)
        if isinstance(source, Recipe) and source.method is not None:
            found = None
            if self._inputs is not None and source.method != "rtn":
                found = self._inputs.of(source.placed.matrix.name)
            return self._rounder.round(source, found, write, instead)
        at = 0
        copied = source.placed if isinstance(source, Recipe) else source
        assert not isinstance(copied, PrunedMatrix)
        for part in read_as_it_is(self._reader, copied):
            write(at, part)
            at += part.nbytes
        return None

    def _needs(self) -> list[Need]:
        """What the work on each matrix takes, and on the text."""
        needs = [] if self._inputs is None else self._inputs.needs()
        for recipe in self._recipes:
            if recipe.method is not None:
                name = recipe.placed.matrix.name
                held = 0 if self._inputs is None else self._inputs.held(name)
                needs.append((name, self._rounder.least_bytes(recipe, held)))
        return needs

    def _little_text(self) -> list[str]:
        """That the text has fewer tokens than a matrix has inputs, if so."""
        if self._inputs is None or self._cut is not None:
            return []
        widest = max(
            (r.placed.matrix.columns for r in self._recipes if r.method == "gptq"), default=0
        )
        if self._inputs.tokens >= widest:
            return []
        return [
            f"the calibration has {self._inputs.tokens:,} tokens, fewer than the {widest:,} inputs "
            "of the widest matrix: much of what such a matrix reads was not seen; use a longer text"
        ]


def _few(experts: Collection[tuple[int, int]], decoder: Decoder) -> str:
    n, of = len(experts), sum(len(one.computed) for one in decoder.mixtures().values())
    return (
        f"{n} of {of} experts {'was' if n == 1 else 'were'} chosen by fewer tokens of the text "
        "than their matrices have inputs, and rounded as without it: calibrate with a longer text"
    )


def _write_at(file: PartialFile, place: int, at: int, data: np.ndarray) -> None:
    file.write(place + at, data)
