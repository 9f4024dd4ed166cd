"""What a kernel of ours computes of a network, before it has addresses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import onnx

from headrace.kernels.finishes import INFINITE, NONE, Finish
from headrace.kernels.geometry import Geometry
from headrace.kernels.requantise import pixel_bytes
from headrace.loaders.model_file import TensorInfo
from headrace.networks.graph import CHUNK_BYTES, Graph

# Of a value: addresses and sizes fit into 64 bits in any case, and what each channel has (a bias)
# is small beside memory.
MOST_ELEMENTS, MOST_CHANNELS = 1 << 40, 1 << 24
PADDED = 16  # channels of a pixel are a multiple
BYTES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
Slots = Callable[["Operation", "Addresses"], list[Any]]
NOTHING = Finish(NONE)
# Not kernels: `passes.in_place` makes places of them, or copies. PART has some channels of what it
# reads, JOINED the channels of all, one behind the other.
PART, JOINED = "part", "joined"


@dataclass(frozen=True)
class Addresses:
    """Where what an argument block names lies.

    Attributes:
        values: by their names in the graph.
        own: what the operation has for itself, by the names in its `weights`, and `scratch`: files
            may call values the same.
    """

    values: Mapping[str, int]
    own: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        """Of a value."""
        return self.values[name]

    def having(self, name: str, address: int) -> Addresses:
        """The same, but for one of the operation's own."""
        return replace(self, own={**self.own, name: address})


