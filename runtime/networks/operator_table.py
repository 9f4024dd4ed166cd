"""The table of operators in docs/onnx.md, of what the files of operators and patterns say.

python -m headrace.networks.operator_table docs/onnx.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from headrace.atomic_file import write_whole
from headrace.networks.operators import MODULES
from headrace.networks.patterns import attention, dynamic, microsoft, runs, softmax_mean

BEGIN, END = "<!-- operators -->\n", "<!-- /operators -->"
_PATTERNS = (attention, microsoft, dynamic, softmax_mean, runs)


def operator_table() -> str:
    """Rows of Markdown: operators, and which of them have kernels of ours."""
    rows = [("operators on kernels of ours", "which of them"), ("---", "---")]
    for module in (*MODULES, *_PATTERNS):
        rows += getattr(module, "WHICH", {}).items()
    return "".join(f"| {operators} | {which} |\n" for operators, which in rows)


def main() -> None:
    """Write the table to its place in a file.

    Raises:
        ValueError: the file has no such place.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    text = path.read_text("utf-8")
    begin = text.index(BEGIN) + len(BEGIN)
    text = text[:begin] + operator_table() + text[text.index(END, begin) :]
    write_whole(path, text.encode())


if __name__ == "__main__":
    main()
