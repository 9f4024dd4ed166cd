"""Values that are some channels of others lie there; what cannot is copied.

A concatenation is a place for its inputs, into which their makers write; a part of a value is read
where it lies. That takes channels that begin at a multiple of 16, and kernels that are told how far
pixels are apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.networks.operation import JOINED, PADDED, PART, Addresses, Image, Operation

# Kernels that are told how far pixels are apart, of what they read and of what they make.
_STRIDED = (
    "convolution_f32", "depthwise_f32", "images_map", "images_combine", "images_pool",
    "images_resize", "images_copy", "images_take", "images_border", "images_softmax_mean",
    "images_moments", "images_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a value lies in another: so many bytes behind its begin."""

    root: str
    n_bytes: int


class _Layout:
    def __init__(
        self, operations: Sequence[Operation], images: dict[str, Image], fixed: Collection[str]
    ) -> None:
        self.images = images
        self.at: dict[str, tuple[str, int]] = {}  # (value that it lies in, channel)
        free = {*_STRIDED, JOINED, PART}
        self._rigid = set(fixed)
        for one in operations:
            if one.kernel not in free or one.spreads:
                self._rigid.update((one.makes,))
            if one.kernel not in free:
                self._rigid.update(one.inputs)

    def root(self, name: str) -> tuple[str, int]:
        """The value in whose memory it lies, and its first channel there."""
        channel = 0
        while name in self.at:
            name, more = self.at[name]
            channel += more
        return name, channel

    def place_part(self, one: Operation) -> bool:
        """Read a part where it lies."""
        if one.channel % PADDED or one.makes in self._rigid:
            return False
        self.at[one.makes] = one.reads[0], one.channel
        # Whoever reads the part is told, whatever the whole is.
        return True

    def place_member(self, whole: str, name: str, channel: int, members: Mapping[Any, str]) -> bool:
        """Let a value lie in another from a channel on."""
        root, inner = self.root(name)
        if root == whole:
            return inner == channel
        begin = channel - inner
        one, into = self.images[root], self.images[whole]
        views = [root, *(v for v in self.at if self.root(v)[0] == root)]
        if begin % PADDED or begin < 0 or begin + one.padded > into.padded:
            return False
        if any(v in self._rigid for v in views):
            return False
        covered = sum(
            self.images[other].channels
            for at, other in members.items()
            if self.root(other) == (root, at - begin)
        )
        if covered < one.channels:
            return False
        self.at[root] = whole, begin
        return True


def in_place(
    operations: Sequence[Operation], images: dict[str, Image], fixed: Collection[str]
) -> tuple[list[Operation], dict[str, Place]]:
    """Operations without PART and JOINED, and the places of values that lie in others.

    Args:
        images: of all values; those of copies are added.
        fixed: values that lie where they lie.
    """
    layout = _Layout(operations, images, fixed)
    found: list[Operation] = []
    for one in operations:
        if one.kernel == PART:
            if not layout.place_part(one):
                found.append(_copy(images, one.reads[0], one.makes, one.channel))
        elif one.kernel == JOINED:
            members, channel = {}, 0
            for name in one.reads:
                members[channel] = name
                channel += images[name].channels
            for channel, name in members.items():
                if channel % PADDED or not layout.place_member(one.makes, name, channel, members):
                    copied = f"{one.makes}/headrace/channel {channel}"
                    images[copied] = images[name]
                    layout.at[copied] = one.makes, channel
                    found.append(_copy(images, name, copied, 0))
        else:
            found.append(one)
    places = {}
    for name in layout.at:
        root, channel = layout.root(name)
        places[name] = Place(root, channel * 4)
    for one in found:
        for name in (*one.inputs, one.makes):
            if name in places:
                one.steps[name] = images[places[name].root].pixel_bytes
    return found, places


def _copy(images: dict[str, Image], x: str, made: str, channel: int) -> Operation:
    read, of = images[x], images[made]

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[x] + channel * 4, at[made], of.images * of.pixels, of.channels, one.step(x, read),
            one.step(made, of),
        ]  # fmt: skip

    return Operation("images_copy", [x], made, slots, [])
