"""The command about the routes of mixtures of experts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from headrace.cli_commands import model_path
from headrace.cli_output import progress_bar, say, show
from headrace.cli_text import text_of
from headrace.errors import HeadraceError


def trace(
    *, model: str, text: str, output: str | None, learn: bool, json: bool, **options: Any
) -> int:
    """Record which experts the tokens of a text choose, and what was predicted, in a file.

    TEXT is a file (`-` is stdin). With --learn, statistics of it are kept beside the model, in a
    file of its name with .routes behind: `plan` and `bench` then know how often experts are found
    in memory, and routers that are fitted to it say layers ahead which ones will be wanted. The
    text goes through the model in float32, a layer and an expert at a time.
    """
    from headrace.learned_routes import statistics_path
    from headrace.offload.route_statistics import learn as learn_from
    from headrace.offload.router_fit import RouterFit
    from headrace.offload.routing_replay import rates
    from headrace.routing import record

    if output is None and not learn:
        raise HeadraceError("there is nothing to do: -o names a file to write; or --learn")
    path, decoded = model_path(model), text_of(text)
    if output is not None:
        _check_output(Path(output), path)
    with progress_bar() as progress:
        fitting = RouterFit() if learn else None
        found = record(path, decoded, progress=progress, fitting=fitting, **options)
        if fitting is not None:
            said = rates(found, lambda done, total: progress(done, total, "replaying"))
            learn_from(found, said, fitting.fitted).write(statistics_path(path))
    facts: dict[str, Any] = {
        "tokens": len(found.chosen),
        "mixtures": len(found.experts),
        "experts": int(found.experts.sum()),
        "active": found.chosen.shape[2],
    }
    if output is not None:
        found.write(Path(output))
        facts["routes"] = output
    if learn:
        facts["statistics"] = str(statistics_path(path))
    show(facts, json)
    if not json and output is not None:
        say("compare policies on it with examples/benchmarks/expert_policies.py")
    return 0


def _check_output(target: Path, model: Path) -> None:
    """Before the work: a record can be written there, and nothing but a record is replaced.

    Raises:
        HeadraceError: it cannot, or something else would be lost.
    """
    from headrace.learned_routes import statistics_path
    from headrace.offload.route_trace import read_trace

    if not target.parent.is_dir():
        raise HeadraceError(f"{target.parent} is not a directory; make it first")
    if target.absolute() == statistics_path(model).absolute():
        raise HeadraceError(f"{target} is where --learn keeps statistics; name another file")
    if os.path.lexists(target):
        try:
            read_trace(target)
        except HeadraceError as error:
            raise HeadraceError(f"{target} exists; name another file: {error}") from error
