"""How well encoders tell how alike sentences are: Spearman's correlation with what people say.

    python sentence_pairs.py PAIRS.csv DIRECTORY ...

PAIRS.csv has two sentences and a number in each row, as the test part of STS-B. DIRECTORY is an
encoder's (see `headrace embed`); of files that `headrace compress` wrote, make copies of it with
these as model.onnx.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

import headrace


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in order; those of equal values are their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("directories", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with given.pairs.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    wanted = ranks(np.array([float(row[2]) for row in rows]))
    print("| encoder | Spearman |")
    print("| --- | ---: |")
    for directory in given.directories:
        encoder = headrace.load(directory, threads=given.threads)
        a, b = (encoder.embed([row[i] for row in rows]) for i in (0, 1))
        encoder.close()
        size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        found = ranks((a * b).sum(axis=1) / size)
        print(f"| {Path(directory).name} | {np.corrcoef(found, wanted)[0, 1]:.4f} |")


if __name__ == "__main__":
    main()
