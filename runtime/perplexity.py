"""Perplexity of a text, counted as llama.cpp does, so that numbers compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from headrace.loaders.progress import Progress
from headrace.model import Model
from headrace.windows import cut_text


def perplexity(
    model: Model,
    text: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """exp of the mean negative log-likelihood over the second half of each window.

    `headrace.windows.cut_text` says how the text is cut.

    Returns:
        perplexity, its standard error, tokens scored, windows, and the windows' own perplexities.

    Raises:
        HeadraceError: the text is shorter than one window.
        ValueError: the window is shorter than 4 tokens.
    """
    windows = cut_text(model.tokenizer, text, context, chunks)
    losses = []
    for ids, targets in windows:
        parts = []
        for some, (log_p,) in log_probabilities((model,), ids, windows.first):
            parts.append(losses_of(log_p, targets[some]))
        losses.append(np.concatenate(parts))
        if progress is not None:
            progress(len(losses), len(windows), "windows")
    every = np.concatenate(losses)
    mean = float(every.mean())
    value = float(np.exp(mean))
    return {
        "perplexity": value,
        "standard_error": value * float(every.std()) / max(1, len(every) - 1) ** 0.5,
        "mean_nll": mean,
        "tokens": len(every),
        "windows": len(windows),
        "context": context,
        "window_perplexities": [float(np.exp(x.mean())) for x in losses],
    }


def log_probabilities(
    models: Sequence[Model], ids: Sequence[int], first: int
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """What models expect behind the tokens of a text from `first` on, but for the last.

    As many tokens come at a time as have room in the memory of each (`Model.logits_at_once`); the
    numbers do not depend on it.

    Returns:
        which of these tokens, and of each model float32 [tokens, vocabulary].
    """
    end = len(ids) - 1
    step = min([end - first, *(m.logits_at_once for m in models if m.logits_at_once)])
    for model in models:
        model.forget()
    for at in range(first, end, step):
        stop = min(at + step, end)
        found = [log_softmax(model.logits_between(ids, at, stop)) for model in models]
        yield slice(at - first, stop - first), found
        del found  # before the next are made


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of float32 [n, vocabulary]; sums in float64, result float32."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64)
    found: np.ndarray = shifted - np.log(total)[:, None].astype(np.float32)
    return found


def losses_of(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of each row's target: float64 [n]."""
    losses: np.ndarray = -log_p[np.arange(len(targets)), targets].astype(np.float64)
    return losses
