"""`headrace.load`: a language model, a network or a text encoder, by what the file is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from headrace import model as language_model
from headrace.arguments import size_of, thread_count
from headrace.loaders.sources import is_encoder, is_network, resolve

P = ParamSpec("P")


def _or_network(load_model: Callable[P, language_model.Model]) -> Callable[P, Any]:
    @wraps(load_model)
    def load(*args: P.args, **options: P.kwargs) -> Any:
        name: Any = args[0] if args else options.get("model")
        if isinstance(name, str | Path) and (is_network(name) or is_encoder(name)):
            others: dict[str, Any] = {k: v for k, v in options.items() if k != "model"}
            return _other(name, **others)
        return load_model(*args, **options)

    load.__doc__ = f"""{load_model.__doc__}
    An ONNX or TFLite file (`.onnx`, `.tflite`) gives a `headrace.networks.network.Network` instead,
    which is called with arrays; of all these arguments it takes `threads`, `target`, `memory`
    (beside the process: weights that do not fit are read from the disk for each call), `progress`
    and `patches` ("auto", "off", or so many rows and columns: its first operations run patch by
    patch, in less memory). A directory of a text encoder (tokenizer.json with model.onnx, or
    BERT's config.json and safetensors) gives a `headrace.networks.encoders.encoder.Encoder`, which
    has `embed`.
    """
    return load


def _other(
    name: str | Path, *, threads: int | None = None, progress: Any = None, patches: Any = None,
    memory: Any = None, target: str | None = None, **others: Any,
) -> Any:  # fmt: skip
    what = "a network's file" if is_network(name) else "a text encoder"
    given = [key for key, value in others.items() if value is not None]
    if given:
        raise TypeError(f"{name}: {what} takes no {given[0]!r} (yet); leave it out")
    chosen = None if threads is None else thread_count(threads)
    budget = None if memory is None else size_of(memory)
    if is_network(name):
        from headrace.networks.network import load_network
        from headrace.networks.patch_choice import checked

        return load_network(
            resolve(name, progress=progress), threads=chosen, progress=progress,
            patches=None if patches is None else checked(patches),
            memory=budget, target=target,
        )  # fmt: skip
    if patches is not None:
        raise TypeError(f"{name}: {what} takes no 'patches'; leave it out")
    from headrace.networks.encoders.encoder import load_encoder

    return load_encoder(Path(name).expanduser(), threads=chosen, memory=budget, target=target)


load = _or_network(language_model.load)
