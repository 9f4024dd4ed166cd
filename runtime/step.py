"""Steps of a plan, and where what they read and write lies, as those who place it say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.families.decoder import Matrix
from headrace.offload.recall import Predictor, Recall
from headrace.stack import BlockAt
from headrace.weights import Part


@dataclass(frozen=True)
class Call:
    """A kernel that another one calls."""

    kernel: str
    slots: list[Any]


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Attributes:
        n_bytes: of weights that it reads.
        weights: the slot that has their address.
        request: number of the read that it waits for (`waits`) or is the last to need (`gives`).
        logits_at: byte of each row of logits that it writes from; None: it writes none.
        writes: slots of later steps that it writes while it runs: (steps further on, slot).
        table: its own slot that gets the address of a table of those slots' addresses.
        calls: what it calls: its slot 0 gets that kernel's address, slot 1 its argument block's.
        loop: (address of a word, steps): it goes back so many steps while the word is not 0.
    """

    kernel: str
    slots: list[Any]
    barrier: bool
    label: str
    n_bytes: int = 0
    request: int | None = None
    waits: bool = False
    gives: bool = False
    logits_at: int | None = None
    weights: int = 0
    writes: tuple[tuple[int, int], ...] = ()
    table: int = 0
    loop: tuple[int, int] | None = None
    calls: Call | None = None


class CachePlaces(Protocol):
    """A cache of experts; mixtures are numbered in the order of their layers."""

    @property
    def address(self) -> int:
        """Of the store."""

    @property
    def first(self) -> Sequence[int]:
        """Number of the first expert of each mixture."""

    @property
    def look_ahead(self) -> int:
        """For how many mixtures experts are asked for before they are chosen."""

    @property
    def ranks(self) -> int:
        """Of predictions of a mixture at a distance."""

    def router_ahead(self, mixture: int, distance: int) -> tuple[int, int] | None:
        """Addresses of weights (tiled float16) and bias that say what a mixture will choose by what
        the one so many mixtures before it reads; None: its own router must do.
        """

    @property
    def predictor(self) -> Predictor:
        """What asks for experts ahead."""

    @property
    def recall(self) -> Recall | None:
        """Its tables; None: it has none."""

    def predictions_address(self, mixture: int, distance: int) -> int:
        """Of what is predicted for a mixture, so many mixtures before it."""


class Places(Protocol):
    """Where everything that steps read and write lies."""

    def embedding(self) -> int:
        """Address of tiles that have the rows of the embedding that ids stand for."""

    def parts(self, matrix: Matrix) -> Sequence[Part]:
        """All tiles of a matrix in the order in which they are read."""

    def blocks(self, matrix: Matrix) -> Sequence[BlockAt]:
        """The blocks of a matrix of a stack, the first one first."""

    def head(self, matrix: Matrix) -> int:
        """Address of the head of a group-sparse matrix."""

    def directory(self, mixture: int) -> int:
        """Address of the directory of a mixture's experts (`headrace.kernels.experts`).

        Or, of feed-forwards in clusters, of the places of all ups, and behind them of all downs
        (`headrace.kernels.clusters`).
        """

    def cache(self) -> CachePlaces | None:
        """Where experts are brought when they are wanted; directories say where in its slot an
        expert's matrices lie. None: they say at which address.
        """

    def staging(self, turn: int) -> int:
        """Address of a buffer for raw rows that are tiled: one for even turns, one for odd."""

    def vector(self, name: str) -> int:
        """Address of a padded float32 vector."""

    def table(self, name: str) -> int:
        """Address of a table of `headrace.plan.table_sizes`."""

    def buffer(self, name: str, large: bool) -> int:
        """Address of a buffer of `headrace.plan.buffer_sizes`; `large`: for long chunks."""

    def kv(self) -> int:
        """Address of the KV cache."""
