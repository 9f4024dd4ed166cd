"""Draw quality against megabytes as an SVG: a panel for perplexity, one for KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {"rtn": "#888", "search": "#d80", "gptq": "#06c"}
OTHER = "#292"  # blocks of a stack
WIDTH, HEIGHT, MARGIN = 860, 400, 60
MOST, NEAR = 20.0, 2.5
LINE = 11  # from one label to the next


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A dot for each row in each panel, both scales logarithmic, dots of a format linked.

    What multiplies perplexity by more than `MOST` is left out, by more than `NEAR` in the panel of
    perplexity.

    Args:
        rows: as `compression.py` has them.
        path: the file to write.
        title: stands above the first panel.
    """
    rows = [row for row in rows if row["perplexity_ratio"] <= MOST]
    sizes = [row["bytes"] / 1e6 for row in rows]
    left, right = math.log(min(sizes) * 0.98), math.log(max(sizes) * 1.02)

    def across(size: float) -> float:
        return MARGIN + (math.log(size) - left) / max(1e-9, right - left) * (WIDTH - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * HEIGHT}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{WIDTH}" height="{2 * HEIGHT}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="20" font-size="14">{title}</text>',
    ]
    for i, name in enumerate(
        method for method in COLOURS if any(r["method"] == method for r in rows)
    ):
        parts.append(
            f'<text x="{WIDTH - 60}" y="{20 + 13 * i}" fill="{COLOURS[name]}">{name}</text>'
        )
    near = [row for row in rows if row["perplexity_ratio"] <= NEAR]
    parts += _panel(near, "perplexity", "perplexity", 0, across)
    differ = [row for row in rows if row["kl_divergence"] > 0]
    parts += _panel(differ, "kl_divergence", "KL", HEIGHT, across)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _panel(
    rows: Sequence[Row], key: str, said: str, top: float, across: Callable[[float], float]
) -> list[str]:
    logs = [math.log10(row[key]) for row in rows]
    low, high = min(logs), max(logs)
    room = HEIGHT - 120  # labels that were moved down stand below

    def down(log: float) -> float:
        return top + 40 + (high - log) / max(1e-9, high - low) * room

    parts = [f'<text x="8" y="{top + 30}">{said}</text>']
    marks = _marks(low, high)
    for value in marks if len(marks) > 2 else _round_values(row[key] for row in rows):
        y = down(math.log10(value))
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for size in _round_values(row["bytes"] / 1e6 for row in rows):
        x = across(size)
        parts.append(f'<path d="M{x:.1f} {top + 40}V{top + 40 + room}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 34}" text-anchor="middle">{size:g} MB</text>')
    dots: dict[str, list[tuple[float, float, str]]] = {}
    for row, log in zip(rows, logs, strict=True):
        dot = across(row["bytes"] / 1e6), down(log), COLOURS.get(row["method"], OTHER)
        dots.setdefault(row["format"], []).append(dot)
    for found in dots.values():
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in sorted(found))
        parts.append(f'<path d="M{line}" fill="none" stroke="#bbb"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{c}"/>' for x, y, c in found]
    return [
        *parts,
        *_labels({name: max(found, key=lambda d: d[1]) for name, found in dots.items()}),
    ]


def _labels(best: dict[str, tuple[float, float, str]]) -> list[str]:
    """The names of formats beside their best dots, moved down where two would overlap."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for name, (x, y, colour) in sorted(best.items(), key=lambda item: item[1][1]):
        width = 6 * len(name)
        while any(
            abs(y - other) < LINE and x < end and start < x + width for start, end, other in taken
        ):
            y += 1
        taken.append((x, x + width, y))
        parts.append(f'<text x="{x + 5:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return parts


def _marks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, .. between two logarithms; only powers of ten if these are many."""
    steps = (1, 2, 5) if high - low < 3 else (1,)
    found = (
        s * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for s in steps
    )
    return [value for value in found if low <= math.log10(value) <= high]


def _round_values(found: Iterable[float]) -> list[float]:
    """About six round values between the least and the largest."""
    values = list(found)
    least, most = min(values), max(values)
    rough = max(most - least, 1e-3) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * i for i in range(math.ceil(least / step), math.floor(most / step) + 1)]
