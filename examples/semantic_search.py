"""What a folder's texts say about something: python examples/semantic_search.py MODEL FOLDER QUERY

MODEL is a directory with a text encoder, such as all-MiniLM-L6-v2; paragraphs of .txt and .md files
are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import headrace


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    model, folder, query = sys.argv[1:]
    if not Path(folder).is_dir():
        sys.exit(f"there is no folder {folder}")
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.suffix in (".txt", ".md"):
            parts = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
            found += [(path, part.strip()) for part in parts if part.strip()]
    if not found:
        sys.exit(f"{folder}: no paragraph in a .txt or .md file")
    with headrace.load(model) as encoder:
        vectors = encoder.embed([part for _, part in found])
        likeness = vectors @ encoder.embed([query])[0]  # vectors have length 1: the cosine
    for i in np.argsort(-likeness)[:5]:
        path, part = found[i]
        print(f"{likeness[i]:.3f}  {path}: {' '.join(part.split())[:80]}")


if __name__ == "__main__":
    main()
