"""Megatron's torch_dist checkpoints, tensor by tensor: read through memory maps, written through torch's own writer.

The format is torch's distributed checkpoint (DCP): .metadata says which tensors there are, of which chunks they consist, and
where in the *.distcp files each chunk lies, as an archive that torch.save wrote. Nothing here holds more than one chunk.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.checkpoint_pickles import (
    DAMAGE,
    ChunkPlace,
    StoredChunk,
    StoredTensor,
    load_metadata,
    read_object,
    read_tensor,
)
from megatron_cpt.checkpoint.zip_reader import Content, open_mapped
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class Region:
    """A box of a tensor in a checkpoint."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorChunk:
    """A part of a tensor that is written as one; `size` is the shape of the whole."""

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def index(self) -> MetadataIndex:
        """Its name in .metadata."""
        return MetadataIndex(self.key, torch.Size(self.offset))


class TorchDistReader:
    """The tensors of a torch_dist checkpoint, in mapped files; numbers are copied where a region has to be put together.

    Every archive's checksum is compared when it is first read. Nothing is unpickled by anything but `safe_pickle`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._description = load_metadata(os.path.join(folder, ".metadata"))
        self._files: dict[str, Content] = {}
        self._read: dict[ChunkPlace, torch.Tensor] = {}

    def keys(self) -> list[str]:
        """Keys of all tensors, optimizer states among them."""
        return list(self._description.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._tensor(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor as it was saved."""
        return self._tensor(key).dtype

    def object(self, key: str) -> Any:
        """What is stored under a key that is no tensor's: numbers, texts and tensors, in lists and dictionaries.

        Raises:
            InputError: it is missing, damaged, or holds something else
        """
        place = self._description.places.get((key, ())) if key in self._description.objects else None
        if place is None:
            raise InputError(f"{self.folder}/.metadata does not say where {key} lies")
        with self._damage(place, key):
            return read_object(self._content(place.file), place.offset, place.length)

    def read(self, region: Region) -> torch.Tensor:
        """The numbers of a region; where it is one contiguous part of a chunk, the mapped file itself: do not write to it.

        Raises:
            InputError: the file is damaged or lacks a part of the region
        """
        boxes = self._boxes(region)
        if len(boxes) == 1:
            return self._part(region.key, *boxes[0])
        result = torch.empty(region.shape, dtype=self.dtype(region.key))
        self._copy(region, boxes, result)
        return result

    def read_into(self, region: Region, target: torch.Tensor) -> None:
        """Copy the numbers of a region into a tensor of its shape, converted to its dtype.

        Raises:
            InputError: as `read`
        """
        self._copy(region, self._boxes(region), target)

    def _copy(self, region: Region, boxes: Sequence[tuple[StoredChunk, Box]], target: torch.Tensor) -> None:
        for chunk, (begin, shape) in boxes:
            part = target
            for dim, (start, length) in enumerate(zip(begin, shape, strict=True)):
                part = part.narrow(dim, start - region.offset[dim], length)
            part.copy_(self._part(region.key, chunk, (begin, shape)))

    def _boxes(self, region: Region) -> list[tuple[StoredChunk, Box]]:
        """The chunks that a region lies in, and which part of it each holds."""
        wanted = (region.offset, region.shape)
        all_boxes = [(chunk, intersection((chunk.offset, chunk.shape), wanted)) for chunk in self._tensor(region.key).chunks]
        boxes = [(chunk, box) for chunk, box in all_boxes if min(box[1], default=1) > 0]
        if not boxes or sum(math.prod(shape) for _, (_, shape) in boxes) != math.prod(region.shape):
            raise InputError(f"{self.folder}: tensor {region.key} is not complete; the checkpoint lacks a part of it")
        if not tiles([box for _, box in boxes], wanted):  # one part twice would make up for another that is missing
            raise InputError(f"{self.folder}: two parts of tensor {region.key} overlap")
        for chunk, _ in boxes:
            self._check_place(region.key, chunk)
        return boxes

    def _part(self, key: str, chunk: StoredChunk, box: Box) -> torch.Tensor:
        part = self._chunk(key, chunk)
        for dim, (start, length) in enumerate(zip(*box, strict=True)):
            part = part.narrow(dim, start - chunk.offset[dim], length)
        return part

    def _tensor(self, key: str) -> StoredTensor:
        if key not in self._description.tensors:
            raise InputError(f"{self.folder}: tensor {key} is missing")
        return self._description.tensors[key]

    def _chunk(self, key: str, chunk: StoredChunk) -> torch.Tensor:
        place = self._place(key, chunk)
        if place not in self._read:
            with self._damage(place, f"tensor {key}"):
                self._read[place] = read_tensor(self._content(place.file), place.offset, place.length)
        tensor = self._read[place]
        if tuple(tensor.shape) != chunk.shape or tensor.dtype != self.dtype(key):
            found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{self.dtype(key)} {list(chunk.shape)}"
            raise InputError(f"{self.folder}: a part of tensor {key} is {found}, .metadata says {expected}")
        return tensor

    def _place(self, key: str, chunk: StoredChunk) -> ChunkPlace:
        places = self._description.places
        place = places.get((key, chunk.offset)) or (places.get((key, ())) if not any(chunk.offset) else None)
        if place is None:
            raise InputError(f"{self.folder}/.metadata does not say where tensor {key} lies")
        return place

    def _check_place(self, key: str, chunk: StoredChunk) -> None:
        """InputError where the file is too short for a chunk: asked before there is memory for what it is a part of."""
        place, size = self._place(key, chunk), math.prod(chunk.shape) * self.dtype(key).itemsize
        with self._damage(place, f"tensor {key}"):
            end, file_end = place.offset + place.length, len(self._content(place.file))
            if end > file_end:
                raise zipfile.BadZipFile(f"the file ends at byte {file_end}, a part of it should end at {end}")
            if size > place.length:
                raise zipfile.BadZipFile(f"a part of it has {size} bytes; its place has {place.length}")

    @contextlib.contextmanager
    def _damage(self, place: ChunkPlace, what: str) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            path = os.path.join(self.folder, place.file)
            raise InputError(f"{path} is damaged at byte {place.offset}, in {what}: {error}") from error

    def _content(self, name: str) -> Content:
        if name not in self._files:
            self._files[name] = open_mapped(os.path.join(self.folder, name))
        return self._files[name]


Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, and its shape
# Key, offset (None: no tensor), file, and where in it the item begins and how long it is: what JSON can hold
WrittenItem = tuple[str, list[int] | None, str, int, int]


