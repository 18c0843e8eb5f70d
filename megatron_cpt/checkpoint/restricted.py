"""Reading pickles of other people's checkpoints without running what is in them.

A pickle may name any function and have it called. Here only what describes tensors can be named: everything else becomes an
inert placeholder, or an error.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import io
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import PosixPath, PurePosixPath
from typing import Any, BinaryIO

import torch

from megatron_cpt.errors import InputError

PLAIN = (dict, list, set, frozenset, tuple, bytearray, complex, OrderedDict, PosixPath, PurePosixPath, torch.Size)
# Dataclasses and enumerations of these packages hold numbers and names, and making one does nothing else.
RECORDS_OF = ("torch.distributed.", "megatron.core.")


class Opaque:
    """Stands for an object of a class that is not known to be harmless; its class is never imported, let alone called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        return self

    def append(self, item: Any) -> None:
        """Some pickles fill what they make as a list ..."""

    def extend(self, items: Any) -> None:
        """... or all at once ..."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """... or as a dictionary."""


def harmless(module: str, name: str) -> Any:
    """The object that a pickle names, if it is known that it can do no harm; else None."""
    for allowed in PLAIN:
        if (module, name) in ((allowed.__module__, allowed.__name__), ("__builtin__", allowed.__name__)):
            return allowed
    if module == "torch":
        value = getattr(torch, name, None)
        return value if isinstance(value, torch.dtype) else None
    if (module, name) == ("torch.serialization", "_get_layout"):
        return torch.serialization._get_layout
    if (module, name) == ("argparse", "Namespace"):
        return Namespace
    if module.startswith(RECORDS_OF) and "." not in name:
        try:
            value = getattr(importlib.import_module(module), name, None)
        except ImportError:  # another version's
            return None
        if isinstance(value, type) and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum)):
            return value
    return None


class StrictUnpickler(pickle.Unpickler):
    """Knows only what is harmless; anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of this name."""
        found = harmless(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint has no need of")
        return found


class LenientUnpickler(pickle.Unpickler):
    """Puts `Opaque` in the place of everything that is not known to be harmless."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of this name, or its stand-in."""
        return harmless(module, name) or Opaque

    def persistent_load(self, pid: Any) -> Any:
        """Tensors' memory: not wanted."""
        return Opaque()


def load_metadata(path: str) -> Any:
    """The object in a torch .metadata file.

    Raises:
        InputError: it cannot be read, or holds something else than a description of tensors
    """
    try:
        with open(path, "rb") as file:
            return StrictUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:  # whatever a damaged pickle may raise
        raise InputError(f"{path} cannot be read: {error}") from error


def load_settings(path: str) -> dict[str, Any]:
    """The dictionary in a common.pt: its numbers, texts and settings; tensors and objects of unknown classes are `Opaque`.

    Raises:
        InputError: it cannot be read
    """
    try:
        with zipfile.ZipFile(path) as archive:  # as torch.save writes it
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = LenientUnpickler(io.BytesIO(archive.read(pickled))).load()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:  # whatever a damaged file may raise
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; wanted a dictionary")
    return content


@dataclass(frozen=True)
class TensorRecord:
    """How torch.save has stored a tensor: elements from `offset` on of the archive's record data/`key`."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# What a pickle calls the memory of a tensor, by dtype.
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of one tensor, without its memory."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a saved tensor needs."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a plain tensor has no need of")

    def persistent_load(self, pid: Any) -> Any:
        """("storage", class, key, location, number of elements)"""
        return pid


def _describe(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> TensorRecord:
    _, dtype, key, *_ = storage
    return TensorRecord(dtype, key, offset, tuple(shape), tuple(stride))


def describe_tensor(pickled: bytes) -> TensorRecord:
    """What the data.pkl of an archive with one tensor says.

    Raises:
        pickle.UnpicklingError: it is anything else
    """
    content: BinaryIO = io.BytesIO(pickled)
    record = _TensorUnpickler(content).load()
    if not isinstance(record, TensorRecord):
        raise pickle.UnpicklingError(f"it holds a {type(record).__name__}, not a tensor")
    return record
