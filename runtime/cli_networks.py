"""What the commands do with networks of ONNX files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.arrays import read_array, write_array
from headrace.cli_options import is_given
from headrace.cli_output import print_json, say, show
from headrace.errors import HeadraceError
from headrace.sizes import compared_size

if TYPE_CHECKING:
    import numpy as np

    from headrace.networks.graph import TensorType
    from headrace.networks.network import Network

_SHOWN = 8  # elements of an output
_OF_CHIPS = 2 << 20  # bytes of weights that a microcontroller may have
# Options of `compress` that ONNX files take.
_OF_NETWORKS = ("format", "force", "threads", "sparsity", "pattern", "ends")


def run(
    *, model: str, inputs: Sequence[str], output: str | None, json: bool, options: Mapping[str, Any]
) -> int:
    """Run a network once, and print its outputs or write them as .npy files."""
    import numpy as np

    with _open(model, **options) as network:
        given = _files(inputs, network)
        paths: dict[str, Path] = {}
        if output is not None:
            paths = output_paths(Path(output), [port.name for port in network.outputs], inputs)
        if not json:
            for notice in network.notices(given):
                say(notice)
        found = network(given)
        rows = []
        for name, value in found.items():
            array = np.asarray(value) if isinstance(value, np.ndarray) else None
            row: dict[str, Any] = {"output": name}
            if array is None:
                row |= {"type": type(value).__name__, "values": _text(value)}
            else:
                row |= {"type": str(array.dtype), "shape": list(array.shape)}
                row |= {"values": array if json else first_elements(array)}
            rows.append(row)
        if output is not None:
            for path in write_arrays(paths, found):
                say(f"{path} written")
            rows = [{k: v for k, v in row.items() if k != "values"} for row in rows]
        if json:
            print_json({"model": str(network.path), "outputs": rows})
        else:
            for row in rows:
                show(row, False)
    return 0


def inspect(*, model: str, inputs: Sequence[str], target: str | None, json: bool) -> int:
    """Show what is in an ONNX file, and what its operators run on."""
    from headrace.networks.measure import describe

    with _open(model, target=target) as network:
        found = describe(network, _types(inputs, network))
        show(found, json)
        _say_what_is_assumed(inputs, found)
    if found["weights_bytes"] < _OF_CHIPS and target is None:
        say("what it takes on microcontrollers: `inspect` with --target cortex-m55")
    return 0


def plan(*, model: str, inputs: Sequence[str], json: bool, options: Mapping[str, Any]) -> int:
    """Say what a network takes."""
    from headrace.networks.measure import requirements

    with _open(model, **options) as network:
        found = requirements(network, _types(inputs, network))
        show(found, json)
        _say_what_is_assumed(inputs, found)
        _say_what_patches_gain(options["patches"], found)
    return 0


def bench(
    *, model: str, inputs: Sequence[str], runs: int, json: bool, options: Mapping[str, Any]
) -> int:
    """Measure a network; inputs that are not given are random."""
    from headrace.networks.measure import bench as measure

    with _open(model, **options) as network:
        found = measure(network, _inputs(inputs, network), runs=runs)
        show(found, json)
        _say_what_patches_gain(options["patches"], found)
    return 0


def _say_what_is_assumed(inputs: Sequence[str], found: Mapping[str, Any]) -> None:
    if found["assumed"] and not inputs:
        taken = ", ".join(found["assumed"])
        say(f"open dimensions were taken as {taken}; --input DIMENSION=SIZE says what they are")


def _say_what_patches_gain(asked: str | None, found: Mapping[str, Any]) -> None:
    """What rows do not say: that nothing is cut, or that cutting takes as much memory."""
    if asked not in (None, "off") and not found["patches"]:
        say("--patches auto: no cut makes the arena smaller for little more work; all runs whole")
    for row in found["patches"]:
        if found["arena_bytes"] >= row["layer_by_layer_bytes"]:
            say(f"--patches {asked}: the arena is not smaller than without; leave it out")


def compress(
    *, src: str, dst: str, calibrate: str | None, evaluate: str | None, json: bool,
    options: Mapping[str, Any],
) -> int:  # fmt: skip
    """Write a network with zeros, or of integers of 8 or 4 bits, as an ONNX file."""
    from headrace.loaders.sources import resolve
    from headrace.networks.compression.compress import compress_network

    given = {k: v for k, v in options.items() if k not in _OF_NETWORKS}
    for name, value in given.items():
        if is_given(value) and value != "error":
            raise HeadraceError(f"an ONNX file takes no --{name.replace('_', '-')}; leave it out")
    if options["ends"] not in (None, "sparse"):
        raise HeadraceError("of an ONNX file, --ends is `sparse` or left out")
    done = compress_network(
        resolve(src), Path(dst), format=options["format"], force=options["force"], notice=say,
        calibrate=None if calibrate is None else Path(calibrate), sparsity=options["sparsity"],
        pattern=options["pattern"], ends=options["ends"] is not None,
        evaluate=None if evaluate is None else Path(evaluate),
    )  # fmt: skip
    if json:
        print_json(
            {
                "path": str(done.path),
                "source_bytes": done.source_bytes,
                "size_bytes": done.size_bytes,
                "integer_nodes": done.integer_nodes,
                "samples": done.samples,
                "sparse_layers": done.sparse_layers,
                "sparsity": done.sparsity,
                "four_bit_products": done.four_bits,
                "price": done.price,
            }
        )
        return 0
    for name, facts in (done.price or {}).get("outputs", {}).items():
        show({"output": name, **facts}, False)
    parts = []
    if done.sparse_layers:
        parts.append(f"{done.sparsity:.1%} of the weights of {done.sparse_layers} layers are zero")
    if done.integer_nodes:
        parts.append(f"{sum(done.integer_nodes.values())} nodes of integers")
    if done.four_bits:
        parts.append(f"weights of {done.four_bits} products have 4 bits")
    say(f"{done.path}: {compared_size(done.size_bytes, done.source_bytes)}, {', '.join(parts)}")
    return 0


def embed(
    *, model: str, texts: Sequence[str], output: str | None, threads: int | None,
    memory: int | None, target: str | None, json: bool,
) -> int:  # fmt: skip
    """Turn texts into vectors: those given, or each line of stdin.

    Shows how alike they are (cosines of their vectors); -o writes the vectors as a .npy file.
    """
    import numpy as np

    from headrace.arguments import thread_count
    from headrace.cli_output import progress_bar, table
    from headrace.cli_text import stdin
    from headrace.networks.encoders.encoder import load_encoder

    if output is not None:
        _check_array(Path(output))
    given = list(texts) or [line for line in stdin().read().splitlines() if line.strip()]
    if not given:
        raise HeadraceError('no texts; write `headrace embed MODEL "a text" "another"`')
    chosen = None if threads is None else thread_count(threads)
    with (
        load_encoder(
            Path(model).expanduser(), threads=chosen, memory=memory, target=target
        ) as encoder,
        progress_bar() as progress,
    ):
        vectors = encoder.embed(given, progress=lambda n, of: progress(n, of, "texts"))
        settings = encoder.settings
    if not settings.said:
        say("no modules.json beside the model: mean of all tokens is taken, not normalised")
    if output is not None:
        write_array(Path(output), vectors)
        say(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")
    if json:
        rows = [{"text": t, "vector": v} for t, v in zip(given, vectors, strict=True)]
        print_json({"model": model, "texts": rows} if output is None else {"model": model})
    elif output is None and len(given) <= _SHOWN:
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
        alike = (vectors @ vectors.T) / np.outer(lengths, lengths)
        shown = [[f"{value:.3f}" for value in row] for row in alike]
        table(
            [
                {"": str(i + 1), "text": text[:60]}
                | {str(k + 1): shown[i][k] for k in range(len(given))}
                for i, text in enumerate(given)
            ]
        )
        say(f"vectors have {vectors.shape[1]} numbers; -o FILE.npy writes them, --json prints them")
    elif output is None:
        for vector in vectors:
            print(" ".join(f"{value:.6g}" for value in vector))
    return 0


def _check_array(target: Path) -> None:
    """Before the work: only an array is replaced by an array.

    Raises:
        HeadraceError: something else would be lost.
    """
    from numpy.lib.format import MAGIC_PREFIX

    from headrace.atomic_file import check_replaceable

    check_replaceable(target)
    if target.exists():
        with target.open("rb") as file:
            if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                raise HeadraceError(f"{target} exists and is no .npy file; name another file")


def _open(
    model: str, *, threads: int | None = None, patches: str | None = None,
    memory: int | None = None, target: str | None = None,
) -> Network:  # fmt: skip
    from headrace.arguments import thread_count
    from headrace.loaders.sources import resolve
    from headrace.networks.network import load_network
    from headrace.networks.patch_choice import checked

    chosen = None if threads is None else thread_count(threads)
    cut = None if patches is None else checked(patches)
    return load_network(resolve(model), threads=chosen, patches=cut, memory=memory, target=target)


def named_inputs(texts: Sequence[str]) -> dict[str, str]:
    """What `--input NAME=VALUE` says."""
    found = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name or not value:
            raise HeadraceError(f"--input {text!r}: write NAME=FILE.npy, or NAME=SIZE")
        if name in found:
            raise HeadraceError(f"--input {name} is given twice; leave one out")
        found[name] = value
    return found


def _files(texts: Sequence[str], network: Network) -> dict[str, np.ndarray]:
    """Inputs out of files."""
    ports = {port.name for port in network.inputs}
    unknown = [name for name in named_inputs(texts) if name not in ports]
    if unknown:
        kinds = ", ".join(f"{port.name}: {port.text}" for port in network.inputs)
        raise HeadraceError(f"the network has no input {unknown[0]!r}; it takes {kinds}")
    found = {name: read_array(Path(value)) for name, value in named_inputs(texts).items()}
    missing = [port for port in network.inputs if port.name not in found]
    if missing:
        wanted = " ".join(f"--input {port.name}=FILE.npy" for port in missing)
        kinds = ", ".join(f"{port.name}: {port.text}" for port in missing)
        raise HeadraceError(f"the network also takes {kinds}; give {wanted}")
    _check(found, network)
    return found


def _check(given: Mapping[str, np.ndarray], network: Network) -> None:
    """That arrays of files are those of the network."""
    from headrace.networks.ports import check_inputs

    ports = {port.name: port for port in network.inputs}
    try:
        check_inputs(given, ports, [ports[name] for name in given])
    except (TypeError, ValueError) as error:
        raise HeadraceError(str(error)) from None


def _types(texts: Sequence[str], network: Network) -> dict[str, TensorType]:
    """Types of inputs: of files, and as they are where open dimensions have the given sizes."""
    from headrace.networks.ports import type_of

    files, others = _given(texts, network)
    return others | {name: of for name, a in files.items() if (of := type_of(a)) is not None}


def _inputs(texts: Sequence[str], network: Network) -> dict[str, np.ndarray]:
    """Inputs out of files, and random ones of the others' types."""
    import numpy as np

    from headrace.networks.measure import random_input

    files, others = _given(texts, network)
    random = np.random.default_rng(0)
    return files | {name: random_input(of, random) for name, of in others.items()}


