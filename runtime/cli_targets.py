"""The commands about targets: what there is, kernel packs, executables, proofs."""

from __future__ import annotations

from typing import Any

from headrace import cli_learning
from headrace.cli_commands import is_for_chip, model_path
from headrace.cli_output import print_json, progress_bar, say, show, table
from headrace.errors import HeadraceError
from headrace.sizes import format_size


def targets_list(*, json: bool) -> int:
    """List CPUs and microcontrollers, and where their kernels can be proven on this machine.

    --json adds LLVM's options and the emulators' command lines.
    """
    from headrace.target_list import describe_targets, for_people

    rows = describe_targets()
    if json:
        print_json(rows)
    else:
        table(for_people(rows))
    return 0


def targets_build(*, target: str, output: str, cpu: str | None) -> int:
    """Build a kernel pack: shared libraries for devices that have no compiler.

    TARGET is a target's name (see `targets list`) or an architecture, such as aarch64-linux: then
    the pack has all of its CPU levels, or with --cpu those that this CPU runs. aarch64 and x86_64
    also with -macos and -windows.
    """
    from headrace.kernels.table import kernel_table
    from headrace.targets.naming import choose
    from headrace.targets.pack import Pack, build
    from headrace.targets.target import all_targets
    from headrace.team import default_threads

    chosen = choose(all_targets().values(), target, cpu)
    rows = list(kernel_table().values())
    try:
        with progress_bar() as progress:
            folder = build(chosen, rows, output, n_workers=default_threads(), progress=progress)
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    names = ", ".join(one.name for one in chosen)
    say(f"{folder}: {format_size(Pack(folder).n_bytes)}, {len(rows)} kernels for {names}")
    return 0


def targets_export(
    *, model: str, target: str, output: str, cpu: str | None, context: int | None,
    sram: int | None, weights: str | None, **options: Any,
) -> int:  # fmt: skip
    """Make a static executable of a model for Linux: no Python, no libc, no other file.

    It continues token ids: `./smol --ids 504,3575,282,4649,314 -n 16`; with --print-ids it prints
    ids instead of text. TARGET is a target's name (see `targets list`) or an architecture, such as
    aarch64-linux: then the executable is for any CPU of it, or with --cpu of the best level that
    this CPU runs.

    For a microcontroller, OUTPUT is a folder: an object to link, a C header, and an image for the
    emulated board, of a network in an ONNX or TFLite file.
    """
    learning = cli_learning.taken(options)
    if is_for_chip(model, target, sram=sram, weights=weights, **learning):
        from headrace import cli_micro

        cli_micro.refuse({"cpu": cpu, "context": context})
        return cli_micro.export(
            model=model, target=target, weights=weights, sram=sram, learning=learning,
            output=output,
        )  # fmt: skip
    from headrace.targets.need import compiler_needed

    with compiler_needed():
        from headrace.standalone.export import export
    from headrace.targets.naming import choose_one
    from headrace.targets.target import all_targets
    from headrace.team import default_threads

    chosen = choose_one(all_targets().values(), target, cpu)
    path = model_path(model)
    try:
        with progress_bar() as progress:
            made = export(
                path, chosen, output, context=context, n_workers=default_threads(),
                progress=progress,
            )  # fmt: skip
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    say(
        f"{made.path}: {format_size(made.file_bytes)} for {chosen.name} ({chosen.cpu}), "
        f"{format_size(made.buffer_bytes)} of buffers for {made.context} tokens"
    )
    return 0


def targets_test(*, target: str | None, kernel: str | None, report: bool, json: bool) -> int:
    """Prove kernels on this CPU and on emulated ones: every case against its numpy reference.

    TARGET is as in `targets build`, or a microcontroller; without it all are proven, which takes
    long. With --report also what matrix products of CPUs cost: instructions per multiply-add, bytes
    loaded per byte of weights (as far as an emulator shows them), and the size of a pack.
    """
    from headrace.target_test import kernels_for, machines_of, outcomes
    from headrace.target_test import report as costs
    from headrace.targets.cache import KernelStore
    from headrace.targets.naming import choose
    from headrace.targets.target import all_targets, microcontrollers
    from headrace.team import default_threads

    every, chips = [*all_targets().values()], microcontrollers()
    chosen = (
        [*every, *chips.values()]
        if target is None
        else [chips[target]]
        if target in chips
        else choose(every, target, None)
    )
    if report and target in chips:
        raise HeadraceError(f"--report is for CPUs: `bench MODEL --target {target}` counts layers")
    names = dict.fromkeys(name for one in chosen for name in kernels_for(one))
    if kernel is not None and kernel not in names:
        raise HeadraceError(f"unknown kernel {kernel!r}; kernels: {', '.join(names)}")
    found, tables = [], []
    for one in chosen:
        rows = {name: row for name, row in kernels_for(one).items() if kernel in (None, name)}
        available = [machine for machine, missing in machines_of(one) if missing is None]
        if available and rows:
            with progress_bar() as progress:
                KernelStore(one, default_threads()).objects(rows.values(), progress)
        for outcome in outcomes([one], rows.values()):
            found.append(vars(outcome))
            if not json:
                print(*vars(outcome).values(), sep="  ", flush=True)
        if report and available and one.name not in chips:
            tables.append(costs(one, kernels_for(one).values(), available[0]))
            if not json:
                print()
                show(tables[-1], False)
                print()
    if json:
        print_json({"kernels": found, "reports": tables})
    failed = [f"{one['kernel']} of {one['target']}" for one in found if one["result"] == "failed"]
    if failed:
        raise HeadraceError(f"{len(failed)} failed: {', '.join(failed[:5])}")
    return 0
