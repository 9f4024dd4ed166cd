"""What the commands do with networks that learn on microcontrollers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli_options import Opt, is_given
from headrace.cli_output import print_json, progress_bar, say, show
from headrace.errors import HeadraceError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from headrace.micro.learning import Learning, Trained
    from headrace.micro.network import MicroNetwork
    from headrace.micro.training_plan import TrainingPlan

TRAIN = Opt(
    "train", str, None, "a chip trains so many last layers, or those named: conv3,fc:bias",
    ("--train",),
)  # fmt: skip
HOW = (
    Opt("rate", float, None, "of learning (0.01)", ("--rate",)),
    Opt("momentum", float, None, "of learning (0.9)", ("--momentum",)),
    Opt("loss", str, None, "cross-entropy or squares; default: by the last layer", ("--loss",)),
    Opt("loss_scale", float, None, "that gradients begin with (128)", ("--loss-scale",)),
    Opt("good_steps", int, None, "after which that is doubled; default: never", ("--good-steps",)),
    Opt("at_once", bool, False, "use gradients as soon as they are there", ("--at-once",)),
)
WEIGHTS = Opt(
    "weights", str, None, "of a microcontroller's network: the folder that --train -o wrote",
    ("--weights",),
)  # fmt: skip
LESSONS = (
    Opt("label", str, None, "what is to be learned: classes or outputs, a .npy file", ("--label",)),
    Opt("epochs", int, None, "how often all examples are learned (1)", ("--epochs",)),
)


def taken(options: MutableMapping[str, Any]) -> dict[str, Any]:
    """Options about learning that are given, taken out of others.

    Raises:
        HeadraceError: some are, but not --train.
    """
    names = [one.name for one in (TRAIN, *HOW, *LESSONS)]
    found = {name: options.pop(name, None) for name in names}
    given = {name: value for name, value in found.items() if is_given(value)}
    if given and "train" not in given:
        option = next(iter(given)).replace("_", "-")
        raise HeadraceError(f"--{option} is for learning: add --train")
    return given


def planned(
    model: str, network: MicroNetwork, target: str, given: Mapping[str, Any], sram: int | None
) -> tuple[Learning, TrainingPlan]:
    """How a network learns on a chip, and its training step there."""
    from headrace.micro.learning import (
        SCALE,
        Learning,
        layers_named,
        usual_loss,
        what_is_trained,
    )
    from headrace.micro.tuned import tuned_plan
    from headrace.targets.target import microcontrollers

    trained = layers_named(network, given["train"])
    how = Learning(
        trained, given.get("rate", 0.01), given.get("momentum", 0.9),
        given["loss"].replace("-", " ") if "loss" in given else usual_loss(network),
        given.get("loss_scale", SCALE), given.get("good_steps"), "at_once" in given,
    )  # fmt: skip
    try:
        with progress_bar() as progress:
            tuned = tuned_plan(network, microcontrollers()[target], how, sram, progress=progress)
    except UnsupportedError as error:
        raise UnsupportedError(str(error), path=model) from None
    if tuned.not_counted is not None:
        say(f"its tiles were not chosen by counted instructions: {tuned.not_counted}")
    say(f"it learns {', '.join(what_is_trained(network, trained))} by {how.loss}")
    return how, tuned.plan


def run(
    *, model: str, network: MicroNetwork, target: str, given: Mapping[str, Any], sram: int | None,
    known: Mapping[str, Trained], inputs: Sequence[str], output: str | None, json: bool,
) -> int:  # fmt: skip
    """Train a network on an emulated chip: the loss by epoch, instructions, memory, weights.

    Args:
        known: what an earlier training learned, which is written again.
    """
    import numpy as np

    from headrace.arguments import whole
    from headrace.micro.learner import Learner
    from headrace.micro.learning import layers_named, together
    from headrace.micro.report import sram_facts

    epochs = whole("epochs", given.get("epochs", 1), low=1)
    if "label" not in given:
        raise HeadraceError("to learn, add --label FILE.npy: a class or an output of each example")
    kept = together(known, layers_named(network, given["train"]))
    if output is not None:
        _check_output(model, network, kept, Path(output))
    examples = _examples(network, inputs)
    wanted, classes = _wanted(network, Path(given["label"]), len(examples))
    how, plan = planned(model, network, target, given, sram)
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    with Learner(network, how, plan) as learner:
        for epoch in range(1, epochs + 1):
            order = rng.permutation(len(examples))
            with progress_bar() as progress:
                lesson = learner.train(
                    examples[order], wanted[order],
                    progress=lambda done, of: progress(done, of, f"epoch {epoch}"),  # noqa: B023
                )  # fmt: skip
            row: dict[str, Any] = {"epoch": epoch, "loss": lesson.loss}
            if classes is not None:
                made = lesson.outputs.argmax(-1).reshape(len(order), -1)
                row["right"] = f"{np.mean(made == classes[order]):.1%}"
            rows.append(row | {"skipped_steps": lesson.skipped, "loss_scale": lesson.scale})
            if not json:
                right = f", {row['right']} right" if "right" in row else ""
                print(f"epoch {epoch}: loss {lesson.loss:.4g}{right}", flush=True)
        if skipped := sum(row["skipped_steps"] for row in rows):
            say(
                f"{skipped} steps changed no weights, as a gradient was not finite; the loss scale "
                f"is {rows[-1]['loss_scale']:g} by now"
            )
        found = learner.learned()
        _check_finite(found, kept, rows[-1]["epoch"])
        counts = learner.counts(examples[0], wanted[0])
        used = learner.used(examples[0], wanted[0])
    facts = {
        "target": target,
        "training_step_instructions": counts.instructions,
        "training_step_cycles": counts.cycles,
        **sram_facts(plan.program),
        "arena_used_bytes": used.arena_bytes,
        "stack_used_bytes": used.stack_bytes,
        "learned_bytes": plan.state_bytes,
    }
    if output is not None:
        for path in _write(model, found, kept, Path(output)):
            say(f"{path} written")
    if json:
        print_json({"model": model, "epochs": rows, **facts})
    else:
        print()
        show(facts, False)
    return 0


def _check_finite(network: MicroNetwork, trained: Mapping[str, Trained], epochs: int) -> None:
    """That what was learned are numbers: outputs of what is none may look like some."""
    import numpy as np

    for layer in network.layers:
        for what in ("weights", "bias"):
            if layer.name in trained and getattr(trained[layer.name], what):
                array = getattr(layer, what)
                if wrong := int(array.size - np.isfinite(array).sum()):
                    raise HeadraceError(
                        f"{wrong} of {array.size} numbers of {layer.name}'s {what} are not finite "
                        f"after {epochs} epochs, and nothing is written: lower --rate"
                    )


def _examples(network: MicroNetwork, inputs: Sequence[str]) -> np.ndarray:
    """A batch of examples [examples, *shape] as the chip has them."""
    import numpy as np

    from headrace.arrays import read_array
    from headrace.micro.ports import to_chip

    if len(network.inputs) != 1:
        names = ", ".join(port.name for port in network.inputs)
        raise HeadraceError(f"{network.name} has inputs {names}: networks of one input are trained")
    (port,) = network.inputs
    if len(inputs) != 1:
        raise HeadraceError(f"to learn, give one --input {port.name}=FILE.npy of all examples")
    name, _, file = inputs[0].rpartition("=")
    if name not in ("", port.name):
        raise HeadraceError(f"there is no input {name!r}; the network takes {port.name}")
    array = read_array(Path(file))
    shape = port.shape[1:]
    if array.ndim > len(shape) + 1 and array.shape[1] == 1:
        array = array[:, 0]  # each in a batch of one
    if array.shape[1:] != shape or not len(array):
        raise HeadraceError(
            f"{file} is {list(array.shape)}, and examples of {list(shape)} are wanted: "
            f"{['examples', *shape]}"
        )
    return np.stack([to_chip(network, {port.name: one[None]})[port.value.name] for one in array])


def _wanted(network: MicroNetwork, path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Outputs that are wanted [examples, *shape], and classes [examples, pixels] if given as such.

    A row is one pixel; of an image each pixel has a class.
    """
    import numpy as np

    from headrace.arrays import read_array
    from headrace.micro.ports import lying

    array, port = read_array(path), network.outputs[0]
    rows, columns, channels = port.value.image
    whose = "pixel" if rows * columns > 1 else "example"
    if len(array.shape) == 0 or len(array) != count:
        raise HeadraceError(f"{path} is {list(array.shape)}, and there are {count} examples")
    if array.dtype.kind in "iu" and channels > 1 and array.size == count * rows * columns:
        classes = array.reshape(count, -1).astype(np.int64)
        if classes.min() < 0 or classes.max() >= channels:
            raise HeadraceError(
                f"{path} has classes from {classes.min()} to {classes.max()}, and the network has "
                f"{channels} outputs for each {whose}"
            )
        return np.eye(channels)[classes].reshape(count, *port.value.shape), classes
    if array[0].size != port.value.elements or array.dtype.kind not in "fiub":
        raise HeadraceError(
            f"{path} is {array.dtype} {list(array.shape)}: a class of each {whose} is wanted, or "
            f"{port.value.elements} numbers"
        )
    return np.stack([lying(port, one) for one in array.astype(np.float64)]), None


def _check_output(
    model: str, network: MicroNetwork, trained: Mapping[str, Trained], output: Path
) -> None:
    """Before the work: what is learned can be written there."""
    from headrace.loaders.sources import resolve
    from headrace.micro.trained_onnx import SUFFIX, check_onnx
    from headrace.micro.trained_weights import check_folder

    if output.suffix.lower() == SUFFIX:
        check_onnx(resolve(model), trained, output)
    else:
        check_folder(network, trained, output)


def _write(
    model: str, network: MicroNetwork, trained: Mapping[str, Trained], output: Path
) -> list[Path]:
    """A whole ONNX file, where that is what is to be written, or a folder with weights."""
    from headrace.loaders.sources import resolve
    from headrace.micro.trained_onnx import SUFFIX, write_onnx
    from headrace.micro.trained_weights import write_weights

    if output.suffix.lower() != SUFFIX:
        return write_weights(network, trained, output)
    write_onnx(resolve(model), network, trained, output)
    return [output]
