"""A chat in twenty lines: python examples/chat.py [MODEL]"""

from __future__ import annotations

import sys

import headrace


def main() -> None:
    with headrace.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as model:
        chat = model.chat()  # keeps the conversation's KV cache from turn to turn
        print("Say something; Ctrl-D ends.")
        for text in sys.stdin:
            for piece in chat.send(text.strip(), max_tokens=256):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