@dataclass(frozen=True, slots=True)
class Image:
    """How a value of ours lies: pixel by pixel, channels innermost and padded.

    A matrix [rows, columns], or a batch of them, has rows of one pixel. Values are float32, or
    bytes (`item` 1), of which see `headrace.kernels.requantise`.
    """

    images: int
    height: int
    width: int
    channels: int
    item: int = 4

    @property
    def padded(self) -> int:
        """Channels with their pad."""
        return -(-self.channels // PADDED) * PADDED

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.height * self.width

    @property
    def pixel_bytes(self) -> int:
        """Between pixels."""
        return self.padded * 4 if self.item == 4 else pixel_bytes(self.channels)

    @property
    def n_bytes(self) -> int:
        """Of all."""
        return self.images * self.pixels * self.pixel_bytes

    @property
    def as_in_onnx(self) -> bool:
        """Whether it lies as ONNX has it."""
        return self.item == 4 and self.channels == self.padded and self.pixels == 1


@dataclass(frozen=True, slots=True)
class Planes:
    """Pixels of images that lie as in ONNX, channel by channel: all of them, or some.

    Attributes:
        whole: the images.
        rows, columns: the first one, and the one behind the last.
    """

    whole: Image
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def image(self) -> Image:
        """Of these pixels alone."""
        height, width = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        return replace(self.whole, height=height, width=width)

    @property
    def begin(self) -> int:
        """Bytes in front of the first one."""
        return self.whole.item * (self.rows[0] * self.whole.width + self.columns[0])

    @property
    def steps(self) -> tuple[int, int]:
        """Bytes between rows, and between planes."""
        return self.whole.item * self.whole.width, self.whole.item * self.whole.pixels

    def slots(self) -> list[int]:
        """Of an argument block (`headrace.kernels.images`)."""
        of = self.image
        if of == self.whole:
            return [of.images, of.channels, 1, of.pixels, *self.steps]
        return [of.images, of.channels, of.height, of.width, *self.steps]


def all_planes(image: Image) -> Planes:
    """All of its pixels."""
    return Planes(image, (0, image.height), (0, image.width))


def pixelwise(image: Image) -> Geometry:
    """Of what makes each pixel out of the one in the same place."""
    sizes = (image.height, image.width)
    return Geometry(image.images, sizes, sizes, (1, 1))


class Windows(NamedTuple):
    """How an operation makes some pixels of its result out of those that they need.

    Attributes:
        geometry: of whole images; the same for all that it reads. What it adds lies as its results.
        slots: the argument block for another geometry, whose images hold nothing but these pixels.
    """

    geometry: Geometry
    slots: Callable[[Geometry], Slots]


def image_of(graph: Graph, name: str) -> Image | None:
    """How a value would lie; None: it is no float32 of 2 to 4 known dimensions, or empty."""
    return _image(graph, name, (onnx.TensorProto.FLOAT,), 4)


def bytes_of(graph: Graph, name: str) -> Image | None:
    """How a value of uint8 or int8 would lie; None: it is none, or has another number of axes."""
    return _image(graph, name, BYTES, 1)


def _image(graph: Graph, name: str, types: tuple[int, ...], item: int) -> Image | None:
    of = graph.types.get(name)
    if of is None or of.shape is None or of.elem_type not in types:
        return None
    if len(of.shape) not in (2, 3, 4) or not 0 < math.prod(of.shape) <= MOST_ELEMENTS:
        return None
    images, channels, height, width = (*of.shape, 1, 1)[:4]
    found = Image(images, height, width, channels, item)
    if len(of.shape) == 3 and name in graph.channels_first:
        found = Image(of.shape[0], 1, of.shape[2], of.shape[1], item)
    elif len(of.shape) == 3 or name in graph.as_rows:
        found = Image(math.prod(of.shape[:-1]), 1, 1, of.shape[-1], item)
    return found if found.channels <= MOST_CHANNELS else None


def channel_axis(graph: Graph, name: str) -> int:
    """The dimension of a value of known shape that its channels are."""
    rank = len(graph.shape(name) or ())
    if name in graph.channels_first or (rank == 4 and name not in graph.as_rows):
        return 1
    return rank - 1


def in_rows(graph: Graph, name: str) -> bool:
    """Whether the channels of a value are its last dimension, or it is none of images."""
    return len(graph.shape(name) or ()) in (2, 3) or name in graph.as_rows


@dataclass(frozen=True)
class Weight:
    """What an operation has for itself, made when it is wanted.

    Attributes:
        n_bytes: of the array.
        make: gives the array.
        key: what tells it from others of all plans of a network, which share those with the same
            one; None: it is this plan's own.
        runs: gives it in parts, in any order, each with the byte that it begins at; None: it is
            made whole.
        place: where a file has these very bytes; None: nowhere.
        making: bytes that `make` takes, if not four times the array's.
        planned_by: whether every plan looks at all of it, which takes as much.
    """

    n_bytes: int
    make: Callable[[], np.ndarray]
    key: Any = None
    runs: Callable[[], Iterator[tuple[int, np.ndarray]]] | None = None
    place: TensorInfo | None = None
    making: int | None = None
    planned_by: bool = False

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """All of it, each part with the byte that it begins at."""
        if self.runs is None:
            yield 0, self.make()
        else:
            yield from self.runs()

    @property
    def making_bytes(self) -> int:
        """What `parts` takes."""
        if self.runs is not None:
            return 4 * min(CHUNK_BYTES, self.n_bytes)
        return 4 * self.n_bytes if self.making is None else self.making


class Cut(NamedTuple):
    """How a product is cut into calls that each take some of its tiles of 16 outputs.

    Attributes:
        tiles: of all; those of `weights["weights"]` lie one behind the other, all of one size.
        part: the argument block for some of them, out of the whole one, the number of the first
            and how many there are. Slot 0 is the address of the weights of these.
        together: tiles that the kernel takes at a time: parts begin at multiples.
        begins: bytes to each tile's weights, and to their end, where tiles are not of one size.
            Then the address is not that of these weights, but of what would be in front of them.
    """

    tiles: int
    part: Callable[[list[Any], int, int], list[Any]]
    together: int = 4
    begins: Sequence[int] = ()

    def address(self, at: int, first: int) -> int:
        """What the kernel gets of weights of tiles from `first` on that lie at `at`."""
        return at - self.begins[first] if self.begins else at


def tile_begins(entries: Sequence[int], n_bytes: int) -> list[int]:
    """`Cut.begins` of tiles with so many entries of `n_bytes`."""
    return [n_bytes * n for n in itertools.accumulate(entries, initial=0)]


class Table(NamedTuple):
    """Rows of constants that an operation takes as ids say.

    Attributes:
        weight: its name.
        ids: the value that chooses, as it lies in ONNX.
        entries, row_bytes: rows, and what each has.
        rows: how many are taken.
    """

    weight: str
    ids: str
    entries: int
    row_bytes: int
    rows: int


class Sparse(NamedTuple):
    """Of a product that leaves out zeros: their share of the weights, and blocks, as "4x1"."""

    zeros: float
    blocks: str


@dataclass
class Operation:
    """One kernel call.

    Attributes:
        kernel: its row in the kernel table.
        reads, makes: values.
        plain: values that it wants as they lie in ONNX, whatever their type.
        weights: what it has for itself, by name.
        bounds: least and largest that the elements of an input may be.
        scratch: bytes that each thread needs while it runs; at `at.own["scratch"]`.
        slots: gives the argument block out of the address of each value and weight.
        nodes: what it computes of the file's graph.
        least, most: between which its results are clamped.
        adds: what is added to the result first; None: nothing.
        macs: multiply-adds.
        sparse: if it leaves out weights that are zero.
        at_border: kernel and slots that take what is read, or give what is made, as it lies outside
            of a region.
        planes: the pixels of what it wants as it lies in ONNX; None: it decides itself.
        windows: how it makes some pixels only; None: it cannot.
        affine: factors and summands of channels that come before `finish` (`images_map` only).
        finish: activation before bounds and, if `late`, before what is added.
        late: see `headrace.kernels.ending.Ending`.
        spreads: whether neighbours of what it makes are made apart, so that nothing can be added.
        image: how its result lies, where the graph does not know that value.
        channel: the first one that it reads (PART only).
        source: what could do at its end what is to be done to the result of this one, and how
            factors of channels lie there; None: nothing could.
        geometry: of a convolution whose borders may be made before it, and the channels that it
            reads; None: of any other.
        also: operations of the node's other outputs.
        steps: bytes between pixels of values that are parts of others; others are dense.
        cut: how it computes some tiles only; None: all at once.
        table: the weight whose rows ids choose; None: it has none.
    """

    kernel: str
    reads: list[str]
    makes: str
    slots: Slots
    nodes: list[Any]
    weights: dict[str, np.ndarray | Weight] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    scratch: int = 0
    least: float = -INFINITE
    most: float = INFINITE
    adds: str | None = None
    macs: int = 0
    sparse: Sparse | None = None
    at_border: tuple[str, Callable[[Planes], Slots]] | None = None
    planes: Planes | None = None
    windows: Windows | None = None
    affine: tuple[np.ndarray, np.ndarray] | None = None
    finish: Finish = NOTHING
    late: bool = False
    spreads: bool = False
    image: Image | None = None
    channel: int = 0
    source: tuple[Operation, Callable[[np.ndarray], np.ndarray]] | None = None
    geometry: tuple[Geometry, int] | None = None
    also: list[Operation] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    cut: Cut | None = None
    table: Table | None = None

    def step(self, name: str, image: Image) -> int:
        """Bytes between pixels of a value."""
        return self.steps.get(name, image.pixel_bytes)

    @property
    def inputs(self) -> list[str]:
        """All values that it needs."""
        return [*self.reads, *([self.adds] if self.adds is not None else ())]

    @property
    def clamps(self) -> bool:
        """Whether it bounds its results."""
        return self.least > -INFINITE or self.most < INFINITE
