"""What is pickled in checkpoints: .metadata, common.pt and the objects beside the tensors, read without running any of it.

`safe_pickle` makes plain values and records of a pickle. Here it is said which names a checkpoint may hold and what they
mean. Every number and text is checked before it is used: what is checked is what is loaded, since there is no other reader.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.checkpoint.safe_pickle import (
    Maker,
    Name,
    Pair,
    PickleError,
    PickleRecord,
    PickleReference,
    is_key,
    plain_copy,
    read_pickle,
    shown_value,
)
from megatron_cpt.checkpoint.zip_reader import Content, ZipPart, check_record, open_mapped, records_of
from megatron_cpt.utils.errors import InputError

MOST_METADATA_BYTES = 1 << 30
MOST_NUMBERS = 1 << 50  # of a tensor
MOST_DIMENSIONS = 8
MOST_COPIES = 4  # bytes of an archive's tensors, as a multiple of its own: several may be views of one memory
DAMAGE = (zipfile.BadZipFile, PickleError)  # what reading a damaged archive raises
PICKLE = "data.pkl"

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES_OF_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Of tensors that other software saves, and nobody reads here
OTHER_DTYPES = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64", "complex128")
VALUES: dict[Pair, Any] = {("torch", name): getattr(torch, name) for name in (*DTYPES, *OTHER_DTYPES)} | {
    ("torch", name): dtype for name, dtype in DTYPES_OF_STORAGES.items()
}

CHECKPOINT, SHARDED = "torch.distributed.checkpoint", "torch.distributed._shard.sharded_tensor.metadata"
METADATA = (f"{CHECKPOINT}.metadata", "Metadata")
INDEX = (f"{CHECKPOINT}.metadata", "MetadataIndex")
PLACE = (f"{CHECKPOINT}.filesystem", "_StorageInfo")
TENSOR = (f"{CHECKPOINT}.metadata", "TensorStorageMetadata")
CHUNK = (f"{CHECKPOINT}.metadata", "ChunkStorageMetadata")
OBJECT = (f"{CHECKPOINT}.metadata", "BytesStorageMetadata")
PROPERTIES = ((f"{CHECKPOINT}.metadata", "TensorProperties"), (SHARDED, "TensorProperties"))
# What else torch and megatron-core put into .metadata: all of it is passed over
PASSED_OVER = (
    (f"{CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (SHARDED, "MEM_FORMAT_ENCODING"),
    (f"{CHECKPOINT}.metadata", "StorageMeta"),
    (f"{CHECKPOINT}.filesystem", "_StoragePrefix"),
    (f"{CHECKPOINT}.planner", "SavePlan"),
    (f"{CHECKPOINT}.planner", "WriteItem"),
    (f"{CHECKPOINT}.planner", "WriteItemType"),
    (f"{CHECKPOINT}.planner", "TensorWriteData"),
    (f"{CHECKPOINT}.planner", "BytesIOWriteData"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
)
METADATA_NAMES = frozenset({METADATA, INDEX, PLACE, TENSOR, CHUNK, OBJECT, *PROPERTIES, *PASSED_OVER})
NAMESPACES = (("argparse", "Namespace"), ("types", "SimpleNamespace"))


@dataclass(frozen=True)
class ChunkPlace:
    """Where something lies: bytes [offset, offset + length) of a file in the checkpoint's folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor that is stored as one."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Description:
    """What .metadata says.

    Attributes:
        tensors: by key
        objects: keys of what is no tensor
        places: by key and offset of the chunk, () for what is no tensor
    """

    tensors: dict[str, StoredTensor]
    objects: frozenset[str]
    places: dict[tuple[str, tuple[int, ...]], ChunkPlace]


