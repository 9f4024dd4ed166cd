"""What the command prints: tables for people, JSON for programs, progress bars."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from headrace.sizes import format_size


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees (or types) it; a closed stream is None."""
    return stream is not None and stream.isatty()


def value_text(value: Any) -> str:
    """A value of the metadata on one line, long ones cut."""
    if isinstance(value, dict):
        if "characters" in value:
            return f"{value['first'][:80]!r}... ({value['characters']} characters)"
        return f"[{', '.join(value_text(x) for x in value['first'][:4])}, ...] ({value['count']})"
    if isinstance(value, list):
        return f"[{', '.join(value_text(x) for x in value)}]"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({len(text)} characters)"


def printable(text: str) -> str:
    """A file's text without what could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A line on stderr, which may be closed."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):  # nowhere to complain to
        print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """A value as JSON."""
    import json

    print(json.dumps(value, indent=2, default=_jsonable), flush=True)


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def show(values: Mapping[str, Any], as_json: bool) -> None:
    """A dict as JSON or for people, who read `peak_bytes: 123456789` as `peak  123 MB`."""
    if as_json:
        print_json(values)
        return
    tables = {k: v for k, v in values.items() if _is_table(v)}
    plain = {k: v for k, v in values.items() if k not in tables and v not in (None, [], ())}
    width = max((len(_label(k)) for k in plain), default=0)
    for key, value in plain.items():
        print(f"{_label(key):<{width}}  {printable(_human(key, value))}")
    for key, rows in tables.items():
        print(f"\n{_label(key)}")
        table(rows)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _label(key: str) -> str:
    for suffix in ("_bytes", "_tok_s", "_gb_s", "_s"):
        key = key.removesuffix(suffix)
    return key.replace("_", " ")


# The parts of a `MemoryPlan` are bytes whose names do not say so.
_PLAN_PARTS = {
    "file", "weights", "resident_weights", "window", "vectors", "kv_cache", "activations",
    "process", "budget", "limit",
}  # fmt: skip


def _human(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_label(k)} {_human(k, v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_human(key, v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if "bytes" in key or key in _PLAN_PARTS:
            return format_size(value)
        units = {"_tok_s": " tok/s", "_gb_s": " GB/s", "_s": " s"}
        unit = next((text for end, text in units.items() if key.endswith(end)), "")
        return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + unit
    return str(value)


def table(rows: list[dict[str, Any]]) -> None:
    """Rows as columns of text."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_label(key) for key in keys]]
    cells += [[printable(_human(key, row.get(key, ""))) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    numeric = [all(isinstance(r.get(key, 0), int | float) for r in rows) for key in keys]
    for line in cells:
        row = (
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        )
        print("  " + "  ".join(row).rstrip())


_BAR_AFTER_S = 0.3


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on stderr if that is a terminal, and only for what takes a while."""
    first_s = time.perf_counter()
    bar: Any = None
    tasks: dict[str, Any] = {}

    def report(done: int, total: int | None, label: str) -> None:
        nonlocal bar
        if not terminal or (bar is None and time.perf_counter() - first_s < _BAR_AFTER_S):
            return
        if bar is None:
            bar = _make_bar()
            bar.start()
        if label not in tasks:
            tasks[label] = bar.add_task(printable(label), total=total)
        bar.update(tasks[label], completed=done, total=total)

    terminal = is_terminal(sys.stderr)
    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _make_bar() -> Any:
    from rich import progress
    from rich.console import Console

    class Amount(progress.ProgressColumn):
        def render(self, task: Any) -> Any:
            big = (task.total or task.completed) >= 100_000  # bytes, and not kernels or windows
            shown = [format_size(n) if big else str(n) for n in (task.completed, task.total or 0)]
            return "/".join(shown if task.total else shown[:1])

    columns = ("{task.description}", progress.BarColumn(), Amount(), progress.TimeRemainingColumn())
    return progress.Progress(*columns, console=Console(stderr=True))
