"""Models split over several GGUF files: find the parts, and make sure they belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from headrace.errors import ModelFileError
from headrace.loaders.layout import Header
from headrace.loaders.split_names import parse_split_name


def _part_paths(h: Header, count: int) -> list[Path]:
    path = h.path
    name = parse_split_name(path.name)
    if name is None and path.is_symlink():  # the others lie where it leads
        path = path.resolve()
        name = parse_split_name(path.name)
    if name is None or name.parts != count:
        raise ModelFileError(
            f"a part of a model split in {count}, but its name does not end in "
            f"-00001-of-{count:05}.gguf: give the parts their original names",
            path=h.path,
        )
    paths = [path.with_name(part) for part in name.all_names()]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ModelFileError(
            f"{len(missing)} of {count} parts of this model are missing: "
            f"{', '.join(missing[:5])}{more}. Download them into the same directory",
            path=h.path,
        )
    return paths


def _split_key(h: Header, name: str, default: int) -> int:
    value = h.metadata.get(f"split.{name}", default)
    if type(value) is not int or value < 0:
        raise ModelFileError(
            f"metadata key 'split.{name}' is {str(value)[:40]}, expected a count", path=h.path
        )
    return value


def all_headers(h: Header, read_header: Callable[[Path], Header]) -> list[Header]:
    """The headers of all parts of the model that `h` is a part of, in order.

    Raises:
        ModelFileError: a part is missing, has another name, or belongs to another model.
    """
    count = _split_key(h, "count", 0)
    if count <= 1:
        return [h]
    headers = []
    for i, path in enumerate(_part_paths(h, count)):
        part = h if path == h.path else read_header(path)
        no, its_count = _split_key(part, "no", 0), _split_key(part, "count", 0)
        if (no, its_count) != (i, count):
            raise ModelFileError(
                f"its name says part {i + 1} of {count}, its metadata part {no + 1} of "
                f"{its_count}: a renamed file, or parts of different models",
                path=path,
            )
        headers.append(part)
    found = sum(len(part.tensors) for part in headers)
    expected = _split_key(headers[0], "tensors.count", found)
    if found != expected:
        raise ModelFileError(
            f"the parts hold {found} tensors, split.tensors.count says {expected}: parts of "
            "different models, or corrupt; download them again",
            path=headers[0].path,
        )
    return headers
