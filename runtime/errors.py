"""All exceptions that Headrace raises on purpose; each message says what to do next."""

from __future__ import annotations

from pathlib import Path


class HeadraceError(Exception):
    """Base of every exception that this package raises on purpose."""


class ModelFileError(HeadraceError):
    """A model file is truncated, corrupt, hostile or not a model file at all.

    The message names the file, the tensor (or metadata key) and the byte offset where known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.tensor = tensor
        self.offset = offset
        where = []
        if path is not None:
            where.append(str(path))
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        if offset is not None:
            where.append(f"offset {offset}")
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


class UnsupportedError(ModelFileError):
    """The file is valid, but it needs something that Headrace does not do."""


class ModelNotFoundError(HeadraceError):
    """A model name, path or hub id leads to no file; the message says what was tried."""


class DownloadError(HeadraceError):
    """A download failed, or what came does not have the expected hash or size."""


class BudgetError(HeadraceError):
    """The memory budget is too small; `needed_bytes` is what was asked for needs."""

    def __init__(self, message: str, *, needed_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        super().__init__(message)


class ContextOverflowError(HeadraceError):
    """A prompt (or a continuation) does not fit in the context; nothing is cut silently."""


class BusyError(HeadraceError):
    """A model that is generating in one thread was called from another."""


class CancelledError(HeadraceError):
    """Work was cancelled through `Model.cancel()`."""


class TemplateError(HeadraceError):
    """A chat template is missing, invalid, or not allowed by the sandbox."""


class KernelError(HeadraceError):
    """A kernel could not be compiled or loaded for this target."""


class NoCompilerError(KernelError):
    """Kernels would have to be compiled, and Numba or llvmlite is not installed."""
