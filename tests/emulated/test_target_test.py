"""`headrace targets test`: what it finds, what it skips, and that it can fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from foreign import FOREIGN, USUAL

from headrace.cli import main
from headrace.kernels.table import kernel_table
from headrace.target_test import machines_of, outcomes, report
from headrace.targets.emulation import unicorn_user
from headrace.targets.emulation.machines import NATIVE, short_names, why_not
from headrace.targets.host import pick_target
from headrace.targets.table import Case, no_cases
from headrace.targets.target import Target, all_targets, microcontrollers

HOST = pick_target(None)
TABLE = kernel_table()
AARCH64 = FOREIGN.get(USUAL["aarch64"])
needs_this_cpu = pytest.mark.skipif(why_not(NATIVE) is not None, reason=str(why_not(NATIVE)))


@needs_this_cpu
def test_kernels_are_proven_here(capsys: pytest.CaptureFixture[str]) -> None:
    for name, how in (("rows_q4_0", "bit for bit"), ("gemv_q4_0", "within its bound")):
        assert main(["targets", "test", "--target", HOST.name, "--kernel", name]) == 0
        assert capsys.readouterr().out == f"{HOST.name}  this CPU  {name}  equal  {how}\n"


@needs_this_cpu
def test_a_wrong_result_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TABLE["rows_q4_0"]

    def wrong(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        for case in right.cases(target, rng):
            case.expected[0][1].flat[-1] += 1
            yield case

    table = {right.name: replace(right, cases=wrong)}
    monkeypatch.setattr("headrace.kernels.table.kernel_table", lambda: table)
    assert main(["targets", "test", "--target", HOST.name, "--json"]) == 2
    said = capsys.readouterr()
    (row,) = json.loads(said.out)["kernels"]
    assert row["result"] == "failed" and "not equal bit for bit" in row["how"]
    assert said.err == f"headrace: 1 failed: rows_q4_0 of {HOST.name}\n"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if AARCH64 is None:
        pytest.skip("no foreign AArch64 here")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(unicorn_user, "MODELS", {})
    found = list(outcomes([AARCH64], [TABLE["gemv_q4_0"]]))
    assert {one.machine for one in found} == set(AARCH64.machines)
    for one in found:
        assert (one.kernel, one.result) == ("*", "skipped")
        assert "qemu-aarch64 is not installed" in one.how


@needs_this_cpu
def test_a_kernel_without_cases_is_skipped() -> None:
    (found,) = outcomes([HOST], [TABLE["team_lead"]])
    assert found.result == "skipped"


def test_the_list_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["target", "triple", "cpu", "kernels", "provable", "on", "needs"]
    names = {line.split()[0] for line in lines}
    assert names == all_targets().keys() | microcontrollers().keys()
    assert max(map(len, lines)) < 300  # a feature of each, and why it is not here
    (best,) = [line for line in lines if "this CPU, its best" in line]
    assert best.split()[0] == HOST.name
    assert main(["targets", "list", "--json"]) == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[HOST.name]["provable_on"] == ["this CPU"]
    for name, target in FOREIGN.items():
        missing = {why_not(machine) for machine in target.machines}
        assert rows[name]["provable_on"] == [one for one in target.machines if not why_not(one)]
        assert (rows[name]["why_not"] is None) == (None in missing)


def test_machines_have_short_names() -> None:
    vectors = all_targets()["riscv64-v128-zvfh"].machines
    assert short_names(vectors) == "rv64 Zfh VLEN 128, 256, 512, 1024"
    assert short_names(all_targets()["riscv64"].machines) == "rv64 without vectors"
    assert short_names(all_targets()["aarch64-sve512"].machines) == "a64fx; max SVE 512"
    assert short_names(["qemu-aarch64 -cpu max,sve=off", "wasmtime"]) == "max without SVE; wasmtime"


def test_the_report_is_of_the_first_machine_that_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def costs(target: Target, kernels: object, machine: str) -> dict[str, str]:
        asked.append(machine)
        return {"counted_on": machine}

    monkeypatch.setattr("headrace.target_test.machines_of", lambda _: [("a", "gone"), ("b", None)])
    monkeypatch.setattr("headrace.target_test._run", lambda *_: ("equal", "bit for bit"))
    monkeypatch.setattr("headrace.target_test.report", costs)
    command = ["targets", "test", "--target", HOST.name, "--kernel", "copy_f32", "--report"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reports"] == [{"counted_on": "b"}]
    assert asked == ["b"]


def test_an_unknown_kernel_or_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "test", "--kernel", "gemv_q4"]) == 2
    assert "gemv_q4_0" in capsys.readouterr().err
    assert main(["targets", "test", "--target", "vax"]) == 2
    assert "unknown target 'vax'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    if AARCH64 is None or machines_of(AARCH64)[0][1] is not None:
        pytest.skip("no emulated AArch64 here")
    found = report(AARCH64, [TABLE["rows_q4_0"]], AARCH64.machines[0])
    assert found["pack_bytes"] > 1000
    costs = {row["format"]: row for row in found["costs"]}
    assert 0.05 < costs["q4_0"]["gemv instructions"] < 0.25
    # Every byte of the weights is loaded, and activations of one token besides.
    assert 1.0 < costs["q4_0"]["gemv loads"] < 1.5


# Kernels whose operations have one order, or none that could round: each target is compared with
# one reference exactly, so all targets agree with each other.
PLANES = ("gemv_i1_g64", "gemv_i2_g64", "gemv_i3_g64")
COPIES = ("copy_f32", "copy_x16", "copy_tables")
MOVED = ("experts_group", "experts_pick", "experts_gather", "experts_scatter")
BYTES = (
    "convolution_u8", "depthwise_u8", "images_quantise", "images_dequantise", "images_to_floats",
    "images_from_floats", "images_mean_u8", "dynamic_rows", "dynamic_columns",
    "sparse_product_4x1_u8",
)  # fmt: skip
LISTED = ("clusters_fired", "clusters_list")
IMAGES = (
    "images_gather", "images_scatter", "images_add", "images_copy", "images_border",
    "images_spread", "images_take", *BYTES,
)  # fmt: skip
EXACT = (
    "experts_recall", "tile_", "rows_", *COPIES, "gemm_gqs_", "columns_gqs_", *PLANES, *MOVED,
    *LISTED, *IMAGES, "recurrent_start",
)  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_flag_of_exact_kernels(name: str) -> None:
    if TABLE[name].cases is no_cases:
        pytest.skip("it has no results")
    every = {target: TABLE[name].bit_exact(target) for target in (HOST, *FOREIGN.values())}
    assert set(every.values()) == {name.startswith(EXACT)}
