"""Write a model as one of our own files: matrices tiled, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headrace.compress_job import Compressed, Notice, job_of
from headrace.compress_matrices import compress_matrices
from headrace.compress_options import Sort, options_of
from headrace.compress_stack import compress_stack
from headrace.loaders.progress import Progress
from headrace.recipe import KEEP, Method
from headrace.write_stack import STACK


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
        evaluate_tokens: how much of it to use, in windows of 512; default: 32768.
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
    options = options_of(
        format=format, ends=ends, method=method, sparsity=sparsity, rank=rank, sort=sort,
        to_moe=to_moe, experts=experts, active=active, shared=shared, fit_shared=fit_shared,
        neuron_clusters=neuron_clusters, expert_bits=expert_bits, expert_loss=expert_loss,
        expert_over=expert_over, calibrate=calibrate, calibrate_tokens=calibrate_tokens,
        evaluate=evaluate, evaluate_tokens=evaluate_tokens, threads=threads,
    )  # fmt: skip
    job = job_of(
        options, src, dst, force=force, threads=threads, memory=memory, progress=progress,
        notice=notice,
    )  # fmt: skip
    return compress_stack(job) if options.format == STACK else compress_matrices(job)
