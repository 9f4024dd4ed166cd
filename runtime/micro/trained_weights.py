"""What networks learned, as files of a folder: LAYER.weights.npy and LAYER.bias.npy, in float32.

Layers have the short names that commands show. Shapes are those of `headrace.micro.network`:
weights of a convolution are [made, rows, columns, read], of a depthwise layer [rows, columns,
made], and a bias is [made].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.arrays import read_array, write_array
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.micro.learning import BIAS, WEIGHTS, Trained, short_names, with_weights
from headrace.micro.network import MicroNetwork

_SUFFIX = ".npy"
_LONGEST = 100  # of a layer's name in a file's, which systems bound by 255 bytes
_NOTHING = Trained(False, False)


class _Part(NamedTuple):
    """What a file has: of a layer its weights or its bias, which are fields of these names."""

    layer: str
    what: str

    def is_of(self, trained: Mapping[str, Trained]) -> bool:
        """Whether it is trained."""
        return bool(getattr(trained.get(self.layer, _NOTHING), self.what))


def write_weights(
    network: MicroNetwork, trained: Mapping[str, Trained], folder: str | Path
) -> list[Path]:
    """Write weights into a folder, which is made where there is none.

    Args:
        network: with what it learned (`Learner.learned`).
        trained: what is written, by the name of its layer.

    Returns:
        The files.

    Raises:
        HeadraceError: other arrays are in the folder.
        OSError: it cannot be written.
    """
    check_folder(network, trained, folder)
    layers, written = {layer.name: layer for layer in with_weights(network)}, []
    for name, part in _files(network).items():
        if part.is_of(trained):
            array = getattr(layers[part.layer], part.what)
            write_array(Path(folder, name), array.astype(np.float32))
            written.append(Path(folder, name))
    return written


def check_folder(network: MicroNetwork, trained: Mapping[str, Trained], folder: str | Path) -> None:
    """That weights can be read from a folder when they have been written there.

    Raises:
        HeadraceError: it has other arrays, or is no folder.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise HeadraceError(f"{folder} is no folder: name another one for what is learned")
    files = _files(network)
    for path in _arrays_in(folder):
        if path.name not in files:
            raise HeadraceError(
                f"{path} is there, and no weights of this network: name another folder"
            )
        if not files[path.name].is_of(trained):
            raise HeadraceError(
                f"{path} is there, and is not of what is learned now: go on from that folder "
                "(--weights), or name another one"
            )


def read_weights(
    network: MicroNetwork, folder: str | Path
) -> tuple[MicroNetwork, dict[str, Trained]]:
    """A network with weights that `write_weights` wrote.

    Args:
        network: of the same file as when it learned.

    Returns:
        The network, and what of it came from the folder, by the names of layers.

    Raises:
        ModelFileError: the folder has no weights, or some that are not of this network.
        UnsupportedError: the network has codes, and does not learn.
    """
    if network.is_quantised:
        raise UnsupportedError("its weights are codes: only networks of real numbers learn")
    paths = _arrays_in(folder)
    if not paths:
        raise ModelFileError(
            f"no folder with arrays ({_SUFFIX}): `run --train ... -o FOLDER` writes one",
            path=folder,
        )
    files, found = _files(network), dict[str, Trained]()
    layers = {layer.name: layer for layer in with_weights(network)}
    for path in paths:
        if path.name not in files:
            raise ModelFileError(
                f"{network.name} has no layer of this name that learns; there are "
                f"{', '.join(files)}",
                path=path,
            )
        name, what = files[path.name]
        new: dict[str, Any] = {what: _checked(path, getattr(layers[name], what).shape)}
        layers[name] = replace(layers[name], **new)
        found[name] = found.get(name, _NOTHING) | Trained(what == WEIGHTS, what == BIAS)
    new_layers = tuple(layers.get(layer.name, layer) for layer in network.layers)
    return replace(network, layers=new_layers), found


def _arrays_in(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob(f"*{_SUFFIX}"))


def _files(network: MicroNetwork) -> dict[str, _Part]:
    """What files are called, in the order of layers; no two differ in upper case only."""
    layers = with_weights(network)
    short = short_names(layers)
    plain = [_plain(short[layer.name]) for layer in layers]
    times, found = Counter(name.casefold() for name in plain), dict[str, _Part]()
    for i, (layer, name) in enumerate(zip(layers, plain, strict=True)):
        unique = name if times[name.casefold()] == 1 else f"{name}~{i}"
        for what in (WEIGHTS, BIAS):
            found[f"{unique}.{what}{_SUFFIX}"] = _Part(layer.name, what)
    return found


def _plain(name: str) -> str:
    """A name that every system takes for a file's."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "_" for c in name)[
        :_LONGEST
    ]


def _checked(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array of real numbers in this shape."""
    try:
        array = read_array(path, mapped=True)
    except HeadraceError as error:
        raise ModelFileError(str(error)) from None
    if array.shape != shape or array.dtype.kind != "f":
        raise ModelFileError(
            f"it is {array.dtype} {list(array.shape)}, and the layer has float32 {list(shape)}: "
            "another network learned it",
            path=path,
        )
    with np.errstate(over="ignore"):
        found = np.array(array, np.float32, order="C")
    if wrong := int(found.size - np.isfinite(found).sum()):
        raise ModelFileError(f"{wrong} of its numbers are no finite float32", path=path)
    return found
