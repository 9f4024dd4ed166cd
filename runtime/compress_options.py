"""What a user asks `headrace.compress` for, checked before any work."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from headrace.arguments import thread_count, whole
from headrace.calibration import TOKENS as CALIBRATE_TOKENS
from headrace.errors import UnsupportedError
from headrace.expert_bits import FORMATS_OF, LOSS
from headrace.fired_clusters import TOKENS as CLUSTER_TOKENS
from headrace.loaders.gguf import ModelFile
from headrace.offload.files import stamp_of
from headrace.price import TOKENS as EVALUATE_TOKENS
from headrace.price import text_digest
from headrace.recipe import KEEP, SPARSITY, Method
from headrace.refactor_experts import TOKENS as MOE_TOKENS
from headrace.sparse.bitstack import RANKS
from headrace.sparse.gqs import GROUP_FORMATS
from headrace.team import default_threads
from headrace.write_stack import STACK

Sort = Literal["error", "perplexity"]
SORTS: tuple[str, ...] = get_args(Sort)
# Of experts: those there may be, what they may lose, and over which of them.
Widths = tuple[tuple[int, ...], float, int | None]


@dataclass(frozen=True)
class Options:
    """What is to be made, every default filled in; see `headrace.compress.compress`.

    Attributes:
        cutting: experts, active, shared and fit_shared, where a dense model becomes a mixture.
        clusters: of neurons, that a dense model is to be cut into.
        calibrate_tokens, evaluate_tokens: of texts, if there are such.
        rate: share of the weights that a group-sparse format leaves out.
    """

    format: str
    ends: str | None
    method: Method
    rank: int | None
    sort: Sort
    cutting: tuple[int | None, int | None, float | None, bool] | None
    clusters: int | None
    widths: Widths | None
    calibrate: str | None
    calibrate_tokens: int
    evaluate: str | None
    evaluate_tokens: int
    rate: float
    threads: int

    @property
    def cuts(self) -> bool:
        """Whether feed-forwards are cut into parts, and nothing is rounded."""
        return self.cutting is not None or self.clusters is not None

    def key(self, model: ModelFile, widths: bool = True) -> str:
        """What decides the bytes but for the header: sources as they are now, and options.

        `widths` False: of work that does not depend on those that experts may get.
        """
        stamps = [(str(path.resolve()), *stamp_of(path)) for path in model.paths]
        text = None
        if self.calibrate is not None:
            text = text_digest(self.calibrate), self.calibrate_tokens
        rate = self.rate if self.format in GROUP_FORMATS else None
        decides = [
            self.format, self.ends, self.method, text, rate, self.cutting, self.clusters,
            self.widths if widths else None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps([stamps, decides]).encode()).hexdigest()


def options_of(
    *, format: str, ends: str | None, method: Method | None, sparsity: float | None,
    rank: int | None, sort: Sort, to_moe: bool, experts: int | None, active: int | None,
    shared: float | None, fit_shared: bool, neuron_clusters: int | None,
    expert_bits: Sequence[int] | None, expert_loss: float | None, expert_over: int | None,
    calibrate: str | None, calibrate_tokens: int | None, evaluate: str | None,
    evaluate_tokens: int | None, threads: int | None,
) -> Options:  # fmt: skip
    """Options that go together, from the arguments of `headrace.compress.compress`.

    Raises:
        UnsupportedError: some do not.
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
        _check_stack(ends, method, calibrate)
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
    return Options(
        format, ends, chosen, rank, sort, cutting if to_moe else None, neuron_clusters, widths,
        calibrate, n_calibrate, evaluate, n_evaluate,
        SPARSITY if sparsity is None else float(sparsity),
        default_threads() if threads is None else thread_count(threads),
    )  # fmt: skip


def _check_stack(ends: str | None, method: Method | None, calibrate: str | None) -> None:
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


def _widths(
    bits: Sequence[int] | None, loss: float | None, over: int | None, calibrate: str | None,
    cuts: bool,
) -> Widths | None:  # fmt: skip
    """The widths that experts may get, and what that may cost; None: nobody asked."""
    if bits is None:
        if loss is not None or over is not None:
            raise UnsupportedError("--expert-loss and --expert-over are for --expert-bits")
        return None
    known = ", ".join(map(str, FORMATS_OF))
    if not bits or not set(bits) <= set(FORMATS_OF):
        raise UnsupportedError(f"--expert-bits takes some of {known}, such as 2,4,8")
    if calibrate is None or cuts:
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
