"""The runtime inside another program: it generates in a thread, and the program may cancel it.

python examples/in_a_thread.py [MODEL]
"""

from __future__ import annotations

import queue
import sys
import threading
import time

import headrace


def answer(model: headrace.Model, prompt: str, out: queue.Queue[str | None]) -> None:
    """Generate an answer; runs in a thread of its own, and leaves the GIL to the others."""
    try:
        for piece in model.generate(prompt, max_tokens=2000):
            out.put(piece)
    finally:
        out.put(None)


def main() -> None:
    pieces: queue.Queue[str | None] = queue.Queue()
    with headrace.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as model:
        prompt = "Tell me a very long story."
        worker = threading.Thread(target=answer, args=(model, prompt, pieces))
        worker.start()
        deadline_s = time.monotonic() + 1.0
        cancelled = False
        while True:
            try:  # where a graphical program would handle its events
                piece = pieces.get(timeout=0.02)
            except queue.Empty:
                piece = ""
            if piece is None:
                break
            print(piece, end="", flush=True)
            if not cancelled and time.monotonic() > deadline_s:
                model.cancel()  # from another thread than the one that generates
                cancelled = True
        worker.join()
    print("\n[cancelled after a second]" if cancelled else "")


if __name__ == "__main__":
    main()