@dataclass(frozen=True)
class TensorRecord:
    """How torch.save has stored a tensor: elements from `offset` on of the archive's record data/`key`."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Opaque:
    """Stands for an object of a class that nobody here needs; `kind` is the name of that class."""

    def __init__(self, kind: str = "") -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def load_metadata(path: str) -> Description:
    """What a torch .metadata file describes.

    Raises:
        InputError: it cannot be read, or holds something else than a description of tensors
    """
    content = open_mapped(path)
    try:
        check_pickle_size(len(content))
        return _description(read_pickle(content[:], VALUES, MAKERS, METADATA_NAMES))
    except PickleError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def load_settings(path: str, place: ChunkPlace | None = None) -> dict[str, Any]:
    """The dictionary in a common.pt: its numbers, texts and settings.

    Functions and classes are their names as text; tensors and objects of unknown classes are `Opaque`. `place`: of the
    dictionary in a file that holds other things, too (`find_common_state`).

    Raises:
        InputError: it cannot be read
    """

    def convert(value: Any, copy: Callable[[Any], Any]) -> Any:
        if type(value) is PickleRecord and value.kind.pair in NAMESPACES:
            space = Namespace()
            vars(space).update({name: field for name, field in copy(value.fields()).items() if type(name) is str})
            return space
        return value if type(value) is torch.dtype else str(value) if type(value) is Name else Opaque(shown_value(value))

    return _dictionary(
        path, place, lambda content, offset, length: plain_copy(_Archive(content, offset, length).described(None), convert)
    )


def load_common(path: str, place: ChunkPlace | None = None) -> dict[str, Any]:
    """The dictionary in a common.pt, tensors included, for a run that resumes from it; objects of any class are `Opaque`.

    `place`: see `load_settings`.

    Raises:
        InputError: it cannot be read
    """
    return _dictionary(path, place, lambda content, offset, length: read_object(content, offset, length, None))


def _dictionary(path: str, place: ChunkPlace | None, read: Callable[[Content, int, int], Any]) -> dict[str, Any]:
    """What lies at a place of a file, or is all of it. What is in .metadata lies in a list."""
    content = open_mapped(path)
    offset, length = (0, len(content)) if place is None else (place.offset, place.length)
    try:
        found = read(content, offset, length)
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if place is not None and type(found) is list and len(found) == 1:
        found = found[0]
    if type(found) is not dict:
        raise InputError(f"{path} holds a {type(found).__name__}; expected a dictionary")
    return found


def check_pickle_size(size: int) -> None:
    """PickleError for a pickle that no checkpoint has need of."""
    if size > MOST_METADATA_BYTES:
        raise PickleError(f"it has {size} bytes; expected at most {MOST_METADATA_BYTES}")


def read_tensor(content: Content, offset: int, length: int) -> torch.Tensor:
    """The tensor in the archive at this place of a mapped file: the mapped memory itself.

    Raises:
        zipfile.BadZipFile, PickleError: there is none, or it is damaged
    """
    archive = _Archive(content, offset, length)
    described = archive.described(())
    if type(described) is not TensorRecord:
        raise PickleError(f"it holds a {shown_value(described)}, not a tensor")
    return archive.tensor(described)


def read_object(content: Content, offset: int, length: int, known: Collection[Pair] | None = ()) -> Any:
    """What torch.save made the archive of, its tensors copied.

    Args:
        content: a mapped file
        offset: of the archive in it, in bytes
        length: of the archive, in bytes
        known: names that it may hold beside those of plain values and tensors; None: any. They become `Opaque`

    Raises:
        zipfile.BadZipFile, PickleError: there is none, or it is damaged
    """
    archive = _Archive(content, offset, length)
    copies: dict[TensorRecord, torch.Tensor] = {}
    left = [MOST_COPIES * length]

    def convert(value: Any, _: Callable[[Any], Any]) -> Any:
        if type(value) is TensorRecord:
            if value not in copies:  # one is named as often as a pickle likes
                view = archive.tensor(value)
                left[0] -= view.nbytes
                if left[0] < 0:
                    raise PickleError(f"its tensors have more than {MOST_COPIES} times the bytes of the file")
                copies[value] = view.clone()
            return copies[value]
        return value if type(value) is torch.dtype else Opaque(shown_value(value))

    return plain_copy(archive.described(known), convert)


class PickledTensors:
    """The tensors of a dictionary that torch.save wrote (`pytorch_model.bin`), mapped, and read when asked for.

    Attributes:
        described: dtype and shape of each, by name
    """

    def __init__(self, path: str) -> None:
        """Open a file.

        Raises:
            InputError: it cannot be read, or holds something else than named, dense tensors
        """
        self._path = path
        content = open_mapped(path)
        try:
            self._archive = _Archive(content, 0, len(content))
            found = plain_copy(self._archive.described(()), lambda value, _: value)
        except DAMAGE as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if type(found) is not dict or any(type(n) is not str or type(t) is not TensorRecord for n, t in found.items()):
            raise InputError(f"{path} holds something else than named, dense tensors")
        self.described: dict[str, TensorRecord] = found

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor: the mapped memory itself.

        Raises:
            InputError: it is damaged
        """
        try:
            return self._archive.tensor(self.described[name])
        except DAMAGE as error:
            raise InputError(f"{self._path} is damaged, in tensor {name}: {error}") from error


