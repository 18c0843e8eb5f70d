"""HF safetensors folder <-> Megatron torch_dist checkpoint.

The whole model is held in memory once (a later version streams it); everything runs on CPU, in one process.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cpt.checkpoint.folders import appearing_folder
from megatron_cpt.checkpoint.hf_weights import check_shapes, hf_from_megatron, megatron_from_hf
from megatron_cpt.checkpoint.layout import (
    copy_hf_files,
    find_checkpoint,
    latest_checkpoint,
    versions,
    write_json,
)
from megatron_cpt.checkpoint.save_load import dtype_of, load_checkpoint, save_checkpoint
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.errors import InputError
from megatron_cpt.model.build import build_model, transformer_config
from megatron_cpt.model.llama import LlamaConfig, read_llama_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import process_groups

Item = TypeVar("Item")


class HfTensors(Mapping[str, torch.Tensor]):
    """The tensors of a HF folder, read from its .safetensors files (memory-mapped) when asked for."""

    def __init__(self, folder: str, stack: contextlib.ExitStack) -> None:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        if not names:
            raise InputError(f"{folder} holds no .safetensors file")
        self._files: dict[str, Any] = {}
        for name in names:
            path = os.path.join(folder, name)
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def dtypes(self) -> dict[str, str]:
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        found = {name: file.get_slice(name).get_dtype() for name, file in self._files.items()}
        return {name: names.get(dtype, dtype) for name, dtype in found.items()}


@dataclass(frozen=True)
class HfToMegatron:
    """Convert a Hugging Face Llama checkpoint into a Megatron checkpoint (torch_dist, loads in any layout)."""

    hf: str
    """HF folder: config.json, *.safetensors, tokenizer."""
    megatron: str
    """Folder to write; the checkpoint goes into its subfolder "release"."""
    overwrite: bool = False


@dataclass(frozen=True)
class MegatronToHf:
    """Convert a Megatron checkpoint of this project into a Hugging Face folder."""

    megatron: str
    """Checkpoint folder, or the folder of a run (its newest checkpoint)."""
    hf: str
    """Folder to write."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Of the written weights; keep leaves them as they were trained."""
    overwrite: bool = False


@dataclass(frozen=True)
class Verify:
    """Compare two checkpoints (HF folders or Megatron checkpoints, in any mix) tensor by tensor, bit by bit."""

    a: str
    """One checkpoint."""
    b: str


def hf_to_megatron(config: HfToMegatron) -> str:
    """Run the conversion; returns the checkpoint's folder."""
    llama = read_llama_config(config.hf)
    if latest_or_none(config.megatron) and not config.overwrite:
        raise InputError(f"{config.megatron} already holds a checkpoint; use --overwrite true to replace it")
    with contextlib.ExitStack() as stack:
        tensors = HfTensors(config.hf, stack)
        check_shapes(tensors.shapes(), llama, config.hf)
        dtype = one_dtype(tensors, config.hf)
        with single_process_model(llama, dtype) as model:
            parameters = dict(model.named_parameters())
            for name, tensor in showing(megatron_from_hf(tensors, llama), "reading", len(parameters)):
                parameters.pop(name).data.copy_(tensor)
            assert not parameters, f"left uninitialised: {sorted(parameters)}"
            manifest = {"kind": "hf-to-megatron", "source": os.path.abspath(config.hf), "dtype": dtype}
            with working(f"writing {config.megatron}"):
                return save_checkpoint(config.megatron, [model], config.hf, manifest)


def megatron_to_hf(config: MegatronToHf) -> str:
    """Run the conversion; returns the HF folder."""
    folder = find_checkpoint(config.megatron)
    check_replaceable(config.hf, config.overwrite)
    tensors, dtype = megatron_tensors(folder)
    if config.dtype != "keep":
        dtype = config.dtype
        tensors = {name: tensor.to(dtype_of(dtype)) for name, tensor in tensors.items()}
    with appearing_folder(config.hf) as path:
        copy_hf_files(os.path.join(folder, "hf"), path)
        set_dtype(os.path.join(path, "config.json"), dtype)
        with working(f"writing {config.hf}"):
            save_torch_state_dict(tensors, path)
        source = {"kind": "megatron-to-hf", "source": os.path.abspath(folder), "dtype": dtype, "versions": versions()}
        write_json(os.path.join(path, "manifest.json"), source)
    return config.hf


