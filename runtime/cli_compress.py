"""The command that writes smaller models, and what it says when it is done."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from headrace.cli_commands import is_network
from headrace.cli_output import print_json, progress_bar, say, show
from headrace.cli_text import text_of
from headrace.errors import HeadraceError
from headrace.sizes import compared_size

if TYPE_CHECKING:
    from pathlib import Path


def compress(
    *, src: str, dst: str, calibrate: str | None, evaluate: str | None, json: bool, **options: Any
) -> int:
    """Write a model as a file of our own, which loads without repacking, in a smaller format.

    Embedding and head stay what they are up to 8.5 bits a weight, else they become q8_0, unless
    --ends names a format. With --calibrate TEXT rounding follows what the model computes (gptq);
    with --evaluate TEXT, a different one, the file says how far it is from its source. --to-moe
    cuts the feed-forwards of a dense model into experts, --neuron-clusters N those of a ReLU model
    into clusters that fire together. When it is interrupted, the same command goes on. Other
    programs can list what is in the file, but not run it: keep the source if you need it elsewhere.
    An ONNX file becomes one of 8-bit integers (--format int8, with inputs to --calibrate with; or
    int8-dynamic, for encoders), or one with zeros (--sparsity 0.7 --pattern 4x1: 4 outputs of an
    input; 1x1, group: 16; --ends sparse: in its last layer, too), or both. Inputs are .npy files
    or a folder of them, others to --evaluate.
    """
    if src.lower().endswith(".tflite"):
        raise HeadraceError(f"{src}: TFLite files are run, not compressed; give an ONNX file")
    if is_network(src):
        from headrace import cli_networks

        return cli_networks.compress(
            src=src, dst=dst, calibrate=calibrate, evaluate=evaluate, json=json, options=options
        )
    if options.pop("pattern", None) is not None:
        raise HeadraceError("--pattern is for ONNX files; formats of this model have their own")

    # Work is shared by rows: threads of BLAS's own would only wait for each other. It looks once.
    if "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from headrace.compress import compress as write
    from headrace.loaders.tiled import open_model
    from headrace.stack_price import shown_price

    options["calibrate"] = None if calibrate is None else text_of(calibrate)
    options["evaluate"] = None if evaluate is None else text_of(evaluate)
    try:
        with progress_bar() as progress:
            done = write(src, dst, progress=progress, notice=say, **options)
    except KeyboardInterrupt:
        from headrace.partial_file import parts_of

        if parts_of(dst):
            say(f"what is complete of {dst} is kept: the same command goes on")
        raise
    price = None if done.price is None else shown_price(open_model(done.path))
    if json:
        print_json(
            {
                "path": str(done.path),
                "source_bytes": done.source_bytes,
                "size_bytes": done.size_bytes,
                "formats": done.formats,
                "remarks": done.remarks,
                "price": price,
            }
        )
        return 0
    if price is not None:
        show(price, False)
    sizes = compared_size(done.size_bytes, done.source_bytes)
    if options["format"] == "bitstack":
        sizes += ", all blocks; a model loads as many of them as memory has room for"
    say(f"{done.path}: {sizes}")
    say(_next(done.path))
    return 0


def _next(path: Path) -> str:
    """What to try with the file: only what it can do."""
    from headrace.chat import has_template
    from headrace.loaders.tiled import open_model
    from headrace.vocabulary import has_tokenizer

    metadata, name = open_model(path).metadata, shlex.quote(str(path))
    if not has_tokenizer(metadata):
        return (
            "the model has no tokenizer, so it reads no text: try "
            f"`headrace bench {name}`, or, in Python, `model.likeliest([1, 2], 8)` of token ids"
        )
    if not has_template(metadata):
        return f'try `headrace run {name} --raw "Once upon a time"` (it has no chat template)'
    return f'try `headrace run {name} "Why is the sky blue?"`'