class _Archive:
    """What torch.save wrote: a pickle, and the memory of the tensors that it names. Each checksum is compared once."""

    def __init__(self, content: Content, offset: int, length: int) -> None:
        self._content = content
        self._records = records_of(content, offset, length)
        pickles = [name for name in self._records if name.endswith("/" + PICKLE)]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} records of the name {PICKLE}; expected 1")
        self._folder = pickles[0].removesuffix(PICKLE)
        self._checked: set[str] = set()

    def described(self, known: Collection[Pair] | None) -> Any:
        """What the pickle says."""
        order = self._records.get(self._folder + "byteorder")
        if order is not None and self._content[order.begin : min(order.end, order.begin + 10)] != b"little":
            raise zipfile.BadZipFile("its numbers are not in little-endian order")
        part = self._record(PICKLE)
        check_pickle_size(part.end - part.begin)
        return read_pickle(self._content[part.begin : part.end], VALUES, MAKERS, known)

    def tensor(self, described: TensorRecord) -> torch.Tensor:
        """A tensor of the pickle: the mapped memory itself."""
        name = f"data/{described.key}"
        part = self._record(name)
        count, elements = (part.end - part.begin) // described.dtype.itemsize, math.prod(described.shape)
        last = described.offset + sum((n - 1) * step for n, step in zip(described.shape, described.stride, strict=True))
        if elements and (last >= count or elements > count):
            raise zipfile.BadZipFile(f"{self._folder}{name} has {count} numbers, the tensor {elements}")
        if not elements:
            return torch.empty(described.shape, dtype=described.dtype)
        flat = torch.frombuffer(self._content, dtype=described.dtype, count=count, offset=part.begin)
        return flat.as_strided(described.shape, described.stride, described.offset)

    def _record(self, name: str) -> ZipPart:
        name = self._folder + name
        if name not in self._records:
            raise zipfile.BadZipFile(f"{name} is missing")
        if name not in self._checked:
            check_record(self._content, name, self._records[name])
            self._checked.add(name)
        return self._records[name]


# What .metadata describes


def _description(found: Any) -> Description:
    """Checked, field by field."""
    fields = _fields(found, METADATA, "the file")
    entries, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(entries) is not dict or type(places) is not dict:
        raise PickleError("state_dict_metadata or storage_data is no dictionary")
    tensors, objects, left = {}, set(), len(places)
    for key, entry in entries.items():
        if type(key) is not str or type(entry) is not PickleRecord:
            raise PickleError(
                f"the entry {shown_value(key)} is a {shown_value(entry)}; expected the description of a tensor"
            )
        if entry.kind.pair == OBJECT:
            objects.add(key)
        else:
            tensors[key] = _stored_tensor(key, entry, left)
            left -= len(tensors[key].chunks)
    found_places = dict(_places(places))
    _check_apart(place for (key, _), place in found_places.items() if key in tensors)
    return Description(tensors, frozenset(objects), found_places)


def _stored_tensor(key: str, entry: PickleRecord, most_chunks: int) -> StoredTensor:
    fields = _fields(entry, TENSOR, key)
    shape, chunks, properties = _numbers(fields.get("size"), key), fields.get("chunks"), fields.get("properties")
    if type(properties) is not PickleRecord or properties.kind.pair not in PROPERTIES or type(properties.state) is not tuple:
        raise PickleError(f"the properties of {key} are {shown_value(properties)}")
    dtype = properties.state[0] if properties.state else None
    if type(dtype) is not torch.dtype:
        raise PickleError(f"the dtype of {key} is {shown_value(dtype)}; expected one of {', '.join(DTYPES)}")
    if type(chunks) is not list:
        raise PickleError(f"the chunks of {key} are a {type(chunks).__name__}; expected a list")
    if len(chunks) > most_chunks:  # one can be named often
        raise PickleError(f"{key} has {len(chunks)} chunks; expected no more than there are places for")
    return StoredTensor(dtype, shape, tuple(_stored_chunk(key, shape, chunk) for chunk in chunks))


def _stored_chunk(key: str, shape: tuple[int, ...], chunk: Any) -> StoredChunk:
    fields = _fields(chunk, CHUNK, f"a chunk of {key}")
    offset, sizes = _numbers(fields.get("offsets"), key), _numbers(fields.get("sizes"), key)
    if not len(shape) == len(offset) == len(sizes):
        raise PickleError(f"a chunk of {key} has another number of dimensions than the tensor")
    if any(begin + length > whole for begin, length, whole in zip(offset, sizes, shape, strict=True)):
        raise PickleError(f"a chunk of {key} at {list(offset)} of {list(sizes)} goes beyond the tensor of {list(shape)}")
    return StoredChunk(offset, sizes)