def check_replaceable(folder: str, overwrite: bool) -> None:
    """Whether a HF folder may be written here: nothing is there, or an earlier conversion's result and `overwrite` is set.

    Anything else is not ours to delete, the checkpoint to convert least of all.
    """
    if not folder:
        raise InputError("hf is empty; use the name of the folder to write")
    if os.path.islink(folder) or (os.path.exists(folder) and not os.path.isdir(folder)):
        raise InputError(f"{folder} is not a folder; use another name")
    if not os.path.isdir(folder) or not os.listdir(folder):
        return
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            ours = json.load(file).get("kind") == "megatron-to-hf"
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise InputError(f"{folder} is not empty and was not written by this tool; use another folder, or empty it")
    if not overwrite:
        raise InputError(f"{folder} is not empty: it holds an earlier conversion; use --overwrite true to replace it")


def verify(config: Verify) -> str:
    """Compare; returns a line that says how many tensors are equal.

    Raises:
        InputError: naming the first tensor that differs, and how
    """
    with contextlib.ExitStack() as stack:
        a, b = (open_checkpoint(path, stack) for path in (config.a, config.b))
        if set(a) != set(b):
            name = sorted(set(a) ^ set(b))[0]
            raise InputError(f"tensor {name} is only in {config.a if name in a else config.b}")
        for name in showing(a, "comparing", len(a)):
            x, y = a[name], b[name]
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                raise InputError(f"tensor {name}: {x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}")
            if not torch.equal(as_bytes(x), as_bytes(y)):
                difference = (x.double() - y.double()).abs().max().item()
                raise InputError(f"tensor {name} differs by up to {difference:.3g}")
        return f"{len(a)} tensors equal, bit by bit"


def showing(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """The items, with a progress bar when stderr is a terminal."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def working(description: str) -> contextlib.AbstractContextManager[Any]:
    """A spinner, when stderr is a terminal, around work whose end is not known."""
    console = Console(stderr=True)
    return console.status(description) if console.is_terminal else contextlib.nullcontext()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, so that NaN equals NaN and 0.0 does not equal -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def open_checkpoint(path: str, stack: contextlib.ExitStack) -> Mapping[str, torch.Tensor]:
    """Tensors with HF names, of a HF folder or a Megatron checkpoint."""
    if os.path.exists(os.path.join(path, "config.json")):
        return HfTensors(path, stack)
    return megatron_tensors(find_checkpoint(path))[0]


def megatron_tensors(folder: str) -> tuple[dict[str, torch.Tensor], str]:
    """All weights of a Megatron checkpoint under HF's names, and the dtype they were saved in."""
    llama = read_llama_config(os.path.join(folder, "hf"))
    dtype = saved_dtype(folder)
    with single_process_model(llama, dtype) as model:
        with working(f"reading {folder}"):
            load_checkpoint(folder, [model])
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return {name: tensor.clone() for name, tensor in hf_from_megatron(parameters, llama)}, dtype


def saved_dtype(folder: str) -> str:
    """dtype of the weights in a Megatron checkpoint, from its metadata."""
    embedding = FileSystemReader(folder).read_metadata().state_dict_metadata["embedding.word_embeddings.weight"]
    assert isinstance(embedding, TensorStorageMetadata)
    return str(embedding.properties.dtype).removeprefix("torch.")


@contextlib.contextmanager
def single_process_model(llama: LlamaConfig, dtype: str) -> Iterator[Any]:
    """The whole model on CPU, uninitialised, within a process group of one."""
    parallel = ParallelConfig()
    with process_groups(parallel, alone=True) as ranks:
        config = transformer_config(llama, parallel, dtype_of(dtype))
        yield build_model(llama, config, llama.max_position_embeddings, current_platform(), ranks)


def one_dtype(tensors: HfTensors, folder: str) -> str:
    """The dtype all tensors share; Megatron's model has one."""
    dtypes = tensors.dtypes()
    first = next(iter(dtypes))
    for name, dtype in dtypes.items():
        if dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"{folder}: tensor {name} is {dtype}; use float32, bfloat16 or float16")
        if dtype != dtypes[first]:
            raise InputError(f"{folder}: tensor {name} is {dtype} but {first} is {dtypes[first]}; use one dtype")
    return dtypes[first]


def set_dtype(path: str, dtype: str) -> None:
    """Keep config.json's dtype true; the file is left byte for byte as it was when it already is."""
    with open(path, encoding="utf-8") as file:
        fields = json.load(file)
    name = "torch_dtype" if "torch_dtype" in fields else "dtype"
    if fields.get(name, "float32") != dtype:
        write_json(path, fields | {name: dtype})


def latest_or_none(root: str) -> str | None:
    """The newest checkpoint below `root`; a broken one counts as none, for it may be replaced."""
    try:
        return latest_checkpoint(root)
    except InputError:
        return None