def _given(
    texts: Sequence[str], network: Network
) -> tuple[dict[str, np.ndarray], dict[str, TensorType]]:
    """Inputs out of files, and the types of the others; what is no input is a dimension's size."""
    from headrace.networks.measure import assumed_types

    ports = {port.name for port in network.inputs}
    named = named_inputs(texts)
    files = {name: read_array(Path(v)) for name, v in named.items() if name in ports}
    _check(files, network)
    sizes = {name: _size(name, v) for name, v in named.items() if name not in ports}
    if len(files) == len(ports):
        if sizes:
            raise HeadraceError(
                f"--input {next(iter(sizes))}: all inputs are files, and as large as these are"
            )
        return files, {}
    types = assumed_types(network, sizes)
    return files, {name: of for name, of in types.items() if name not in files}


def _size(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise HeadraceError(
            f"--input {name}={text}: there is no such input, and {text!r} is no size of a dimension"
        )
    return int(text)


def output_paths(folder: Path, names: Sequence[str], inputs: Sequence[str]) -> dict[str, Path]:
    """The .npy files of a folder that outputs are written to, by their names.

    Args:
        names: of outputs.
        inputs: what `--input` says.

    Raises:
        HeadraceError: one of them is an input, or there is a file where the folder should be.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise HeadraceError(f"{there} is a file, and outputs go to a folder; name another -o")
    plain = {name for name in names if name.strip(".") and all(_is_plain(c) for c in name)}
    found = {}
    for i, name in enumerate(names):
        stem = name if name in plain else f"output{i}"
        while stem != name and stem in plain:
            stem += "_"
        found[name] = folder / f"{stem}.npy"
    for given in map(Path, named_inputs(inputs).values()):
        for path in found.values():
            if path.exists() and given.exists() and path.samefile(given):
                raise HeadraceError(f"{path} is an input, and would be replaced; name another -o")
    return found


def _is_plain(letter: str) -> bool:
    return letter.isalnum() or letter in "_-."


def write_arrays(paths: Mapping[str, Path], outputs: Mapping[str, Any]) -> list[Path]:
    """Write outputs as .npy files; gives their paths."""
    import numpy as np

    for name, value in outputs.items():
        write_array(paths[name], np.asarray(value))
    return [paths[name] for name in outputs]


def first_elements(array: np.ndarray) -> str:
    """Some of an output's elements, for people."""
    flat = array.reshape(-1)
    return _text(flat[:_SHOWN].tolist()) + (f" ... ({flat.size})" if flat.size > _SHOWN else "")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_text(one) for one in value)
    return str(value)
