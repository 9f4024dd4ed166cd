"""From what a user calls a model (file, directory, known name, hub id) to a file on this disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from headrace.errors import HeadraceError, ModelFileError, ModelNotFoundError
from headrace.loaders import pull as _pull
from headrace.loaders.reader import open_regular
from headrace.loaders.split_names import model_groups

# Either makes a directory a model, with its config.json; named by themselves, they mean it too.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")

NETWORKS = (".onnx", ".tflite")  # how names of files of networks end
ENCODER_FILES = ("model.onnx", "onnx/model.onnx")  # of a directory, the first that is there
_BERT = re.compile(rb'"model_type"\s*:\s*"bert"')


def resolve(name: str | Path, *, progress: _pull.Progress | None = None) -> Path:
    """The model file that `name` means; a known name or a hub id is fetched when not cached.

    Args:
        name: a file, a directory with one GGUF model or with safetensors files, a name of
            `headrace.loaders.pull.KNOWN`, or a Hugging Face id: `org/repo`, `org/repo:file.gguf`, `hf://org/repo/file.gguf`.
            A known name wins over a file of that name; write `./name` for the file.
        progress: called with (done bytes, total bytes or None, label) while fetching.

    Raises:
        ModelNotFoundError: nothing was found; the message says what was tried.
        DownloadError: the model is known but could not be fetched.
    """
    if isinstance(name, str):
        if name in _pull.KNOWN:
            return _pull.pull(name, progress=progress)
        if name.startswith("hf://"):
            return _from_hub(name, progress)
    text = os.fspath(name)
    if not text:
        raise ModelNotFoundError(
            "the model's name is empty; give a .gguf file, a directory, a Hugging Face id "
            f"or one of: {_known_names()}"
        )
    path = Path(os.path.expanduser(text))
    try:
        if path.is_dir():
            return _in_directory(path)
        if os.path.lexists(path):
            if path.name in _SAFETENSORS and path.exists():
                return path.parent
            return path if path.exists() else _dangling(path)
    except PermissionError as error:
        raise ModelFileError("no permission to look at this path", path=path) from error
    except OSError as error:  # a name that is too long, links in a circle, a device that fails
        raise ModelNotFoundError(f"{text[:80]!r} leads nowhere: {error.strerror}") from error
    if isinstance(name, str) and not _looks_like_path(text) and _pull.parse_hub_id(text):
        return _from_hub(text, progress)
    raise ModelNotFoundError(_not_found(text, path))


def is_network(name: str | Path) -> bool:
    """Whether a model's name means an ONNX or TFLite file."""
    return os.fspath(name).lower().endswith(NETWORKS)


def is_encoder(name: str | Path) -> bool:
    """Whether a model's name means a directory of a text encoder: see `load_encoder`.

    Such a directory has a tokenizer, and a config.json of BERT's architecture, or the modules.json
    of sentence-transformers, or an ONNX model and no other weights.
    """
    path = Path(os.path.expanduser(os.fspath(name)))
    try:
        there = {p.name for p in path.iterdir()} if path.is_dir() else set()
        if "tokenizer.json" not in there:
            return False
        if "modules.json" in there:
            return True
        if "config.json" in there:
            with open_regular(path / "config.json") as file:  # it may be a pipe, and wait for ever
                if _BERT.search(file.read(1 << 20)):
                    return True
        others = any(n in there for n in _SAFETENSORS) or any(n.endswith(".gguf") for n in there)
        return not others and any((path / one).is_file() for one in ENCODER_FILES)
    except (OSError, HeadraceError):  # whoever loads it says what is wrong
        return False


def _in_directory(path: Path) -> Path:
    there = {p.name for p in path.iterdir()}
    names = [name for name in there if name.lower().endswith(".gguf")]
    groups = model_groups(names)
    weights = next((name for name in _SAFETENSORS if name in there), None)
    if weights is not None and not groups:
        return path
    if len(groups) == 1 and weights is None:
        (first,) = groups
        if first not in names:
            raise ModelNotFoundError(
                f"{path} holds a part of a split model, but not its first: {first}; "
                f"put all parts into one directory"
            )
        return path / first
    if groups:
        choices = [*groups, weights] if weights is not None else [*groups]
        listing = "".join(f"\n  {path / first}" for first in choices)
        raise ModelNotFoundError(f"{path} holds {len(choices)} models; name one of:{listing}")
    raise ModelNotFoundError(
        f"{path} is a directory without a .gguf file and without {' or '.join(_SAFETENSORS)}; "
        "name the model's file"
    )


def _from_hub(text: str, progress: _pull.Progress | None) -> Path:
    hub = _pull.parse_hub_id(text)
    if hub is None:
        raise ModelNotFoundError(f"{text!r} is no hub id; write hf://org/repo/file.gguf")
    # A cached file is used as it is: only `headrace pull` asks the hub for a newer one.
    return _pull.hub_cached(hub) or _pull.pull_hub(hub, progress=progress)


def _looks_like_path(text: str) -> bool:
    if text.startswith((".", "~", "/", "\\")) or "\\" in text or re.match(r"[A-Za-z]:", text):
        return True
    # `models/x` with a directory `models` here is a mistyped path sooner than a hub id.
    return (text.lower().endswith(".gguf") and ":" not in text) or Path(text).parent.is_dir()


def _dangling(path: Path) -> Path:
    raise ModelNotFoundError(f"{path} is a link to {os.path.realpath(path)}, which does not exist")


def _known_names() -> str:
    return ", ".join(sorted(_pull.KNOWN))


def _not_found(text: str, path: Path) -> str:
    from difflib import get_close_matches  # only on the way to an error

    directory = path.parent
    if not directory.is_dir():
        tried = f"no file {path}: the directory {directory} does not exist"
        siblings: list[str] = []
    else:
        tried = f"no file or directory {path}"
        try:
            siblings = [p.name for p in directory.iterdir() if p.suffix == ".gguf" or p.is_dir()]
        except OSError:
            siblings = []
    near = [str(directory / n) for n in get_close_matches(path.name, siblings, n=3, cutoff=0.5)]
    near += get_close_matches(text.lower(), list(_pull.KNOWN), n=2, cutoff=0.5)
    message = f"{tried}; not a name that `headrace pull` knows ({_known_names()})"
    if near:
        return f"{message}. Did you mean {' or '.join(near)}?"
    if _pull.parse_hub_id(text):
        return f"{message}. If it is a Hugging Face id, write hf://{text}"
    return f"{message}. Give a .gguf file, a directory, or a Hugging Face id (org/repo)"