def _places(found: dict[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...]], ChunkPlace]]:
    seen = set()
    for index, place in found.items():
        names, where = _fields(index, INDEX, "an index"), _fields(place, PLACE, "a place")
        key, offset = names.get("fqn"), names.get("offset")
        if type(key) is not str:
            raise PickleError(f"the name of a tensor is {shown_value(key)}; expected a text")
        file, begin, length = (where.get(name) for name in ("relative_path", "offset", "length"))
        if type(file) is not str or file in ("", ".", "..") or "/" in file or "\0" in file:
            raise PickleError(f"{key} lies in the file {shown_value(file)}; expected one in the folder itself")
        if type(begin) is not int or type(length) is not int or begin < 0 or length < 0:
            raise PickleError(f"{key} lies at byte {shown_value(begin)}, {shown_value(length)} bytes long")
        if where.get("transform_descriptors"):
            raise PickleError(f"{key} is stored by {shown_value(where['transform_descriptors'])}, which is not known here")
        at = (key, () if offset is None else _numbers(offset, key))
        if at in seen:
            raise PickleError(f"the place of {key} at {list(at[1])} is said twice")
        seen.add(at)
        yield at, ChunkPlace(file, begin, length)


def _check_apart(places: Iterable[ChunkPlace]) -> None:
    """PickleError where two places have bytes in common: what is read would be larger than the files."""
    ordered = sorted(places, key=lambda place: (place.file, place.offset))
    for one, next_one in itertools.pairwise(ordered):
        if one.file == next_one.file and one.offset + one.length > next_one.offset:
            raise PickleError(f"two tensors lie at byte {next_one.offset} of {one.file}")


def _fields(value: Any, kind: Pair, what: str) -> dict[Any, Any]:
    """Attributes of the object of this class."""
    if type(value) is not PickleRecord or value.kind.pair != kind:
        raise PickleError(f"{what} is a {shown_value(value)}; expected {kind[1]}")
    return value.fields()


def _numbers(value: Any, key: str) -> tuple[int, ...]:
    """Sizes or offsets, which torch.Size has made a tuple of."""
    if type(value) is not tuple or len(value) > MOST_DIMENSIONS:
        raise PickleError(f"a size in {key} is a {shown_value(value)}; expected up to {MOST_DIMENSIONS} numbers")
    if any(type(number) is not int or not 0 <= number <= MOST_NUMBERS for number in value):
        raise PickleError(
            f"a size in {key} is {', '.join(map(shown_value, value))}; expected numbers from 0 to {MOST_NUMBERS}"
        )
    if math.prod(number for number in value if number) > MOST_NUMBERS:
        raise PickleError(
            f"a size in {key} is {', '.join(map(shown_value, value))}; expected at most {MOST_NUMBERS} numbers"
        )
    return value


# What stands for a call in a pickle


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(args) != 1 or type(args[0]) not in (tuple, list) or len(args[0]) > MOST_DIMENSIONS:
        raise PickleError(f"torch.Size of something else than up to {MOST_DIMENSIONS} numbers")
    return tuple(args[0])


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    items = args[0] if args else []
    if type(items) is not list or any(type(item) is not list or len(item) != 2 or not is_key(item[0]) for item in items):
        raise PickleError("a dictionary of something else than keys and values")
    return dict(items)


def _set(args: tuple[Any, ...]) -> set[Any]:
    items = args[0] if args else []
    if type(items) not in (list, tuple) or not all(map(is_key, items)):
        raise PickleError("a set of something else than numbers and texts")
    return set(items)


def _encode(args: tuple[Any, ...]) -> bytes:
    """As protocol 2 writes bytes."""
    if not args or type(args[0]) not in (str, bytes):
        return b""
    return args[0].encode("latin-1", "replace") if type(args[0]) is str else args[0]


def _rebuild_tensor(args: tuple[Any, ...]) -> TensorRecord:
    """(memory, offset, shape, stride, ...); the memory is ("storage", its dtype, its record, device, count)."""
    if len(args) < 4 or type(args[0]) is not PickleReference or type(args[0].pid) is not tuple or len(args[0].pid) < 3:
        raise PickleError("a tensor without memory")
    (kind, dtype, key), (offset, shape, stride) = args[0].pid[:3], args[1:4]
    if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str or not key.isalnum():
        raise PickleError(f"the memory of a tensor is {shown_value(kind)}, {shown_value(dtype)}, {shown_value(key)}")
    shape, stride, offset = _numbers(shape, key), _numbers(stride, key), _numbers((offset,), key)[0]
    if len(shape) != len(stride):
        raise PickleError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    return TensorRecord(dtype, key, offset, shape, stride)


def _rebuild_parameter(args: tuple[Any, ...]) -> TensorRecord:
    """(tensor, whether it has a gradient, ...)."""
    if not args or type(args[0]) is not TensorRecord:
        raise PickleError("a parameter without a tensor")
    return args[0]


MAKERS: dict[Pair, Maker] = {
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.serialization", "_get_layout"): lambda args: None,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda args: {},
    ("_codecs", "encode"): _encode,
    **{(module, name): _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    **{(module, "bytes"): _encode for module in ("builtins", "__builtin__")},
    **{(module, "bytearray"): lambda args: bytearray(_encode(args)) for module in ("builtins", "__builtin__")},
}
