"""Write a model as one of our own files: matrices tiled, in the order in which they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from headrace.arguments import whole
from headrace.calibration import TOKENS as CALIBRATE_TOKENS
from headrace.calibration import LayerInputs
from headrace.choices import PROCESS_BYTES, VOCABULARY_ENTRY_BYTES
from headrace.cut_model import CutModel, dense_parts
from headrace.decompose_stack import Blocks
from headrace.entries import entry_of, others
from headrace.errors import HeadraceError, UnsupportedError
from headrace.expert_bits import FORMATS_OF, LOSS
from headrace.expert_order import laid_out
from headrace.expert_trial import check_room, last_windows
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.fired_clusters import TOKENS as CLUSTER_TOKENS
from headrace.learned_routes import statistics_of, statistics_path
from headrace.least_memory import Need, check_memory
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.progress import Progress
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import (
    build_header,
    layout_key,
    open_model,
)
from headrace.offload.files import stamp_of
from headrace.partial_file import PartialFile, check_disk, drop
from headrace.placing import place
from headrace.planning import limit_of
from headrace.price import TOKENS as EVALUATE_TOKENS
from headrace.price import (
    check_text,
    least_bytes,
    least_bytes_of_stack,
    measure_price,
    price_keys,
    text_digest,
)
from headrace.pruning import PrunedMatrix
from headrace.recipe import KEEP, SPARSITY, Method, Recipe, recipes, remarks
from headrace.refactor_experts import TOKENS as MOE_TOKENS
from headrace.rounding import Rounder
from headrace.rows import read_as_it_is
from headrace.shared_fit import needs as fitting_needs
from headrace.shared_fit import shared_downs
from headrace.sparse.bitstack import RANKS
from headrace.sparse.format import Floats
from headrace.sparse.gqs import GROUP_FORMATS
from headrace.stack import refuse_stack
from headrace.stack_order import check_text as check_sort_text
from headrace.stack_order import least_bytes as least_to_sort
from headrace.stack_order import measure_blocks
from headrace.team import default_threads
from headrace.waiting_experts import waiting_experts, waiting_of
from headrace.write_clusters import ClusteredModel
from headrace.write_moe import Mixture, cut_of
from headrace.write_stack import STACK, beside, write_stack

Notice = Callable[[str], None]
Sort = Literal["error", "perplexity"]
SORTS: tuple[str, ...] = get_args(Sort)
_COMPARING = "comparing with the source (--evaluate)"


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
class _Options:
    """What decides the bytes that are written."""

    format: str
    ends: str | None
    method: str
    calibrate: str | None  # SHA-256 of the text
    calibrate_tokens: int | None  # None: there is no text
    sparsity: float | None
    cutting: tuple[int | None, int | None, float | None, bool] | None  # into experts
    clusters: int | None  # of neurons, to be cut into
    # Of experts, what they may lose, and over which of the widths.
    widths: tuple[tuple[int, ...], float, int | None] | None


def compress(
    src: str | Path,
    dst: str | Path,
    *,
    format: str = KEEP,
    ends: str | None = None,
    method: Method | None = None,
    sparsity: float | None = None,
    rank: int | None = None,
    sort: Sort = "error",
    to_moe: bool = False,
    experts: int | None = None,
    active: int | None = None,
    shared: float | None = None,
    fit_shared: bool = False,
    neuron_clusters: int | None = None,
    expert_bits: Sequence[int] | None = None,
    expert_loss: float | None = None,
    expert_over: int | None = None,
    calibrate: str | None = None,
    calibrate_tokens: int | None = None,
    evaluate: str | None = None,
    evaluate_tokens: int | None = None,
    force: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Compressed:
    """Write a model file that loads without being repacked, its weights in another format.

    Little of a model is in memory at a time. Where statistics of a mixture's routes lie beside the
    source (`headrace trace --learn`), experts that follow one another lie side by side
    (`headrace.expert_order`), and the result gets them, too. `dst` appears when it is complete, or
    not at all. What is complete when something goes wrong lies in a hidden file beside `dst`, and
    the same call goes on there; see `headrace.partial_file`.

    Args:
        src: whatever `headrace.load` takes.
        dst: the file to write.
        format: of the matrices of layers, such as "q4_0"; "keep": the one in which each loads;
            "i4_auto" and "i4a_auto": the group size that suits each matrix; "llm_fp4": the split of
            4-bit floats that does; "s_auto": how many of
            the weights stay, for models that have many zeros; "bitstack": a stack of blocks, of
            which a model loads what memory has room for. It needs `calibrate`, or the word that
            it shall do without ("rtn"); its price is that of all blocks, and of some levels.
        ends: of the embedding and the head; default: "keep" where that takes no more than 8.5 bits
            a weight or `format` is "keep", else "q8_0".
        method: "rtn" rounds as the format's own encoder does, "search" looks for the scales with
            the least squared error, weighted by how large inputs are if there is a text to
            `calibrate` with, which "gptq" needs. Default: "gptq" with such a text, else "rtn".
        sparsity: of a group-sparse format ("gqs_g32"), the share of the weights of layers that is
            left out, at least; default: a half. "rtn" leaves out the smallest, "search" those that
            matter least for the inputs of `calibrate`, "gptq" the same, and lets others make up.
        rank: vectors of a block of a stack, one of 1, 2, 4, 8 and 16: with more, a block is larger
            and leaves less. Default: what suits the model's width.
        sort: the order of a stack's blocks within a level: "error" has those first that lessen the
            error of their matrix's output most, "perplexity" those with which the model itself is
            best on `calibrate`: a forward pass for each block.
        to_moe: cut the feed-forwards of a dense model into a shared part and experts, with routers
            fitted on `calibrate`; see `headrace.refactor_experts`. Weights stay as exact as they
            are: compress the result once more for another `format`.
        experts, active: how many a layer gets, and a token takes; default: 16, of which 4.
        shared: share of the neurons that all tokens take, about; default: a third.
        fit_shared: change the shared part so that it makes up for experts that are not chosen; with
            all of them the output is then no longer the dense model's.
        neuron_clusters: cut the neurons of a dense model gated by ReLU into so many clusters for a
            layer, of those that fire together on `calibrate`; see `headrace.fired_clusters`. What
            it computes stays the same. Weights are written as with `to_moe`.
        expert_bits: widths that experts of a mixture may get (of 2, 3, 4 and 8), gate and up one
            and down its own, each as many bits as the loss on the end of `calibrate` calls for;
            `format` is that of the other matrices. The whole source has to have room in memory.
            With "gptq" shared parts make up for rounded experts; see `headrace.shared_fit`.
        expert_loss: by which share perplexity may rise then; default: 0.02.
        expert_over: one of these widths: perplexity may rise over that of all experts at this one;
            default: over the source's.
        calibrate: a text like those that the model will read.
        calibrate_tokens: how much of it to use; default: 65536; 16384 where `to_moe`, 8192
            for `neuron_clusters`.
        evaluate: another text, on which to compare the result with the source; what comes out
            stands in the file.
        evaluate_tokens: how much of it to use; default: 32768.
        force: replace `dst` if there is such a file.
        threads: default: the physical cores that this process may use.
        memory: bytes that the process may take; default: what is free.
        progress: called with (done, total, what).
        notice: called with a line that the user should know before the wait.

    Raises:
        UnsupportedError: no such format or method, a model that cannot run, or a weight that is
            beyond what the format can hold.
        ModelNotFoundError, DownloadError, ModelFileError: no usable source.
        BudgetError: the work on one tensor does not fit in `memory`.
        HeadraceError: `dst` exists or cannot be written, or a text is too short.
    """
    cutting = (experts, active, shared, fit_shared)
    cuts = to_moe or neuron_clusters is not None
    if to_moe and neuron_clusters is not None:
        raise UnsupportedError("--to-moe and --neuron-clusters exclude each other")
    if cuts and (calibrate is None or (format, ends, method) != (KEEP, None, None)):
        raise UnsupportedError(
            f"{'--to-moe' if to_moe else '--neuron-clusters'} needs a text to --calibrate with, "
            "and takes no --format, --method or --ends: compress what it writes once more"
        )
    if not to_moe and cutting != (None, None, None, False):
        raise UnsupportedError("--experts, --active, --shared and --fit-shared are for --to-moe")
    widths = _widths(expert_bits, expert_loss, expert_over, calibrate, cuts)
    copied = format == KEEP and widths is None  # or some matrices are rounded
    chosen: Method = method or ("rtn" if calibrate is None or copied else "gptq")
    if chosen == "gptq" and calibrate is None:
        raise UnsupportedError(
            "--method gptq needs a text: add --calibrate TEXT, or take --method search or rtn"
        )
    if format == STACK:
        if method == "search" or ends is not None:
            raise UnsupportedError(
                f"--format {STACK} takes neither --method search nor --ends: leave that out"
            )
        if calibrate is None and method is None:
            raise UnsupportedError(
                f"--format {STACK} needs a text like those that the model will read: add "
                "--calibrate TEXT. Blocks that are made without one are of little use: with 4 for "
                "each matrix SmolLM2 has a perplexity of 426, and of 22 with a text. If you want "
                "them all the same, say --method rtn"
            )
    if calibrate is not None and not cuts and (chosen == "rtn" or copied):
        raise UnsupportedError(
            "--calibrate changes nothing here: it is for --method gptq or search, and a --format"
        )
    usual = MOE_TOKENS if to_moe else CLUSTER_TOKENS if cuts else CALIBRATE_TOKENS
    n_calibrate = _tokens("calibrate", calibrate, calibrate_tokens, usual)
    n_evaluate = _tokens("evaluate", evaluate, evaluate_tokens, EVALUATE_TOKENS)
    if sparsity is not None and format not in GROUP_FORMATS:
        raise UnsupportedError(f"--sparsity is for --format {', '.join(GROUP_FORMATS)}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UnsupportedError(f"--sparsity is from 0 to less than 1, not {sparsity}")
    if rank is not None and format != STACK:
        raise UnsupportedError(f"--rank is for --format {STACK}")
    if rank is not None and rank not in RANKS:
        raise UnsupportedError(f"--rank is one of {', '.join(map(str, RANKS))}, not {rank}")
    if sort not in SORTS:
        raise UnsupportedError(f"--sort is one of {', '.join(SORTS)}, not {sort!r}")
    if sort != "error" and (format != STACK or calibrate is None):
        raise UnsupportedError(
            f"--sort {sort} is for --format {STACK}, and needs a text to --calibrate with"
        )
    rate = SPARSITY if sparsity is None else float(sparsity)
    n_threads = default_threads() if threads is None else whole("threads", threads, low=1)
    options = _Options(
        format, ends, chosen,
        None if calibrate is None else text_digest(calibrate),
        None if calibrate is None else n_calibrate,
        rate if format in GROUP_FORMATS else None,
        cutting if to_moe else None,
        neuron_clusters,
        widths,
    )  # fmt: skip
    allowed = limit_of(memory)
    limit = allowed.n_bytes
    target = Path(os.path.expanduser(dst))
    _check_target(target, force)
    path = resolve(src, progress=progress)
    model = open_model(path)
    if target.exists() and any(os.path.samefile(path, target) for path in model.paths):
        raise HeadraceError(f"{target} is the model to be read; write to another file")
    decoder = describe(model)
    refuse_stack(model, decoder)
    process = PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * decoder.vocabulary
    priced: list[Need] = []
    if evaluate is not None:  # not after the wait
        check_text(model, evaluate, n_evaluate)
        if evaluate == calibrate and notice is not None:
            notice(
                "--evaluate has the text of --calibrate, on which the result is nearer to its "
                "source than elsewhere: take another one"
            )
        group = GROUP_FORMATS[format].group if format in GROUP_FORMATS else None
        both = least_bytes(path, threads, group)
        priced = [(_COMPARING, both - process)]
    room = None if limit is None else limit - process
    if format == STACK:
        if sort == "perplexity" and calibrate is not None:
            check_sort_text(model, calibrate)
        with ExitStack() as stack:
            inputs = None
            if calibrate is not None:
                found = LayerInputs(
                    model, decoder, calibrate, n_calibrate, n_threads, room, progress, notice
                )
                inputs = stack.enter_context(found)

            def ready(blocks: Blocks, planned: ModelFile, levels: Sequence[int]) -> None:
                needs = list[Need]()
                if evaluate is not None:
                    both = least_bytes_of_stack(path, planned, levels, threads)
                    needs = [(_COMPARING, both - process)]
                if sort == "perplexity":
                    alone = least_to_sort(planned, threads)
                    needs.append(("trying blocks (--sort perplexity)", alone - process))
                needs += blocks.needs(None if inputs is None else inputs.held)
                needs += [] if inputs is None else inputs.needs()
                check_memory(path, allowed, process, needs, 1)

            measure = None
            if evaluate is not None:

                def measure(written: Path, levels: Sequence[int]) -> dict[str, Any]:
                    return measure_price(
                        path, written, evaluate, tokens=n_evaluate, threads=threads,
                        memory=memory, progress=progress, levels=levels,
                    )  # fmt: skip

            try_blocks = None
            if sort == "perplexity" and calibrate is not None:
                try_blocks = partial(
                    measure_blocks, text=calibrate, threads=threads, memory=memory,
                    progress=progress, notice=notice or (lambda line: None),
                )  # fmt: skip
            price = write_stack(
                path, target, rank=rank, inputs=None if inputs is None else inputs.of,
                n_threads=n_threads, room=room, ready=ready,
                key=_key(model, options), measure=try_blocks, price=measure, progress=progress,
                check=partial(_check_target, target, force), notice=notice or (lambda line: None),
            )  # fmt: skip
        return Compressed(target, model.size_bytes, target.stat().st_size, price=price)
    if cuts:
        dense_parts(model, decoder)
    elif calibrate is not None and decoder.clustered():
        raise UnsupportedError(
            "clusters of neurons are rounded without --calibrate: use --method rtn or search, or "
            "give the weights the exact values before they are cut into clusters",
            path=model.paths[0],
        )
    if widths is not None and not decoder.mixtures():
        raise UnsupportedError("--expert-bits is for mixtures of experts", path=model.paths[0])
    say, price = notice or (lambda line: None), None
    learned, useless = statistics_of(path, model)
    if useless is not None:
        say(useless)
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(TensorReader())
            rounder = Rounder(reader, n_threads, room)
            wanted = recipes(
                model, decoder, format, ends, "rtn" if format == KEEP and widths else chosen,
                reader, rate, progress,
            )  # fmt: skip
            inputs = None
            if calibrate is not None:
                found = LayerInputs(
                    model, decoder, calibrate, n_calibrate, n_threads, room, progress, notice,
                    watched=cuts,
                )  # fmt: skip
                inputs = stack.enter_context(found)
            said, waiting = list[str](), None
            if widths is not None and inputs is not None and calibrate is not None:
                matrices, mixtures = place(model, decoder, "q8"), decoder.mixtures()
                downs = shared_downs(mixtures, matrices) if chosen == "gptq" else {}
                again = LayerInputs(
                    model, decoder, calibrate, n_calibrate, n_threads, room, progress, watched=True
                )
                stack.enter_context(again)
                needs = priced + _needs(wanted, rounder, inputs)
                needs += fitting_needs(again, downs, mixtures, widths[0])
                check_memory(path, allowed, process, needs, n_threads)
                windows = last_windows(model, decoder, calibrate)
                check_room(path, windows.context, windows.scored, limit)
                waiting = waiting_experts(
                    path, target, matrices, mixtures, *widths, method=chosen, inputs=inputs,
                    again=again, downs=downs, rounder=rounder, reader=reader, windows=windows,
                    key=_key(model, replace(options, widths=None)), stack=stack, threads=n_threads,
                    memory=memory, progress=progress, notice=say,
                )  # fmt: skip
                wanted = [waiting.recipe(one) for one in wanted]
                said.append(waiting.said)
            vectors, rest = others(model, decoder, [recipe.placed for recipe in wanted])
            sources: list[Recipe | TensorInfo] = [*vectors, *wanted, *rest]
            entries = [entry_of(one.placed if isinstance(one, Recipe) else one) for one in sources]
            cut: CutModel | None = None
            if to_moe:
                how = cut_of(model, decoder, *cutting)
                cut = Mixture(model, decoder, how, shared, entries, sources)
            elif neuron_clusters is not None:
                cut = ClusteredModel(model, decoder, neuron_clusters, entries, sources)
            entries = entries if cut is None else cut.entries
            more = {} if cut is None else cut.metadata
            tag = {} if evaluate is None else price_keys(None)
            order = laid_out([one.name for one in entries], decoder, learned)
            laid = [entries[i] for i in order]
            header, offsets, size = build_header(model, laid, {**more, **tag})
            places = dict(zip(order, offsets, strict=True))
            written = list(accumulate(one.n_bytes for one in entries))
            key = f"{_key(model, options)} {layout_key(model, laid, size)}"
            said += remarks(wanted) if cut is None else cut.remarks()
            for line in said:
                say(line)
            if cut is not None and inputs is not None:
                check_memory(path, allowed, process, priced + cut.needs(inputs), 1)
            else:
                check_memory(
                    path, allowed, process, priced + _needs(wanted, rounder, inputs), n_threads
                )
            for other in (*beside(target), *([] if widths else [waiting_of(target)])):
                drop(other, say)
            file = stack.enter_context(PartialFile(target, key, size))
            check_disk(target, {target: size})
            file.tell(say, len(entries), "tensors")
            file.write(0, header)

            def wrote(i: int) -> None:
                file.finish(i + 1)
                if progress is not None:
                    progress(written[i], size, "writing")

            if cut is not None and inputs is not None:
                cut.write(file, places, inputs, reader, n_threads, wrote)
            else:
                for i in range(file.done, len(entries)):
                    write = partial(_write_at, file, places[i])
                    data = None if waiting is None else waiting.tiles(entries[i].name)
                    if data is not None:
                        write(0, data)
                    else:
                        instead = None if waiting is None else waiting.changed(entries[i].name)
                        _write_tensor(sources[i], reader, rounder, inputs, write, instead)
                    wrote(i)
            few = set() if inputs is None else {*inputs.few}
            few |= set() if waiting is None else waiting.few
            if few:
                said.append(_few(few, decoder))
                say(said[-1])
            file.complete()
            for line in rounder.remarks():
                say(line)
                said.append(line)
            if evaluate is not None:
                price = measure_price(
                    path, file.path, evaluate, tokens=n_evaluate, threads=threads,
                    memory=memory, progress=progress,
                )  # fmt: skip
                header, _, whole_size = build_header(model, laid, {**more, **price_keys(price)})
                if whole_size != size:
                    raise AssertionError("the price tag has another size than announced")
                file.write(0, header)
            # Another file of that name may have come in the meantime.
            file.publish(partial(_check_target, target, force))
            if learned is not None:  # routers stay, so routes do
                learned.write(statistics_path(target))
                say(f"what is known of the source's routes is in {statistics_path(target)}, too")
    except OSError as error:
        raise HeadraceError(f"cannot write {target}: {error.strerror or error}") from error
    sizes: dict[str, int] = {}
    for one in wanted:
        name = one.placed.format.name
        sizes[name] = sizes.get(name, 0) + one.placed.packed_bytes
    return Compressed(target, model.size_bytes, size, sizes, tuple(said), price)


def _few(experts: Collection[tuple[int, int]], decoder: Decoder) -> str:
    n, of = len(experts), sum(len(one.computed) for one in decoder.mixtures().values())
    return (
        f"{n} of {of} experts {'was' if n == 1 else 'were'} chosen by fewer tokens of the text "
        "than their matrices have inputs, and rounded as without it: calibrate with a longer text"
    )


def _widths(
    bits: Sequence[int] | None, loss: float | None, over: int | None, calibrate: str | None,
    to_moe: bool,
) -> tuple[tuple[int, ...], float, int | None] | None:  # fmt: skip
    """The widths that experts may get, and what that may cost; None: nobody asked."""
    if bits is None:
        if loss is not None or over is not None:
            raise UnsupportedError("--expert-loss and --expert-over are for --expert-bits")
        return None
    known = ", ".join(map(str, FORMATS_OF))
    if not bits or not set(bits) <= set(FORMATS_OF):
        raise UnsupportedError(f"--expert-bits takes some of {known}, such as 2,4,8")
    if calibrate is None or to_moe:
        raise UnsupportedError(
            "--expert-bits needs a text to --calibrate with, and a model that is a mixture already"
        )
    loss = LOSS if loss is None else float(loss)
    if not 0 <= loss < math.inf:
        raise UnsupportedError(f"--expert-loss is a share from 0 on, not {loss}")
    if over is not None and over not in bits:
        raise UnsupportedError(f"--expert-over is one of --expert-bits, not {over}")
    return tuple(sorted(set(bits))), loss, over


def _tokens(what: str, text: str | None, wanted: int | None, default: int) -> int:
    if wanted is None:
        return default
    found = whole(f"{what}_tokens", wanted, low=1)
    if text is None:
        raise UnsupportedError(f"--{what}-tokens is for --{what}, which names the text")
    return found


def _check_target(target: Path, force: bool) -> None:
    if target.is_dir():
        raise HeadraceError(f"{target} is a directory; name the file to write in it")
    if not target.parent.is_dir():
        raise HeadraceError(f"{target.parent} is not a directory; make it first")
    if os.path.lexists(target) and not (force and target.is_file()):
        advice = "use --force to replace it" if target.is_file() else "name another"
        raise HeadraceError(f"{target} exists; {advice}")


def _needs(chosen: list[Recipe], rounder: Rounder, inputs: LayerInputs | None) -> list[Need]:
    """What the work on each matrix takes, and on the text."""
    needs = [] if inputs is None else inputs.needs()
    for recipe in chosen:
        if recipe.method is not None:
            name = recipe.placed.matrix.name
            held = 0 if inputs is None else inputs.held(name)
            needs.append((name, rounder.least_bytes(recipe, held)))
    return needs


def _key(model: ModelFile, options: _Options) -> str:
    """What decides the bytes but for the header: sources as they are now, and options."""
    stamps = [(str(path.resolve()), *stamp_of(path)) for path in model.paths]
    return hashlib.sha256(json.dumps([stamps, asdict(options)]).encode()).hexdigest()


def _write_tensor(
    source: Recipe | TensorInfo, reader: TensorReader, rounder: Rounder, inputs: LayerInputs | None,
    write: Callable[[int, np.ndarray], None], instead: Floats | None = None,
) -> None:  # fmt: skip
    if isinstance(source, Recipe) and source.method is not None:
        found = None
        if inputs is not None and source.method != "rtn":
            found = inputs.of(source.placed.matrix.name)
        rounder.round(source, found, write, instead)
        return
    at = 0
    copied = source.placed if isinstance(source, Recipe) else source
    assert not isinstance(copied, PrunedMatrix)
    for data in read_as_it_is(reader, copied):
        write(at, data)
        at += data.nbytes


def _write_at(file: PartialFile, place: int, at: int, data: np.ndarray) -> None:
    file.write(place + at, data)