def intersection(a: Box, b: Box) -> Box:
    """What two boxes of a tensor have in common; a length of 0 or less says nothing."""
    begin = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    ends = zip(a[0], a[1], b[0], b[1], strict=True)
    return begin, tuple(min(x + n, y + m) - start for start, (x, n, y, m) in zip(begin, ends, strict=True))


def tiles(boxes: Iterable[Box], whole: Box) -> bool:
    """Whether boxes fill another exactly, without a gap and without an overlap.

    Boxes are the same set of points, counted as often, if their corners are the same with signs: + where an even number of
    the coordinates are ends, - where it is odd (each box is a product of differences of steps, which are independent).
    """
    corners: dict[tuple[int, ...], int] = {}
    for sign, (begin, shape) in itertools.chain([(-1, whole)], ((1, box) for box in boxes)):
        ends = [((start, 1), (start + length, -1)) for start, length in zip(begin, shape, strict=True)]
        for corner in itertools.product(*ends):
            at = tuple(place for place, _ in corner)
            corners[at] = corners.get(at, 0) + sign * math.prod(factor for _, factor in corner)
    return not any(corners.values())


class _Planner(DefaultSavePlanner):
    """Makes each chunk when the writer asks for it."""

    def __init__(self, make: Callable[[str, tuple[int, ...]], torch.Tensor], written: Callable[[int], None]) -> None:
        super().__init__()
        self._make, self._written = make, written

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The tensor, or the bytes, of an item."""
        if write_item.type == WriteItemType.BYTE_IO:
            return self.transform_object(write_item, [None])  # megatron-core's "no extra state"
        assert write_item.index.offset is not None
        tensor = self._make(write_item.index.fqn, tuple(write_item.index.offset))
        self._written(tensor.numel() * tensor.element_size())
        return tensor


class _Writer(FileSystemWriter):
    """torch's writer, without the random number that it gives every checkpoint: the same input gives the same bytes."""

    def storage_meta(self) -> StorageMeta:
        """Nothing."""
        return StorageMeta()


def plan_of(chunks: Sequence[TensorChunk], extra_states: Sequence[str] = ()) -> SavePlan:
    """What one .distcp file holds; `extra_states` are keys of empty extra states, which megatron-core expects to find."""
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_states]
    for chunk in chunks:
        place = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
        data = TensorWriteData(place, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.size))
        items.append(WriteItem(chunk.index(), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


def metadata_of(chunks: Sequence[TensorChunk], extra_states: Sequence[str] = ()) -> Metadata:
    """.metadata of a checkpoint of these chunks, without the places."""
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in extra_states}
    for chunk in chunks:
        entry = entries.setdefault(
            chunk.key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.size), [])
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
    return Metadata(entries)


def write_distcp(
    folder: str,
    plans: Sequence[SavePlan],
    number: int,
    make: Callable[[str, tuple[int, ...]], torch.Tensor],
    written: Callable[[int], None],
) -> list[WrittenItem]:
    """Write file `number` of a checkpoint, one chunk in memory at a time, and force it to disk.

    `make(key, offset)` gives a chunk's tensor; `written` is told the bytes of each.
    """
    # Where it sees a GPU, torch would copy ahead on a stream of it; this process is forked and must not touch it
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_global_plan(list(plans))[number]
    results: list[WriteResult] = writer.write_data(plan, _Planner(make, written)).wait()
    return [_written(result) for result in results]


def _written(result: WriteResult) -> WrittenItem:
    index, place = result.index, result.storage_data
    return index.fqn, None if index.offset is None else list(index.offset), place.relative_path, place.offset, place.length


def write_metadata(folder: str, metadata: Metadata, results: Sequence[Sequence[WrittenItem]]) -> None:
    """Write .metadata: the checkpoint can be read from then on."""
    made = [
        WriteResult(MetadataIndex(key, offset), length, _StorageInfo(file, begin, length))
        for key, offset, file, begin, length in itertools.chain.from_iterable(results)
    ]
    _Writer(folder, single_file_per_rank=True, sync_files=True).finish(metadata, [made])


def distcp_name(number: int) -> str:
    """Of the file that `write_distcp` writes."""
    return f"__{number}_0.distcp"


def split(chunks: Sequence[TensorChunk], most: int) -> Iterator[list[TensorChunk]]:
    """The chunks of each file, in order: files of at most `most` bytes, or of one chunk."""
    file: list[TensorChunk] = []
    for chunk in chunks:
        if file and sum(other.bytes for other in file) + chunk.bytes > most:
            yield file
            file = []
        file.append(chunk)
    if file:
        yield file
