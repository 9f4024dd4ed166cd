"""Statistics of a model's routes, kept in a file beside it, and which model they are of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from headrace.errors import HeadraceError
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile
from headrace.offload.route_statistics import RouteStatistics, read_statistics
from headrace.router_weights import RouterWeights, read_router


def identity(model: ModelFile, decoder: Decoder) -> str:
    """Says which model's routes these are: SHA-256 of its routers' weights, as float32.

    Routers stay what they are when a model is compressed.

    Raises:
        ModelFileError: the model cannot be read.
    """
    digest = hashlib.sha256()
    for router in routers_of(model, decoder):
        for array in router.arrays():
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def statistics_path(model: Path) -> Path:
    """The file beside a model, or a directory of one, that has statistics of its routes."""
    if model.name in ("", ".."):  # of a directory that has its name elsewhere
        model = Path(os.path.abspath(model))
    return model.with_name(model.name + ".routes")


def routers_of(model: ModelFile, decoder: Decoder) -> list[RouterWeights]:
    """Each mixture's router."""
    return [read_router(model, f) for f in decoder.mixtures().values()]


def statistics_of(path: Path, model: ModelFile) -> tuple[RouteStatistics | None, str | None]:
    """What was learned of a model's routes; if there is a file of no use, why it is none.

    Raises:
        ModelFileError, UnsupportedError: the model cannot be used.
    """
    file = statistics_path(path)
    if not os.path.lexists(file):
        return None, None
    decoder = describe(model)
    if not decoder.mixtures():
        return None, None
    try:
        learned = read_statistics(file)
    except HeadraceError as error:
        return None, f"{error}"
    if learned.model != identity(model, decoder):
        return None, f"{file} is of another model: it is ignored"
    mixtures = list(decoder.mixtures().values())
    if learned.experts.tolist() != [len(one.each) for one in mixtures] or any(
        one.active != learned.active for one in mixtures
    ):
        return None, f"{file} is of a model with other experts: it is ignored"
    if learned.fitted.size and learned.fitted.shape[3] != decoder.width + 1:
        return None, f"{file} has routers of another width: it is ignored"
    return learned, None
