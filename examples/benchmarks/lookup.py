"""Prompt lookup against none: tokens per second on tasks that repeat their prompt and on others.

python examples/benchmarks/lookup.py MODEL [--rounds 3] [--memory 500MB]

Each task runs with and without in turn; tokens must be the same. Figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import headrace

ARTICLE = """\
The town library of Millbrook reopened on Monday after two years of repairs. A burst pipe had \
flooded the cellar, where the oldest newspapers of the county were kept, and for a time it seemed \
that most of them were lost. Volunteers carried eleven thousand pages to a cold store, where they \
were frozen, dried in a vacuum and pressed flat. About nine in ten pages can be read again. The \
building itself has a new roof, a lift and a reading room that looks out over the river. Children \
have a floor of their own, with low shelves and a stage for puppet plays. The repairs cost four \
million crowns, of which the town paid half; the rest came from the county and from three hundred \
people who gave small sums. The librarian, Anna Holt, said that she had not expected so many \
visitors on the first day: "We ran out of library cards before noon." The library is open from \
nine to seven on weekdays and from ten to four on Saturdays. On Sundays it stays closed, but the \
council will look at that again in the autumn."""

CODE = """\
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount
        self.history.append(("withdraw", amount))
        return self.balance
"""

LETTER = """\
Dear Mr. Lindqvist,

thank you for your order of the third of May. The four oak chairs and the round table left our \
workshop this morning and will reach you on Thursday between nine and twelve. Two men will bring \
them up to your flat on the second floor, unpack them and take the boxes with them. Please look at \
all of the pieces while they are still there, and write down anything that is scratched or loose. \
The bill is due within thirty days. If you pay within ten days, you may take off two percent. Oak \
darkens in the light, so leave nothing standing on the table for the first weeks. Twice a year, \
rub the wood with the oil that we have put in the drawer, and wipe off what it has not taken up \
after a quarter of an hour. Chairs that creak can be tightened with the key that is fixed under \
the seat.

With kind regards,
Marta Oberholzer"""

# Name, whether the answer repeats the prompt, the prompt, and whether it is text to continue.
TASKS = [
    ("edit a letter", True,
     f"Copy this letter exactly, but write Friday instead of Thursday:\n\n{LETTER}", False),
    ("edit code", True,
     f"Write this program again with `amount` renamed to `value`:\n\n```python\n{CODE}```", False),
    ("complete code", True,
     f"{CODE}\n    def transfer(self, other, amount):\n        if amount <= 0:\n            raise",
     True),
    ("quote", True,
     f"{ARTICLE}\n\nRepeat the three sentences about the repairs and their cost word for word.",
     False),
    ("summarise", True, f"Summarise this article in a few sentences:\n\n{ARTICLE}", False),
    ("poem", False,
     f"{ARTICLE}\n\nNow forget the library. Write a poem about a storm at sea and a lost sailor.",
     False),
    ("story", False,
     f"{LETTER}\n\nThe letter is only an example of style. Tell a story about a fox who learns to "
     "swim, with a beginning, a middle and an end.", False),
    ("explain", False,
     f"{CODE}\nPut the code aside. Explain to a child why the sky is blue and sunsets are red.",
     False),
]  # fmt: skip


def once(model: headrace.Model, prompt: str, raw: bool, lookup: bool, options: Any) -> Any:
    """One answer, read to its end."""
    generation = model.generate(
        prompt, raw=raw, max_tokens=options.max_tokens, temperature=options.temperature, seed=1,
        lookup=lookup,
    )  # fmt: skip
    generation.text()
    return generation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-n", "--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--memory")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    columns = "{:<14} {:>7} {:>7} {:>6} {:>9} {:>9} {:>6} {:>9} {:>9}"
    print(columns.format(
        "task", "repeats", "prompt", "new", "off tok/s", "on tok/s", "ratio", "tok/pass", "accepted"
    ))  # fmt: skip
    with headrace.load(
        options.model, memory=options.memory, threads=options.threads, context=1024
    ) as model:
        for name, repeats, prompt, raw in TASKS:
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(options.rounds):
                ids = []
                for lookup in (False, True):
                    found = once(model, prompt, raw, lookup, options)
                    ids.append(found.ids)
                    rates[lookup].append(
                        (found.stats.new_tokens - 1) / found.stats.decode_s
                        if found.stats.decode_s
                        else float("nan")
                    )
                if ids[0] != ids[1]:
                    raise SystemExit(f"{name}: the tokens differ: {ids}")
            stats = found.stats
            off, on = median(rates[False]), median(rates[True])
            row = (
                name,
                "yes" if repeats else "no",
                stats.prompt_tokens,
                stats.new_tokens,
                f"{off:.2f}",
                f"{on:.2f}",
                f"{on / off:.2f}",
                f"{stats.tokens_per_pass or 1:.2f}",
                stats.accepted_tokens,
            )
            print(columns.format(*row), flush=True)


if __name__ == "__main__":
    main()
