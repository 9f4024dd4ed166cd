"""The threads and compiled kernels that the plans of a network share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from headrace.kernels import (
    attention_rows,
    convolution,
    convolution_u8,
    depthwise,
    depthwise_u8,
    dynamic_columns,
    dynamic_u8,
    execute,
    finishes,
    gelu,
    image_copies,
    image_operators,
    image_operators_u8,
    images,
    images_u8,
    layer_norm,
    mask,
    moments,
    n_bits_rows,
    prepare,
    product_rows,
    recurrent,
    rows,
    softmax_mean,
    softmax_rows,
    sparse_product,
    sparse_product_u8,
    sparse_tiles,
    taking,
)
from headrace.networks.weight_store import WeightStore
from headrace.sparse import n_bits
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.table import Kernel
from headrace.targets.target import Target
from headrace.team import Team

# Whose kernels networks use.
MODULES = (
    convolution, depthwise, sparse_product, sparse_tiles, images, finishes, image_operators,
    image_copies, layer_norm, moments, gelu, attention_rows, convolution_u8, depthwise_u8,
    images_u8, image_operators_u8, dynamic_u8, rows, n_bits, n_bits_rows, prepare, product_rows,
    softmax_rows, softmax_mean, mask, recurrent, dynamic_columns, sparse_product_u8, taking,
)  # fmt: skip


class Engine:
    """Kernels for this CPU, and a team of threads; both come when they are first wanted.

    Args:
        threads: of the team.
        target: the CPU level that is asked for; None: the best that this CPU has.

    Raises:
        KernelError: there is no such target, or this CPU cannot run it.
    """

    def __init__(self, threads: int, target: str | None = None) -> None:
        self.threads = threads
        if target is not None:
            self.target = pick_target(target)
        self.weights = WeightStore()
        self._teams: dict[int, Team] = {}

    @cached_property
    def target(self) -> Target:
        """What kernels are for."""
        return pick_target(None)

    @cached_property
    def store(self) -> KernelStore:
        """Compiled kernels."""
        return KernelStore(self.target, self.threads)

    def addresses(self, names: Iterable[str]) -> dict[str, int]:
        """Of kernels by name.

        Raises:
            KernelError: one does not compile, or there is no compiler.
        """
        known: dict[str, Kernel] = {
            row.name: row for module in MODULES for row in module.all_kernels()
        }
        return self.addresses_of([known[name] for name in names])

    def addresses_of(self, kernels: Iterable[Kernel]) -> dict[str, int]:
        """Of kernels.

        Raises:
            KernelError: one does not compile, or there is no compiler.
        """
        return self.store.load(list(kernels))

    @property
    def team(self) -> Team:
        """The threads.

        Raises:
            KernelError: there is no compiler.
        """
        return self._team_of(self.threads)

    @property
    def alone(self) -> Team:
        """The caller without other threads.

        Raises:
            KernelError: there is no compiler.
        """
        return self._team_of(1)

    def _team_of(self, threads: int) -> Team:
        if threads not in self._teams:
            addresses = self.store.load(execute.kernels().values())
            self._teams[threads] = Team(addresses, threads)
        return self._teams[threads]

    def close(self) -> None:
        """End the threads."""
        for team in self._teams.values():
            team.close()
        self._teams.clear()

    def __del__(self) -> None:
        # Threads run the kernels: they must have ended before those go.
        if getattr(self, "_teams", None):
            self.close()
