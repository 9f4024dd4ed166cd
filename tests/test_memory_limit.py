"""A budget holds where the system enforces it: in a memory cgroup of that size."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.errors import BudgetError
from headrace.memory_plan import plan_model

EXAMPLES = Path(__file__).parents[1] / "examples" / "benchmarks"
ROOT = Path("/sys/fs/cgroup")
CONTEXT = 256
RUN = """
import json, sys
import headrace
from headrace.peak import peak_rss_bytes
path, memory = sys.argv[1], int(sys.argv[2])
with headrace.load(path, memory=memory, context=256, threads=2) as model:
    generation = model.generate(list(range(300, 340)), max_tokens=12)
    generation.text()
    print(json.dumps({"ids": generation.ids, "peak": peak_rss_bytes(), "streams": model.streams}))
"""


@contextlib.contextmanager
def group(n_bytes: int) -> Iterator[Path]:
    """A cgroup with this limit, of version 1 or 2; the test is skipped where it cannot be made."""
    old = (ROOT / "memory").is_dir()
    folder = (ROOT / "memory" if old else ROOT) / f"headrace-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(n_bytes))
        except OSError as error:
            pytest.skip(f"no limit can be set on a memory cgroup here: {error}")
        yield folder
    finally:
        folder.rmdir()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of 50 MB."""
    path = tmp_path_factory.mktemp("limit") / "m.gguf"
    subprocess.run(
        [
            sys.executable, EXAMPLES / "make_synthetic.py", path, "--layers", "6", "--width",
            "1024", "--ffn", "2816", "--heads", "16", "--kv-heads", "4", "--vocab", "4096",
            "--type", "q4_0",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return path


def test_a_budget_holds_in_a_group_of_its_size(model: Path) -> None:
    with headrace.load(model, context=CONTEXT, threads=2) as whole:
        generation = whole.generate(list(range(300, 340)), max_tokens=12)
        generation.text()
    with pytest.raises(BudgetError) as caught:
        headrace.load(model, memory=1, context=CONTEXT, threads=2)
    least = caught.value.needed_bytes
    for memory in (least, least + (8 << 20)):
        with group(memory // 4096 * 4096 + 4096) as folder:  # whole pages
            done = subprocess.run(
                ["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh",
                 sys.executable, "-c", RUN, model, str(memory)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["streams"]
        assert found["ids"] == generation.ids
        assert found["peak"] <= memory


def run_in(folder: Path, script: str, *arguments: object) -> Any:
    """What a script prints as JSON that runs in a group."""
    done = subprocess.run(
        ["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh",
         sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


GIVE_BACK = """
import json, sys
from pathlib import Path
from headrace.memory import Arena

def used():
    return int(next(p for p in map(Path, sys.argv[1:]) if p.exists()).read_text())

MB = 1 << 20
arena = Arena({"data": 96 * MB})
arena.view("data")[:] = 1
before = used()
for at in range(0, 96, 2):
    arena.release("data", at * MB + 4096, MB)
print(json.dumps([before, used(), int(arena.view("data").sum())]))
"""


def test_what_is_given_back_is_no_longer_counted() -> None:
    """Also not parts of huge pages, which the system would rather keep whole."""
    with group(600 << 20) as folder:
        names = folder / "memory.usage_in_bytes", folder / "memory.current"
        before, after, left = run_in(folder, GIVE_BACK, *names)
    assert before - after > 40 << 20
    assert left == 48 << 20  # the rest is still there


TWO = """
import json, sys
import headrace
with headrace.load(sys.argv[1], context=256, threads=2) as one:
    with headrace.load(sys.argv[1], context=256, threads=2) as other:
        a, b = (m.generate(list(range(300, 340)), max_tokens=12) for m in (one, other))
        a.text(), b.text()
        print(json.dumps([a.ids, b.ids, one.streams, other.streams]))
"""


def test_two_models_share_what_there_is(model: Path) -> None:
    whole = plan_model(model, context=CONTEXT, threads=2, measure=False)
    with pytest.raises(BudgetError) as caught:
        headrace.load(model, memory=1, context=CONTEXT, threads=2)
    # Kernels are compiled here: there is no room for that in the group.
    headrace.load(model, memory=caught.value.needed_bytes, context=CONTEXT, threads=2).close()
    least = caught.value.needed_bytes - whole.process
    with group(int((whole.peak_bytes + least) * 1.1) + (8 << 20)) as folder:
        first, second, one_streams, other_streams = run_in(folder, TWO, model)
    assert first == second
    assert not one_streams
    assert other_streams  # else there was room for both, and nothing is proven


def test_the_limit_of_a_group_is_the_budget(model: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        headrace.load(model, memory=1, context=CONTEXT, threads=2)
    limit = int(caught.value.needed_bytes * 1.1)
    script = RUN.replace("memory=memory, ", "")
    with group(limit) as folder:
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh",
             sys.executable, "-c", script, model, "0"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["streams"]
    assert found["peak"] <= limit
