"""The file of constants in an executable: weights as kernels read them, tables, vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from headrace.families.decoder import rope_table
from headrace.loaders.gguf import TensorReader
from headrace.placing import Placed, PlacedGroups, padded16
from headrace.plan import codebooks, ropes_of, table_sizes
from headrace.planning import Prepared
from headrace.rows import read_tiled, read_vector
from headrace.standalone.driver import BEGINS_WITH_SPACE, DROPS_SPACE_AFTER
from headrace.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]


def vocabulary_pieces(tokenizer: Tokenizer, n_tokens: int) -> dict[str, np.ndarray]:
    """Each token's text: "pieces" uint32 [n + 1] offsets, "text" bytes, "flags" uint8 [n]."""
    texts, flags = [], np.zeros(n_tokens, np.uint8)
    known = range(min(n_tokens, tokenizer.n_vocab))  # the embedding may have more rows
    # What a token adds depends on the one before it in one way only.
    plain = next((token for token in known if not tokenizer.drops_space(token)), None)
    for token in known:
        texts.append(tokenizer.piece_bytes(token, after=plain))
        if tokenizer.piece_bytes(token, after=None) != texts[-1]:
            flags[token] |= BEGINS_WITH_SPACE
        if tokenizer.drops_space(token):
            flags[token] |= DROPS_SPACE_AFTER
    pieces = np.zeros(n_tokens + 1, np.uint32)
    pieces[1 : len(texts) + 1] = np.cumsum([len(text) for text in texts])
    pieces[len(texts) + 1 :] = pieces[len(texts)]
    text = np.frombuffer(b"".join(texts) or b"\0", np.uint8)
    return {"pieces": pieces, "text": text, "flags": flags}


def constant_sizes(prepared: Prepared, vocabulary: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes of each piece, in the order of the file."""
    decoder = prepared.decoder
    vectors = {v.key: padded16(v.size) * 4 for v in decoder.vectors()}
    sizes = table_sizes(decoder, prepared.shape, prepared.placed)
    return {
        **{name: array.nbytes for name, array in vocabulary.items()},
        **{f"vector {name}": size for name, size in vectors.items()},
        **{f"table {name}": k for name, k in sizes.items()},
        **{name: size for p in prepared.placed for name, size in _pieces(p).items()},
    }


def _pieces(placed: Placed) -> dict[str, int]:
    """Bytes of the pieces of a matrix, which lie behind each other as in a file of ours."""
    name = placed.matrix.name
    if isinstance(placed, PlacedGroups):
        head = placed.units_offset
        return {f"head {name}": head, f"matrix {name}": placed.packed_bytes - head}
    return {f"matrix {name}": placed.packed_bytes}


def write_constants(
    path: Path, prepared: Prepared, vocabulary: Mapping[str, np.ndarray],
    offsets: Mapping[str, int], n_bytes: int, progress: Progress | None,
) -> None:  # fmt: skip
    """Write the file of constants, `n_bytes` long, one piece of a matrix in memory at a time.

    Raises:
        ModelFileError: the model cannot be read to the end.
        OSError: the file cannot be written.
    """
    decoder = prepared.decoder
    total, done = sum(p.packed_bytes for p in prepared.placed), 0
    with TensorReader() as reader, path.open("wb") as file:

        def put(name: str, array: np.ndarray) -> None:
            file.seek(offsets[name])
            file.write(array.data)

        for name, array in vocabulary.items():
            put(name, array)
        vectors = {v.key: read_vector(prepared.file, reader, v) for v in decoder.vectors()}
        for name, vector in vectors.items():
            put(f"vector {name}", vector)
        for rope, name in ropes_of(decoder).items():
            factors = None if rope.factors is None else vectors[rope.factors][: rope.width // 2]
            put(f"table {name}", rope_table(rope, factors, prepared.shape.context))
        for name, codebook in codebooks(prepared.placed).items():
            put(f"table {name}", codebook())
        for placed in prepared.placed:
            file.seek(offsets[next(iter(_pieces(placed)))])
            for piece in read_tiled(reader, placed):
                file.write(piece.data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total, "writing weights")
        file.truncate(n_bytes)
