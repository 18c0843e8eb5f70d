"""Weights in a Hugging Face folder: read through memory maps, written shard by shard with one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from megatron_cpt.checkpoint.layout import WEIGHT_INDICES
from megatron_cpt.errors import InputError

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class TensorInfo:
    """`dtype` by torch's name, or by that of the file format where torch has none."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


class HfTensors(Mapping[str, torch.Tensor]):
    """The tensors of a HF folder (*.safetensors, else pytorch_model*.bin), mapped into memory and read when asked for.

    Raises:
        InputError: there are none, or a file is missing or cannot be read
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        names = weight_files(folder)
        self._files: dict[str, Any] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name in names:
            path = os.path.join(folder, name)
            file, infos = _open_safetensors(path) if name.endswith(".safetensors") else _open_bin(path)
            for tensor in infos:
                if tensor in self.infos:
                    raise InputError(f"{path}: tensor {tensor} is in another file of {folder}, too")
            self._files |= dict.fromkeys(infos, file)
            self.infos |= infos

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def leave_out(self, name: str) -> None:
        """Have it no longer."""
        del self.infos[name], self._files[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return {name: info.shape for name, info in self.infos.items()}


def weight_files(folder: str) -> list[str]:
    """The files that hold the weights: those that an index names, else all of the kind that is there.

    Raises:
        InputError: there is none, or one that the index names is missing
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    present = sorted(os.listdir(folder))
    for index, suffix in zip(WEIGHT_INDICES, (".safetensors", ".bin"), strict=True):
        path = os.path.join(folder, index)
        names = [n for n in present if n.endswith(suffix) and (suffix != ".bin" or n.startswith("pytorch_model"))]
        if index in present:
            try:
                with open(path, encoding="utf-8") as file:
                    named = sorted(set(json.load(file)["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{path} is not an index of weights: {error}") from error
            for name in named:
                if name not in present:
                    raise InputError(f"{os.path.join(folder, str(name))} is missing; {index} names it")
            return named
        if names:
            return names
    raise InputError(f"{folder} holds no .safetensors file and no pytorch_model.bin")


def _open_safetensors(path: str) -> tuple[Any, dict[str, TensorInfo]]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    names = {stored: name for name, stored in SAFETENSORS_NAMES.items()}
    infos = {}
    for name in file.keys():  # noqa: SIM118 (no dictionary)
        part = file.get_slice(name)
        infos[name] = TensorInfo(tuple(part.get_shape()), names.get(part.get_dtype(), part.get_dtype()))
    return file, infos


def _open_bin(path: str) -> tuple[dict[str, torch.Tensor], dict[str, TensorInfo]]:
    try:
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(file, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in file.values()):
        raise InputError(f"{path} holds something else than named tensors")
    infos = {n: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in file.items()}
    return file, infos


@dataclass(frozen=True)
class Shard:
    """One .safetensors file: its name and the tensors in it."""

    name: str
    tensors: tuple[str, ...]


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_size: str) -> tuple[list[Shard], dict[str, Any] | None]:
    """How transformers would deal the tensors to files, and its index (None for a single file).

    Raises:
        InputError: max_shard_size is not a size
    """
    placeholders = {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
        for name, info in sorted(infos.items())  # as transformers deals them
    }
    try:
        split = split_torch_state_dict_into_shards(placeholders, max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(f"max_shard_size is {max_shard_size!r}: {error}") from error
    shards = [Shard(name, tuple(tensors)) for name, tensors in split.filename_to_tensors.items()]
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return shards, index


def write_safetensors(
    path: str,
    infos: Mapping[str, TensorInfo],
    make: Callable[[str], torch.Tensor],
    written: Callable[[int], None],
) -> None:
    """Write one file, one tensor in memory at a time, and force it to disk; the bytes are those of the safetensors library.

    `make(name)` gives a tensor as `infos` describe it; `written` is told the bytes of each. (The library itself wants all
    tensors of a file at once: https://github.com/huggingface/safetensors#format.)
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(infos, key=lambda name: (-getattr(torch, infos[name].dtype).itemsize, name))
    end = 0
    for name in names:
        info = infos[name]
        begin, end = end, end + info.bytes
        header[name] = {"dtype": SAFETENSORS_NAMES[info.dtype], "shape": info.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            written(_write_tensor(file, name, infos[name], make(name)))
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, name: str, info: TensorInfo, tensor: torch.Tensor) -> int:
    if (tuple(tensor.shape), str(tensor.dtype)) != (info.shape, f"torch.{info.dtype}"):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {info.dtype} {list(info.shape)}")
    return file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
