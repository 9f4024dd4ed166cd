"""A target: a CPU as data, and the few primitives that LLVM does not choose well by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from headrace.targets.simd import SMALL

_SHORT_ADDRESSES = ("armv7a", "thumb", "riscv32", "wasm32")
_NO_CODE = {"cycles", "needs", "rank", "machines", "too_old", "load_primitives"}


def _no_primitives() -> Mapping[str, Callable[..., Any]]:
    return {}


@dataclass(frozen=True)
class Target:
    """A CPU level that kernels are built for.

    `primitives` maps a name of `headrace.targets.simd` to a function that emits LLVM code; what is
    missing there is left to LLVM. `gemm_tiles` x `gemm_tokens` is the block of sums that a matrix
    product keeps in registers, in tiles of 16 rows (or strips of `gemm_lanes` rows) by tokens.
    """

    name: str
    triple: str
    cpu: str
    features: str
    vector_bytes: int
    gemm_tiles: int
    gemm_tokens: int
    needs: frozenset[str]  # CPU features that the host must have, in LLVM's names
    rank: int  # the highest rank that the host can run is chosen
    signed_dot_bias: int = 0  # see simd.dot_start
    small_dot_bias: int = 0
    # Decode with 16-bit activations: where byte products are so cheap that memory still binds.
    decode_pairs: bool = False
    byte_matrix: bool = False  # has registers of matrices, see simd.matrix_begin
    byte_pairs: bool = False  # has instructions for pairs of 16 bits, see simd.dot_pairs
    half: bool = False  # computes with IEEE halves, see simd.load_half
    floats: bool = True  # has a floating-point unit, else `headrace.targets.soft_float`
    bf16_dot: bool = False  # has simd.bf16_dot at twice the rate of float32 products
    # Instructions multiply by one lane of a register: activations are loaded whole.
    q8_in_registers: bool = False
    gemm_lanes: int = 16  # rows of a tile that a matrix product takes at once
    gemv_lanes: int = 16  # the same for one token
    # The same for float32 activations, where another block is better (0: it is the same).
    float_tokens: int = 0
    float_lanes: int = 0
    # Bytes before weights are used that a product of one token asks for them: of the CPUs of this
    # level, those that were measured do not keep memory busy by themselves. 0: they are not asked.
    ahead: int = 0
    # Float columns that a product takes at once in short chunks: each has 4 sums in registers.
    few_tokens: int = 4
    # Instructions multiply two rows by two tokens: see `simd.with_lanes`. Takes `gemm_lanes` of 4.
    token_pairs: bool = False
    # Bytes that one instruction shuffles within groups of 16 (0: those of a vector).
    shuffle_bytes: int = 0
    abi: str = ""  # LLVM's name of the calling convention, where the triple does not say it
    # Switches of LLVM's command line; they hold for a whole process, so for one of the compiler's.
    llvm_options: tuple[str, ...] = ()
    # The same, for kernels whose order of instructions LLVM shall keep.
    in_order_options: tuple[str, ...] = ("-enable-misched=0",)
    # LLVM's attributes of every function, as text.
    attributes: str = ""
    # Machine code in front of every kernel that stops a CPU for which it would be silently wrong.
    guard: bytes = b""
    # Modules whose text decides the primitives' code, besides the target's own.
    sources: tuple[str, ...] = ()
    # Emulators of CPUs that must run it (the weakest first) and of some that must refuse to.
    machines: tuple[str, ...] = ()
    too_old: tuple[str, ...] = ()
    # Of a microcontroller: cycles of kinds of instructions (`targets/emulation/thumb.py`) that take
    # more than one, from its manual, without waits for memory.
    cycles: tuple[tuple[str, int], ...] = ()
    load_primitives: Callable[[], Mapping[str, Callable[..., Any]]] = _no_primitives

    @property
    def architecture(self) -> str:
        """First part of the triple."""
        return self.triple.split("-", 1)[0]

    @property
    def word_bytes(self) -> int:
        """Bytes of an address."""
        return 4 if self.architecture.startswith(_SHORT_ADDRESSES) else 8

    @property
    def bare_metal(self) -> bool:
        """Is it a chip that runs programs without a system?"""
        return "-none-" in self.triple

    @property
    def code_key(self) -> str:
        """All of the fields that decide a kernel's code, as text."""
        names = (one.name for one in fields(self) if one.name not in _NO_CODE)
        return " ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @property
    def primitives(self) -> Mapping[str, Callable[..., Any]]:
        """Own code for primitives; imports llvmlite's IR builder on first use."""
        cached = _primitives.get(self.name)
        if cached is None:
            cached = _primitives[self.name] = self.load_primitives()
        return cached

    def tokens(self, activation: str) -> int:
        """Columns of activations ("q8" or "f32") that a matrix product takes at once."""
        return (self.float_tokens if activation == "f32" else 0) or self.gemm_tokens

    def lanes(self, activation: str) -> int:
        """Rows of a tile that a product with such activations takes at once."""
        return (self.float_lanes if activation == "f32" else 0) or self.gemm_lanes

    @property
    def most_tokens(self) -> int:
        """The longest group of columns."""
        return max(self.tokens("q8"), self.tokens("f32"))

    def dot_bias(self, bits: int) -> int:
        """What is added to signed codes of `bits` bits: see `simd.dot_start`."""
        return {8: self.signed_dot_bias, SMALL: self.small_dot_bias}.get(bits, 0)


_primitives: dict[str, Mapping[str, Callable[..., Any]]] = {}


def all_targets() -> dict[str, Target]:
    """Every target that models run on, by name: the modules `target_*` of this folder."""
    return _targets_of("target_")


def microcontrollers() -> dict[str, Target]:
    """Every microcontroller, by name: the modules `micro_*` of this folder."""
    return _targets_of("micro_")


def hint_at_chips(name: str) -> str:
    """What to do with the name of a microcontroller where CPUs are asked for; "" for others."""
    if name not in microcontrollers():
        return ""
    return (
        f"{name} is a microcontroller: `headrace plan`, `inspect`, `bench`, `run --emulate`, "
        "`targets test` and `targets export` take it, with networks of TFLite and ONNX files. Of "
        "CPUs: "
    )


def _targets_of(prefix: str) -> dict[str, Target]:
    """What modules of this folder define as `TARGET`, by rank."""
    import headrace.targets as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith(prefix):
            target = importlib.import_module(f"headrace.targets.{module.name}").TARGET
            found[target.name] = target
    return dict(sorted(found.items(), key=lambda item: item[1].rank))
