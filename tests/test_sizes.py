from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.available import cgroup_limits
from headrace.sizes import format_rate, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300MB", 300_000_000),
        ("1.5GiB", 3 << 29),
        ("1.5 gib", 3 << 29),
        ("4096", 4096),
        (4096, 4096),
        (" 64 kB ", 64_000),
        ("64K", 64_000),
        ("2M", 2_000_000),
        (".5MiB", 1 << 19),
        ("1TB", 10**12),
        ("7b", 7),
        ("50%", 500),
        ("100 %", 1000),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text, total_bytes=1000) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a size; write for example 300MB"),
        ("MB", "not a size"),
        ("-5MB", "not a size"),
        ("1e9", "not a size"),
        ("5 XB", "unknown unit 'XB'"),
        ("0", "between 1 byte"),
        (-1, "between 1 byte"),
        ("101%", "more than all"),
        ("9" * 400, "between 1 byte"),
        ("٣MB", "not a size"),
        ("300MB\n5", "not a size"),
    ],
)
def test_what_is_no_size(text: str | int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_size(text, total_bytes=1000)


def test_a_share_of_this_machine() -> None:
    psutil = pytest.importorskip("psutil")
    total = min([psutil.virtual_memory().total, *cgroup_limits()])
    assert parse_size("25%") == total // 4


def test_a_share_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr("headrace.available.cgroup_limits", lambda: (1 << 30, 1 << 20))
    assert parse_size("25%") == 1 << 18


@pytest.mark.parametrize(
    ("rate", "expected"), [(483.4, "483"), (99.96, "100"), (12.34, "12.3"), (0.908, "0.91")]
)
def test_rates(rate: float, expected: str) -> None:
    assert format_rate(rate) == expected


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (98_362_432, "98.4 MB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (9_996_000, "10.0 MB"),
        (1_234_567_890, "1.23 GB"),
        (5e15, "5000 TB"),
        (-2_000_000, "-2.00 MB"),
    ],
)
def test_formatting(n_bytes: float, expected: str) -> None:
    assert format_size(n_bytes) == expected


@given(st.integers(1, 10**14))
def test_what_is_formatted_can_be_read(n_bytes: int) -> None:
    assert abs(parse_size(format_size(n_bytes)) - n_bytes) <= 0.006 * n_bytes
