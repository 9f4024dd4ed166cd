"""How far a model is from another of the same vocabulary, on a text: what a compression costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.errors import HeadraceError
from headrace.loaders.progress import Progress
from headrace.model import Model
from headrace.perplexity import log_probabilities, losses_of
from headrace.windows import cut_text

_VOCABULARY = "tokenizer.ggml.tokens"


def compare(
    reference: Model,
    model: Model,
    text: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare what two models expect next, over the second half of each window of a text.

    Args:
        reference: the model that the other should equal, such as the source of a compressed one.
        model: the other one.
        context: tokens of a window; `headrace.windows.cut_text` says how the text is cut.
        chunks: only so many windows.

    Returns:
        kl_divergence: mean over tokens of the sum of p log(p / q), p being the reference's
            probabilities of all tokens, in nats; its standard error, median, 99th percentile and
            largest value; top_agreement: how often both find the same token likeliest;
            perplexity_reference, perplexity, their ratio and the standard error of its logarithm;
            tokens, windows, context.

    Raises:
        HeadraceError: the vocabularies differ, or the text is shorter than one window.
        ValueError: the window is shorter than 4 tokens.
    """
    if not _same_vocabulary(reference, model):
        raise HeadraceError(
            "the two models have different vocabularies: only models that read the same tokens "
            "can be compared"
        )
    windows = cut_text(reference.tokenizer, text, context, chunks)
    divergence, agree, losses = [], [], []
    for i, (ids, targets) in enumerate(windows):
        for some, (p, q) in log_probabilities((reference, model), ids, windows.first):
            agree.append(p.argmax(axis=1) == q.argmax(axis=1))
            losses.append((losses_of(p, targets[some]), losses_of(q, targets[some])))
            q -= p
            np.exp(p, out=p)
            # No less than 0, but for rounding; 0 is added as -0 is no less either.
            sums = np.einsum("ij,ij->i", p, q, dtype=np.float64)
            divergence.append(np.maximum(0.0, -sums) + 0.0)
            del p, q
        if progress is not None:
            progress(i + 1, len(windows), "windows")
    kl = np.concatenate(divergence)
    ours, theirs = (np.concatenate(found) for found in zip(*losses, strict=True))
    n = len(kl)
    error = max(1, n - 1) ** 0.5
    return {
        "kl_divergence": float(kl.mean()),
        "kl_standard_error": float(kl.std()) / error,
        "kl_median": float(np.median(kl)),
        "kl_99": float(np.quantile(kl, 0.99)),
        "kl_largest": float(kl.max()),
        "top_agreement": float(np.concatenate(agree).mean()),
        "perplexity_reference": float(np.exp(ours.mean())),
        "perplexity": float(np.exp(theirs.mean())),
        "perplexity_ratio": float(np.exp((theirs - ours).mean())),
        "log_ratio_standard_error": float((theirs - ours).std()) / error,
        "tokens": n,
        "windows": len(windows),
        "context": context,
    }


def _same_vocabulary(a: Model, b: Model) -> bool:
    tokens = a.metadata.get(_VOCABULARY), b.metadata.get(_VOCABULARY)
    return a.vocabulary == b.vocabulary and (
        tokens[0] is None or list(tokens[0]) == list(tokens[1] or ())
    )
