"""The price tag of a compressed model: how far it is from its source, kept in the file itself.

Keys `headrace.price.*`: the means of `headrace.compare` on a held-out text, tokens that were
scored, and the text's SHA-256; of a stack also `headrace.price.level4.*`, the means of its first
four levels, and so on. All have the same size whatever they say, so that a header is
written before they are known, and again when they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import BudgetError
from headrace.loaders.model_file import ModelFile
from headrace.loaders.progress import Progress
from headrace.sizes import format_size
from headrace.windows import check_length, scored_of

if TYPE_CHECKING:
    from headrace.model import Model


WINDOW = 512  # tokens
TOKENS = 64 * WINDOW  # unless told otherwise
_CHARACTERS = 16  # more than a token has on average
_PREFIX = "headrace.price."
_RESERVED = "headrace.later."  # of the room for it: as long, and no price
_LEVEL = re.compile(re.escape(_PREFIX) + r"level(\d{1,3})\.kl_divergence")
RATES = ("kl_divergence", "top_agreement", "perplexity_ratio")


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def price_keys(found: dict[str, Any] | None, levels: Sequence[int] = ()) -> dict[str, str | float]:
    """Metadata of a price; None: of the room for one that is not known yet, the same bytes.

    `levels` of a stack have theirs in `found["levels"]`.
    """
    prefix = _RESERVED if found is None else _PREFIX
    found = found or {"tokens": 0, "text_sha256": "0" * 64}
    parts = found.get("levels", [{} for _ in levels])
    return {
        **{prefix + name: float(found.get(name, 0)) for name in RATES},
        **{
            f"{prefix}level{level}.{name}": float(part.get(name, 0))
            for level, part in zip(levels, parts, strict=True)
            for name in RATES
        },
        prefix + "tokens": int(found["tokens"]),
        prefix + "text_sha256": found["text_sha256"],
    }


def price_of(model: ModelFile) -> dict[str, Any] | None:
    """The price that a file states; None: it states none.

    Raises:
        ModelFileError: what it states is none.
    """
    if _PREFIX + RATES[0] not in model.metadata:
        return None
    named = (_LEVEL.fullmatch(key) for key in model.metadata)
    levels = sorted(int(match[1]) for match in named if match)
    parts = [{"level": n, **_rates_of(model, f"{_PREFIX}level{n}.")} for n in levels]
    return {
        **_rates_of(model, _PREFIX),
        **({"levels": parts} if parts else {}),
        "tokens": model.get(_PREFIX + "tokens", int, low=1),
        "text_sha256": model.get(_PREFIX + "text_sha256", str)[:64],
    }


def _rates_of(model: ModelFile, prefix: str) -> dict[str, float]:
    return {
        "kl_divergence": model.get(prefix + "kl_divergence", float, low=0),
        "top_agreement": model.get(prefix + "top_agreement", float, low=0, high=1),
        "perplexity_ratio": model.get(prefix + "perplexity_ratio", float, low=0),
    }


def price_options(source: Path, threads: int | None) -> dict[str, Any]:
    """How both models are loaded that `measure_price` compares."""
    from headrace.families import describe
    from headrace.loaders.tiled import open_model

    window = min(WINDOW, describe(open_model(source)).context)
    return {"context": window, "threads": threads, "logits_rows": scored_of(window)}


def least_bytes(source: Path, threads: int | None, group: int | None) -> int:
    """What a process needs that compares a model with what becomes of it, as far as is known.

    Args:
        group: weights that are left out together; None: none are, and then what is to be compared
            takes no more than its source.
    """
    from headrace.families import describe
    from headrace.loaders.tiled import open_model
    from headrace.pair import least_bytes as of_pair
    from headrace.plan import SHORT_TOKENS
    from headrace.sparse import gqs_columns, gqs_kernels
    from headrace.sparse.linear import activation_bytes
    from headrace.team import default_threads

    options = price_options(source, threads)
    needed = of_pair(source, source, options)
    if group is not None:
        widest = max(m.columns for m in describe(open_model(source)).matrices())
        tokens = options["context"] + SHORT_TOKENS
        needed += 2 * gqs_kernels.REACH + tokens * activation_bytes("x16", widest)
        needed += (threads or default_threads()) * gqs_columns.scratch_bytes(widest, group)
    return needed


def least_bytes_of_stack(
    source: Path, stack: ModelFile, levels: Sequence[int], threads: int | None
) -> int:
    """What a process needs that compares a model with a stack of it, written or not yet.

    Args:
        stack: its header, as the file will have it.
        levels: those that are to be priced, too.
    """
    from headrace.choices import PROCESS_BYTES
    from headrace.planning import bounds, bounds_of

    options = price_options(source, threads)
    whole, _ = bounds_of(stack, whole_stack=True, **options)
    beside = max(whole, levels_bytes(stack, levels, options))
    return bounds(source, **options)[0] + beside - PROCESS_BYTES


def levels_bytes(file: ModelFile, levels: Sequence[int], options: dict[str, Any]) -> int:
    """What a process takes with the most of these levels of a stack in memory; 0: of none."""
    from headrace.families import describe
    from headrace.planning import bounds_of
    from headrace.stack import stack_of

    stack = stack_of(file, describe(file))
    if stack is None or not levels:
        return 0
    most = bounds_of(file, **options)[1]
    return most - stack.n_bytes(len(stack)) + stack.n_bytes(max(levels) * stack.least)


def check_text(model: ModelFile, text: str, tokens: int) -> None:
    """Make sure before a model is compressed that `measure_price` can use a text.

    Raises:
        HeadraceError: it is shorter than one window, or the file has no usable tokenizer.
    """
    from headrace.families import describe
    from headrace.tokenizer import Tokenizer

    window = min(WINDOW, describe(model).context)
    tokenizer = Tokenizer.from_metadata(model.metadata, model.paths[0])
    check_length(tokenizer, _used(text, window, tokens), window, "--evaluate")


def _used(text: str, window: int, tokens: int) -> str:
    """What is looked at: the library takes some hundred bytes for each token, needed or not."""
    return text[: max(1, tokens // window) * window * _CHARACTERS]


def measure_price(
    source: Path, compressed: Path, text: str, *, tokens: int, threads: int | None,
    memory: int | None, progress: Progress | None, levels: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Compare a compressed model with its source; `memory` is for both together.

    Of a stack all blocks count, and the first `levels` levels have prices of their own.

    Raises:
        what `headrace.load` and `headrace.compare.compare` raise.
    """
    from headrace.compare import compare
    from headrace.loaders.tiled import open_model
    from headrace.pair import load_pair

    options = price_options(source, threads)
    window = options["context"]
    chunks = max(1, tokens // window)
    part = _used(text, window, tokens)

    def price(pair: tuple[Model, Model]) -> dict[str, Any]:
        return compare(*pair, part, context=window, chunks=chunks, progress=progress)

    def loaded(whole_stack: bool, floor: int = 0) -> AbstractContextManager[tuple[Model, Model]]:
        return load_pair(
            source, compressed, memory=memory, progress=progress, whole_stack=whole_stack,
            floor=floor, **options,
        )  # fmt: skip

    with loaded(whole_stack=True) as pair:
        found = price(pair)
    parts: list[dict[str, Any]] = []
    if levels:
        floor = levels_bytes(open_model(compressed), levels, options)
        with loaded(whole_stack=False, floor=floor) as pair:
            for n in sorted(levels, reverse=True):
                _compute_with(pair[1], n)
                parts.insert(0, {"level": n, **_rates(price(pair))})
    return {
        **_rates(found),
        **({"levels": parts} if parts else {}),
        "tokens": found["tokens"],
        "text_sha256": text_digest(text),
    }


def _compute_with(model: Model, levels: int) -> None:
    """Let a stack compute with so many blocks of each matrix.

    Raises:
        BudgetError: it has got memory for fewer.
    """
    p = model.prepared
    if p.stack is None:
        raise AssertionError("no stack has no levels")
    missing = p.stack.n_bytes(levels * p.stack.least) - p.stack.n_bytes(p.blocks)
    if missing > 0:
        needed = sum(p.parts.values()) + missing
        raise BudgetError(
            f"to price {levels} levels of a stack takes {format_size(needed)} of memory beside the "
            "source: less is free than was when this began. Free some, or leave out --evaluate",
            needed_bytes=needed,
        )
    model.compute_with(dict.fromkeys(p.stack.shapes, levels))


def _rates(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in RATES}
