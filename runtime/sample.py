"""How long a model's passes take on this machine: some of its layers run, with weights of zeros.

What binds a pass depends on the model, its formats, the CPU and how busy the machine is just now.
So a few layers of the model's own shapes run as they would in the model, and the rest is counted as
more of the same. What weights are does not change how long products take.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from headrace.families.decoder import Decoder, Layer, Matrix
from headrace.loaders.gguf import ModelFile
from headrace.placing import Placed
from headrace.plan import Shape
from headrace.prediction import Sample
from headrace.programs import Program, Programs
from headrace.stack import Stack
from headrace.targets.target import Target
from headrace.team import Team
from headrace.weights import Weights

ENOUGH_BYTES = 512 << 20  # of weights; caches hold less
HEAD_ROWS = 8192  # of the head, where it has more
RUNS = 4
PROBED_CONTEXT = 1024


def take_sample(
    file: ModelFile, decoder: Decoder, placed: list[Placed], target: Target,
    addresses: dict[str, int], team: Team, chunk: int, room: int | None,
    stack: Stack | None = None, blocks: int = 0,
) -> Sample | None:  # fmt: skip
    """Measure a prepared model; best of a few runs.

    Args:
        addresses: all kernels that the model needs, by name.
        chunk: tokens of a prompt that are read at once.
        room: bytes that this may take; None if the layer that takes least does not fit.
        stack, blocks: those in memory, of matrices that are a stack.
    """
    sizes = Counter[str]()
    for one in stack.blocks[:blocks] if stack else ():
        sizes[one.matrix.name] += one.shape.n_bytes
    part, few = _part(decoder, placed, sizes, ENOUGH_BYTES if room is None else room)
    if part is None:
        return None
    shape = Shape(min(decoder.context, max(PROBED_CONTEXT, chunk)), chunk, team.n_threads)
    weights = Weights(file, part, few, stack=stack)
    weights.fill_with_nothing(blocks)
    programs = Programs(part, weights, target, addresses, shape)
    programs.set_tokens([0] * chunk)
    scale = len(decoder.layers) / len(part.layers), decoder.head.rows / part.head.rows
    decode_s = _seconds(team, programs, programs.decode, 1, scale)
    programs.expect(chunk)
    chunk_s = _seconds(team, programs, programs.for_tokens(chunk), chunk, scale)
    return Sample(decode_s, chunk, chunk_s)


def _part(
    decoder: Decoder, placed: list[Placed], stacked: Mapping[str, int], room: int
) -> tuple[Decoder | None, list[Placed]]:
    """The first layers of a model, and of its vocabulary, within so many bytes of weights."""
    by_name = {p.matrix.name: p for p in placed}
    rows = min(HEAD_ROWS, decoder.head.rows)

    def fewer(matrix: Matrix) -> Matrix:
        return replace(matrix, rows=min(matrix.rows, rows))

    head, embedding = fewer(decoder.head), fewer(decoder.embedding)
    ends = {head.name: head, embedding.name: embedding}
    found: list[Placed] = [replace(by_name[m.name], matrix=m) for m in ends.values()]
    taken, layers = sum(p.n_bytes for p in found), list[Layer]()
    for layer in decoder.layers:
        a = layer.attention
        matrices = (a.query, a.key, a.value, a.output, *layer.feed_forward.matrices())
        more = [by_name[m.name] for m in matrices if m.name not in stacked]
        taken += sum(p.n_bytes for p in more) + sum(stacked.get(m.name, 0) for m in matrices)
        if taken > min(room, ENOUGH_BYTES) and (layers or taken > room):
            break
        found += more
        layers.append(layer)
    if not layers:
        return None, []
    part = replace(
        decoder, layers=tuple(layers), head=head, embedding=embedding, vocabulary=head.rows
    )
    return part, found


def _seconds(
    team: Team, programs: Programs, program: Program, n_tokens: int, scale: tuple[float, float]
) -> float:
    """Of a pass, with what the layers take and what the head takes scaled up."""
    best = np.inf
    ticks = np.zeros(len(program.kernels) + 1, np.int64)
    head = len(program.kernels) - 1  # its product is the last step
    for _ in range(RUNS):
        programs.say(n_tokens, 0, 1)
        began = time.perf_counter()
        team.run(program.table, ticks=ticks)
        spent = time.perf_counter() - began
        in_layers, in_head = ticks[head] - ticks[0], ticks[-1] - ticks[head]
        second = spent / max(1, int(ticks[-1] - ticks[0]))
        best = min(best, second * float(in_layers * scale[0] + in_head * scale[1]))
    return float(best)
