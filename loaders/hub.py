"""Models of the Hugging Face hub, in the hub's own cache."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import DownloadError, HeadraceError, ModelNotFoundError
from headrace.loaders.known import file_size
from headrace.loaders.progress import CallbackError, Progress, guarded
from headrace.loaders.split_names import all_parts, model_groups

# huggingface_hub is imported where it is used: a warm start passes through this file.


class HubId(NamedTuple):
    """A repository of the hub; `file` is a file, a part of its name (`Q4_K_M`), or not said."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:@]+?))?(:(?P<file>[^:]+))?", re.ASCII
)
_HUB_URI = re.compile(
    r"hf://(models/(?=[^/]+/[^/]+))?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:@/]+))?"
    r"([:/](?P<file>[^:]+))?",
    re.ASCII,
)


def parse_hub_id(text: str) -> HubId | None:
    """`org/repo[@revision][:file]` or `hf://org/repo[@revision][/file]`; None for anything else."""
    match = (_HUB_URI if text.startswith("hf://") else _HUB_ID).fullmatch(text)
    if match is None or ".." in (match["file"] or "").split("/"):
        return None
    return HubId(match["repo"], match["revision"], match["file"])


def hub_cache_dir() -> Path:
    """Where huggingface_hub keeps its files (its own environment variables decide)."""
    env = os.environ
    if found := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expanduser(os.path.expandvars(found)))
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = env.get("HF_HOME") or os.path.join(base, "huggingface")
    return Path(os.path.expanduser(os.path.expandvars(home)), "hub")


def hub_cached(hub: HubId, *, any_file: bool = False) -> Path | None:
    """The cached file of a hub id, found without importing huggingface_hub or asking the hub.

    Without a file in the id only the hub knows which one is meant (None), unless `any_file`.
    """
    if hub.file is None and not any_file:
        return None
    folder = hub_cache_dir() / f"models--{hub.repo.replace('/', '--')}"
    try:
        reference = folder / "refs" / (hub.revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else hub.revision
        snapshot = folder / "snapshots" / (commit or "main")
        names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*.gguf")]
        chosen = _choose(hub, {name: file_size(snapshot / name) for name in names})
        complete = all((snapshot / name).is_file() for name in all_parts(chosen))
        return snapshot / chosen if complete else None
    except (OSError, ModelNotFoundError):
        return None


def pull_hub(hub: HubId, *, progress: Progress | None = None) -> Path:
    """Fetch a GGUF file (all parts of a split one) of a hub repository into the hub's own cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise DownloadError(
            f"fetching {hub} from the Hugging Face hub takes an extra: pip install headrace[hub]"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        # Asked first even for a named file: offline, this fails at once, where the download itself
        # retries for 20 s; and a mistyped file can be answered with those that are there.
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(
            hub.repo, revision=hub.revision, files_metadata=True
        )
        file = _choose(hub, {s.rfilename: s.size or 0 for s in info.siblings or ()})
        report = guarded(progress)
        options = _hub_options(huggingface_hub.hf_hub_download, file, report)
        paths = [
            huggingface_hub.hf_hub_download(
                hub.repo,
                part,
                revision=hub.revision,
                endpoint=endpoint,
                cache_dir=hub_cache_dir(),
                **options,
            )
            for part in all_parts(file)
        ]
    except HeadraceError:
        raise
    except CallbackError as caught:
        raise caught.error from None
    except Exception as error:
        if _is_offline(error) and (cached := hub_cached(hub, any_file=True)):
            return cached
        raise _hub_error(error, hub) from error
    return Path(paths[0])


def _choose(hub: HubId, sizes: dict[str, int]) -> str:
    names = [name for name in sizes if name.lower().endswith(".gguf")]
    groups = model_groups(names)
    wanted = (hub.file or "").lower()
    if wanted.endswith(".gguf"):
        chosen = [first for first, parts in groups.items() if hub.file in (first, *parts)]
    elif wanted:
        chosen = [first for first in groups if wanted in first.lower()]
    else:  # image projectors lie beside the models that they belong to
        chosen = [f for f in groups if "mmproj" not in f.lower()] or list(groups)
    if len(chosen) == 1:
        return chosen[0]
    if not groups:
        raise ModelNotFoundError(f"{hub} on the Hugging Face hub holds no .gguf file")
    listing = "".join(
        f"\n  {sum(sizes[part] for part in groups[first]) / 1e6:8.0f} MB  {hub}:{first}"
        for first in chosen or groups
    )
    if wanted and not chosen:
        raise ModelNotFoundError(f"{hub} has no model {hub.file!r}; it has:{listing}")
    raise ModelNotFoundError(f"{hub} has {len(chosen)} models that fit; name one of:{listing}")


def _hub_options(download: Callable[..., Any], file: str, report: Progress) -> Any:
    """`tqdm_class` (hub 1.0 and newer) that reports and prints nothing itself."""
    import inspect

    if "tqdm_class" not in inspect.signature(download).parameters:
        report(0, None, f"Downloading {file}")
        return {}
    from tqdm import tqdm

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            # A disabled tqdm keeps none of these.
            self.n, self.total = kwargs.get("initial") or 0, kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            report(int(self.n), self.total and int(self.total), f"Downloading {file}")
            return None

    return {"tqdm_class": Reporter}


def _is_offline(error: Exception) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return True
    if isinstance(error, errors.HfHubHTTPError):
        return False
    # requests (hub < 1) and httpx (hub >= 1) have their own kinds of connection errors.
    http = type(error).__module__.partition(".")[0].startswith(("requests", "urllib3", "httpx"))
    return http or isinstance(error, ConnectionError | TimeoutError)


def _hub_error(error: Exception, hub: HubId) -> HeadraceError:
    from huggingface_hub import errors

    login = "log in with `hf auth login` (or set HF_TOKEN)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(f"{hub} is gated: accept its terms on its page, then {login}")
    if _is_offline(error):
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            return _hub_error(cause, hub)  # the hub wraps what it said into "not in the cache"
        return DownloadError(
            f"{hub} is not in the cache and the hub cannot be reached: check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(f"no model {hub} on the hub: check the name; if private, {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{hub.repo} has no revision {hub.revision!r}")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{hub} is no valid hub id: {error}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DownloadError("the disk is full: free some space or set HF_HOME to another one")
    if status in (401, 403):
        return DownloadError(f"the hub refused access to {hub} (HTTP {status}): {login}")
    reason = f"HTTP {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
    return DownloadError(f"could not fetch {hub} from the hub ({reason}); try again later")
