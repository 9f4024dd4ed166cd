"""`Encoder`: texts to vectors, by a network and what lies beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from headrace.errors import HeadraceError, ModelFileError, ModelNotFoundError
from headrace.loaders.folder import Folder
from headrace.loaders.onnx_model import open_onnx
from headrace.loaders.sources import ENCODER_FILES
from headrace.networks.encoders.settings import Settings, read_settings
from headrace.networks.network import Network

TOKENIZER, MAX_TOKENIZER_BYTES = "tokenizer.json", 64 << 20
STEP = 16  # lengths are rounded up to a multiple: each new shape takes a new plan
BATCH_TOKENS, MOST_TEXTS = 512, 32  # of a batch
_NAMES = ("last_hidden_state", "token_embeddings")


class Encoder:
    """A text encoder: BERT and its kin, as ONNX or as safetensors.

    Args:
        network: that takes token ids.
        tokenizer: of the package tokenizers.
        settings: how vectors of tokens become one of the text.

    Attributes:
        network, settings: as given.
        width: of vectors; None: known only after the first call.
    """

    def __init__(self, network: Network, tokenizer: Any, settings: Settings) -> None:
        self.network, self.settings = network, settings
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(settings.max_tokens)
        self._takes = {port.name for port in network.inputs}
        unknown = self._takes - {"input_ids", "attention_mask", "token_type_ids"}
        if "input_ids" not in self._takes or unknown:
            names = ", ".join(sorted(self._takes))
            raise HeadraceError(
                f"{network.path}: no text encoder: it takes {names}, and one takes input_ids, "
                "attention_mask and token_type_ids; run it with `headrace run --input`"
            )
        self._output = self._chosen()

    def _chosen(self) -> str:
        names = [port.name for port in self.network.outputs]
        for name in (*_NAMES, "sentence_embedding"):
            if name in names:
                return name
        whole = [
            p.name for p in self.network.outputs if p.kind == "FLOAT" and len(p.shape or ()) == 3
        ]
        if not whole:
            raise HeadraceError(
                f"{self.network.path}: no text encoder: none of its outputs ({', '.join(names)}) "
                "has a vector for each token"
            )
        return whole[0]

    def embed(
        self, texts: str | Sequence[str], *, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """A vector for each text: float32 [texts, width].

        Texts of about the same length run together, whatever their order; a text's vector does not
        depend on the others. What is longer than `settings.max_tokens` is cut.

        Args:
            texts: one or several.
            progress: called with (texts done, all texts).

        Raises:
            ValueError: no texts.
            TypeError: something else than texts.
            HeadraceError: the network refuses its inputs, or is closed.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise ValueError("give at least one text")
        for one in listed:
            if not isinstance(one, str):
                raise TypeError(f"texts are str, and one is {type(one).__name__}")
        encoded = self._tokenizer.encode_batch(listed)
        tokens, kinds = ([getattr(one, part) for one in encoded] for part in ("ids", "type_ids"))
        order = sorted(range(len(listed)), key=lambda i: len(tokens[i]))
        found: np.ndarray | None = None
        done = 0
        while done < len(order):
            batch = _next_batch(order, done, tokens)
            vectors = self._vectors([tokens[i] for i in batch], [kinds[i] for i in batch])
            if found is None:
                found = np.empty((len(listed), vectors.shape[1]), np.float32)
            found[batch] = vectors
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
        assert found is not None
        return found

    def _vectors(self, tokens: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]]) -> Any:
        length = _rounded(max(map(len, tokens)), self.settings.max_tokens)
        arrays = {
            name: np.zeros((len(tokens), length), np.int64)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        for i, (ids, types) in enumerate(zip(tokens, kinds, strict=True)):
            arrays["input_ids"][i, : len(ids)] = ids
            arrays["token_type_ids"][i, : len(ids)] = types
            arrays["attention_mask"][i, : len(ids)] = 1
        given = {name: array for name, array in arrays.items() if name in self._takes}
        states = self.network(given)[self._output]
        pooled = states if states.ndim == 2 else self._pooled(states, arrays["attention_mask"])
        if self.settings.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled.astype(np.float32, copy=False)

    def _pooled(self, states: np.ndarray, mask: np.ndarray) -> np.ndarray:
        there = mask[:, :, None].astype(np.float32)
        counts = np.maximum(there.sum(1), 1e-9)
        # Text by text: the sum of a text does not depend on how long others are.
        sums = np.stack([one[: int(n)].sum(0) for one, n in zip(states, counts[:, 0], strict=True)])
        last = np.maximum(mask.sum(1) - 1, 0)
        modes: dict[str, Callable[[], Any]] = {
            "cls": lambda: states[:, 0],
            "max": lambda: np.where(there > 0, states, -np.inf).max(1),
            "mean": lambda: sums / counts,
            "mean_sqrt_len": lambda: sums / np.sqrt(counts),
            "last": lambda: states[np.arange(len(states)), last],
        }
        return np.concatenate([modes[mode]() for mode in self.settings.pooling], axis=1)

    def close(self) -> None:
        """Give its memory back; it cannot be used again."""
        self.network.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def _rounded(length: int, most: int) -> int:
    return max(length, min(-(-length // STEP) * STEP, most))


def _next_batch(order: Sequence[int], first: int, tokens: Sequence[Sequence[int]]) -> list[int]:
    """Of texts by length, those from a place on: a power of two, of lengths that round alike."""
    length = -(-len(tokens[order[first]]) // STEP)
    most = max(1, min(MOST_TEXTS, BATCH_TOKENS // (length * STEP)))
    near = order[first : first + most]
    alike = sum(-(-len(tokens[i]) // STEP) == length for i in near)  # the first ones: by length
    return list(near[: 1 << (alike.bit_length() - 1)])


def load_encoder(
    path: Path, *, threads: int | None = None, memory: int | None = None, target: str | None = None
) -> Encoder:
    """An encoder from a directory, or from an ONNX file with its tokenizer beside it.

    A directory has tokenizer.json and either model.onnx (also in `onnx`) or config.json with
    safetensors files; pooling and normalisation come from modules.json and what it names.
    `threads`, `memory` and `target` are those of `Network`; the tokenizer is not counted.

    Raises:
        ModelNotFoundError: a file is missing.
        ModelFileError, UnsupportedError: no usable model.
        KernelError: there is no such target, or this CPU cannot run it.
        HeadraceError: a network that is no text encoder.
    """
    if not path.exists():
        raise ModelNotFoundError(
            f"{path}: no such file or directory; name the directory of a text encoder, or its "
            ".onnx file"
        )
    folder = Folder(path if path.is_dir() else _home(path))
    tokenizer = _tokenizer(folder)
    settings = read_settings(folder)
    file = next(
        (folder.path / name for name in ENCODER_FILES if (folder.path / name).exists()), None
    )
    if not path.is_dir():
        file = path
    if file is not None:
        model = open_onnx(file)
    else:
        from headrace.networks.encoders.bert import read_bert

        model = read_bert(folder)
    network = Network(model, threads=threads, memory=memory, target=target)
    return Encoder(network, tokenizer, settings)


def _home(file: Path) -> Path:
    """The directory with the tokenizer of an ONNX file: its own, or that above `onnx`."""
    if not (file.parent / TOKENIZER).exists() and (file.parent.parent / TOKENIZER).exists():
        return file.parent.parent
    return file.parent


def _tokenizer(folder: Folder) -> Any:
    import tokenizers

    if not folder.has(TOKENIZER):
        raise ModelNotFoundError(
            f"{folder.path / TOKENIZER}: no such file; a text encoder needs the tokenizer that it "
            "was trained with: put it beside the model"
        )
    raw = folder.read(TOKENIZER, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise ModelFileError(
            f"no tokenizer: {str(error)[:200]}; download it again", path=folder.path / TOKENIZER
        ) from None
