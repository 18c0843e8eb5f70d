"""Megatron's torch_dist checkpoints, tensor by tensor: read through memory maps, written through torch's own writer.

The format is torch's distributed checkpoint (DCP): .metadata says which tensors there are, of which chunks they consist, and
where in the *.distcp files each chunk lies, as an archive that torch.save wrote. Nothing here holds more than one chunk.
"""

from __future__ import annotations

import math
import mmap
import operator
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
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

from megatron_cpt.checkpoint.archives import check_record, records_of
from megatron_cpt.checkpoint.restricted import describe_tensor, load_metadata
from megatron_cpt.errors import InputError


@dataclass(frozen=True)
class Region:
    """A box of a tensor in a checkpoint."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
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

    Every archive's checksum is compared when it is first read. Nothing is unpickled but descriptions of tensors.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        path = os.path.join(folder, ".metadata")
        metadata = load_metadata(path)
        if not isinstance(metadata, Metadata):
            raise InputError(f"{path} holds a {type(metadata).__name__}; wanted torch's Metadata")
        try:
            self._tensors = dict(_described_tensors(metadata))
            self._places = dict(_described_places(metadata))
        except (AttributeError, TypeError, ValueError) as error:  # a record may lack any field, or have another in it
            raise InputError(f"{path} is damaged: {error}") from error
        self._files: dict[str, mmap.mmap] = {}
        self._read: dict[tuple[str, int], torch.Tensor] = {}

    def keys(self) -> list[str]:
        """Of all tensors, optimizer states among them."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """As it was saved."""
        return self._tensors[key].properties.dtype

    def objects(self) -> Iterator[tuple[str, bytes]]:
        """(key, what torch.save made of it) of everything that is no tensor.

        Raises:
            InputError: a file is missing, or ends too early
        """
        for (key, offset), place in self._places.items():
            if key not in self._tensors and not offset:
                content = self._content(place.relative_path)
                if place.offset + place.length > len(content):
                    path = os.path.join(self.folder, place.relative_path)
                    raise InputError(
                        f"{path} ends at byte {len(content)}; {key} should end at {place.offset + place.length}"
                    )
                yield key, content[place.offset : place.offset + place.length]

    def read(self, region: Region) -> torch.Tensor:
        """The numbers of a region; where it is one contiguous part of a chunk, the mapped file itself: do not write to it.

        Raises:
            InputError: the file is damaged or lacks a part of the region
        """
        result: torch.Tensor | None = None
        found = 0
        for chunk in self._tensors[region.key].chunks:
            begin = [max(a, b) for a, b in zip(region.offset, chunk.offsets, strict=True)]
            ends = zip(region.offset, region.shape, chunk.offsets, chunk.sizes, strict=True)
            shape = [min(a + n, b + m) - start for start, (a, n, b, m) in zip(begin, ends, strict=True)]
            if min(shape, default=1) <= 0:
                continue
            part = self._chunk(region.key, tuple(chunk.offsets), tuple(chunk.sizes))
            for dim, (start, length) in enumerate(zip(begin, shape, strict=True)):
                part = part.narrow(dim, start - chunk.offsets[dim], length)
            if tuple(shape) == region.shape:
                return part
            if result is None:
                result = torch.empty(region.shape, dtype=self.dtype(region.key))
            target = result
            for dim, (start, length) in enumerate(zip(begin, shape, strict=True)):
                target = target.narrow(dim, start - region.offset[dim], length)
            target.copy_(part)
            found += math.prod(shape)
        if result is None or found != math.prod(region.shape):
            raise InputError(f"{self.folder}: tensor {region.key} is not complete; the checkpoint lacks a part of it")
        return result

    def _chunk(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        place = self._places.get((key, offset)) or (self._places.get((key, ())) if not any(offset) else None)
        if place is None:
            raise InputError(f"{self.folder}/.metadata does not say where tensor {key} lies")
        where = (place.relative_path, place.offset)
        if where not in self._read:
            try:
                tensor = self._map(*where, place.length)
            except (zipfile.BadZipFile, struct.error, pickle.UnpicklingError, KeyError) as error:
                path = os.path.join(self.folder, place.relative_path)
                raise InputError(f"{path} is damaged at byte {place.offset}, in tensor {key}: {error}") from error
            if tuple(tensor.shape) != shape or tensor.dtype != self.dtype(key):
                found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{self.dtype(key)} {list(shape)}"
                raise InputError(f"{self.folder}: a part of tensor {key} is {found}, .metadata says {wanted}")
            self._read[where] = tensor
        return self._read[where]

    def _map(self, name: str, offset: int, length: int) -> torch.Tensor:
        """The tensor in the archive at this place."""
        content = self._content(name)
        if offset + length > len(content):
            raise zipfile.BadZipFile(f"the file ends at byte {len(content)}, a tensor should end at {offset + length}")
        records = records_of(content, offset, length)
        (pickled,) = (record for record in records if record.endswith("/data.pkl"))
        described = describe_tensor(content[records[pickled].begin : records[pickled].end])
        numbers = f"{pickled.removesuffix('data.pkl')}data/{described.key}"
        record = records[numbers]
        check_record(content, numbers, record)
        count, elements = (record.end - record.begin) // described.dtype.itemsize, math.prod(described.shape)
        last = described.offset + sum((n - 1) * step for n, step in zip(described.shape, described.stride, strict=True))
        if elements and last >= count:
            raise zipfile.BadZipFile(f"{numbers} has {count} numbers, the tensor {elements}")
        if not elements:
            return torch.empty(described.shape, dtype=described.dtype)
        flat = torch.frombuffer(content, dtype=described.dtype, count=count, offset=record.begin)
        return flat.as_strided(described.shape, described.stride, described.offset)

    def _content(self, name: str) -> mmap.mmap:
        if name not in self._files:
            path = os.path.join(self.folder, name)
            if os.path.dirname(name):
                raise InputError(f"{self.folder}/.metadata names the file {name}; wanted one in the folder itself")
            try:
                with open(path, "rb") as file:
                    # torch wants memory that it may write to; as long as nobody does, no page of it is copied.
                    self._files[name] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return self._files[name]


def _described_tensors(metadata: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    """(key, entry) of the tensors, with the types that their fields should have."""
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = [ChunkStorageMetadata(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks]
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"the dtype of {key} is {entry.properties.dtype!r}")
            size = _sizes(entry.size)
            if any(not len(size) == len(chunk.offsets) == len(chunk.sizes) for chunk in chunks):
                raise ValueError(f"the chunks of {key} have another number of dimensions than the tensor")
            yield str(key), TensorStorageMetadata(TensorProperties(dtype=entry.properties.dtype), size, chunks)


def _described_places(metadata: Metadata) -> Iterator[tuple[tuple[str, tuple[int, ...]], _StorageInfo]]:
    """((key, offset), place in the files) of every chunk and object."""
    for index, place in (metadata.storage_data or {}).items():
        if place.offset < 0 or place.length < 0:
            raise ValueError(f"{index.fqn} lies at byte {place.offset}, {place.length} bytes long")
        where = _StorageInfo(str(place.relative_path), operator.index(place.offset), operator.index(place.length))
        yield (str(index.fqn), tuple(_sizes(index.offset or ()))), where


def _sizes(numbers: Sequence[int]) -> torch.Size:
    return torch.Size([operator.index(number) for number in numbers])


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


def plan_of(chunks: Sequence[Chunk], extra_states: Sequence[str] = ()) -> SavePlan:
    """What one .distcp file holds; `extra_states` are keys of empty extra states, which megatron-core expects to find."""
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_states]
    for chunk in chunks:
        place = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
        data = TensorWriteData(place, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.size))
        items.append(WriteItem(chunk.index(), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


def metadata_of(chunks: Sequence[Chunk], extra_states: Sequence[str] = ()) -> Metadata:
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
) -> list[WriteResult]:
    """Write file `number` of a checkpoint, one chunk in memory at a time, and force it to disk.

    `make(key, offset)` gives a chunk's tensor; `written` is told the bytes of each.
    """
    # Where it sees a GPU, torch would copy ahead on a stream of it; this process is forked and must not touch it
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_global_plan(list(plans))[number]
    return writer.write_data(plan, _Planner(make, written)).wait()


def write_metadata(folder: str, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
    """Write .metadata: the checkpoint can be read from then on."""
    _Writer(folder, single_file_per_rank=True, sync_files=True).finish(metadata, [list(part) for part in results])


def distcp_name(number: int) -> str:
    """Of the file that `write_distcp` writes."""
    return f"__{number}_0.distcp"


def split(chunks: Sequence[Chunk], most: int) -> Iterator[list[Chunk]]:
    """The chunks of each file, in order: files of at most `most` bytes, or of one chunk."""
    file: list[Chunk] = []
    for chunk in chunks:
        if file and sum(other.bytes for other in file) + chunk.bytes > most:
            yield file
            file = []
        file.append(chunk)
    if file:
        yield file
