"""How many drafted tokens to check in a pass: as many as give the most tokens per second.

A pass over more tokens takes longer (little, when weights come from disk or memory binds), and
each token counts only if all before it were right. Both are learned while text is generated.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from headrace.lookup import LONGEST, Draft

MOST_DRAFTED = 15  # with the token before them they make a pass of `short`
# How often a draft's token is right at first sight, by the tokens that matched before it, and how
# many observations that counts as.
_FIRST_SIGHT = (0.15, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
_FIRST_WEIGHT = 3.0
_MEMORY = 48.0  # observations after which older ones fade
_KEPT_TIMES = 5
_GAIN = 1.15  # a draft must promise so much more than none: estimates err
# The first tries may have been accidents: until there are three, they are doubted after so many
# passes.
_DOUBT_AFTER = 48


class PassTimes:
    """What passes over so many tokens take: the median of the last few; between them, lines."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._tries = 0  # passes over several tokens
        self._since = 0  # passes since the last of them

    def add(self, n_tokens: int, seconds: float) -> None:
        """Count a pass."""
        self._since = 0 if n_tokens > 1 else self._since + 1
        self._tries += n_tokens > 1
        self._times.setdefault(n_tokens, deque(maxlen=_KEPT_TIMES)).append(seconds)

    def expected(self, n_tokens: int) -> float | None:
        """Seconds of a pass; None before one of a single token was measured.

        With nothing else measured, more tokens take no longer: one try finds out.
        """
        if 1 not in self._times:
            return None
        doubted = self._tries < 3 and self._since > _DOUBT_AFTER
        known = [1] if doubted else sorted(self._times)
        above = [n for n in known if n >= n_tokens]
        below = [n for n in known if n < n_tokens]
        if not below:
            return median(self._times[above[0]])
        if above:
            low, high = below[-1], above[0]
        elif len(below) > 1:
            low, high = 1, below[-1]
        else:
            return median(self._times[1])
        t_low, t_high = median(self._times[low]), median(self._times[high])
        return t_low + (t_high - t_low) * (n_tokens - low) / (high - low)


class Acceptance:
    """How often drafted tokens of one text are right."""

    def __init__(self) -> None:
        self._right = [share * _FIRST_WEIGHT for share in _FIRST_SIGHT]
        self._seen = [_FIRST_WEIGHT] * LONGEST

    def add(self, draft: Draft, chosen: list[int]) -> None:
        """Compare a draft with what was chosen; also one that was not read."""
        for i, (drafted, token) in enumerate(zip(draft.tokens, chosen, strict=False)):
            at = self._at(draft, i)
            if self._seen[at] >= _MEMORY:
                self._seen[at] /= 2
                self._right[at] /= 2
            self._seen[at] += 1
            self._right[at] += drafted == token
            if drafted != token:
                break

    def share(self, draft: Draft, i: int) -> float:
        """The chance that token i of a draft is right if those before it are."""
        at = self._at(draft, i)
        return self._right[at] / self._seen[at]

    def _at(self, draft: Draft, i: int) -> int:
        return min(draft.matched + i, LONGEST) - 1


def tokens_to_check(draft: Draft, acceptance: Acceptance, times: PassTimes) -> int:
    """How many tokens of a draft to read; 0 where that does not pay."""
    alone = times.expected(1)
    if alone is None:
        return 0
    best, most = 0, _GAIN / alone
    chance = expected = 1.0
    for i in range(len(draft.tokens)):
        chance *= acceptance.share(draft, i)
        expected += chance
        seconds = times.expected(i + 2)
        if seconds is not None and expected / seconds > most:
            best, most = i + 1, expected / seconds
    return best
