"""Weights in a Hugging Face folder: read through memory maps, written shard by shard with one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from megatron_cpt.checkpoint.checkpoint_pickles import PickledTensors
from megatron_cpt.checkpoint.layout import WEIGHT_INDICES
from megatron_cpt.checkpoint.weight_files import WHOLE_FILES, weight_files
from megatron_cpt.model.hf_folder import adapter_note
from megatron_cpt.utils.errors import InputError

logger = logging.getLogger(__name__)

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# For transformers' from_pretrained: adapters are looked for in a subfolder that no model has, so that weights into
# which they are merged already are read as they are
WITHOUT_ADAPTERS: dict[str, Any] = {"adapter_kwargs": {"subfolder": "adapters are merged already"}}


def weights_note(folder: str) -> str | None:
    """What to tell people of a folder with weights in more than one form, of which one is read: None where there is one.

    They may be the same numbers, or those of two models, as where one was saved over another.
    """
    forms = [name for pair in zip(WHOLE_FILES, WEIGHT_INDICES, strict=True) for name in pair]
    found = [name for name in forms if os.path.exists(os.path.join(folder, name))]
    if len(found) < 2:
        return None
    return f"{folder} holds {' and '.join(found)}: weights are read from {found[0]}, as transformers reads them"


def say_notes(folder: str) -> None:
    """Print what people should know of the files in a model's folder.

    Raises:
        InputError: see `adapter_note`
    """
    for note in (adapter_note(folder), weights_note(folder)):
        if note is not None:
            logger.info(note)


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
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

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


def _open_bin(path: str) -> tuple[PickledTensors, dict[str, TensorInfo]]:
    file = PickledTensors(path)
    infos = {n: TensorInfo(t.shape, str(t.dtype).removeprefix("torch.")) for n, t in file.described.items()}
    return file, infos


@dataclass(frozen=True)
class Shard:
    """One .safetensors file: its name and the tensors in it."""

    name: str
    tensors: tuple[str, ...]


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_size: str) -> tuple[list[Shard], dict[str, Any] | None]:
    """How transformers would deal the tensors to files, and its index (None for a single file)."""
    placeholders = {
        name: torch.empty(infos[name].shape, dtype=getattr(torch, infos[name].dtype), device="meta")
        for name in sorted(infos, key=_by_number)  # as transformers deals them
    }
    split = split_torch_state_dict_into_shards(placeholders, max_shard_size=max_shard_size)
    shards = [Shard(name, tuple(tensors)) for name, tensors in split.filename_to_tensors.items()]
    if not split.is_sharded:
        return shards, None
    metadata = {"total_parameters": sum(math.prod(info.shape) for info in infos.values()), **split.metadata}
    return shards, {"metadata": metadata, "weight_map": split.tensor_to_filename}


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


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
