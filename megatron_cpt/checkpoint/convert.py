"""HF folder <-> Megatron torch_dist checkpoint, file by file, one tensor in memory at a time; no GPU, no process group."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.archives import check_archives
from megatron_cpt.checkpoint.conversion import JOB, FileJob, fingerprint, remove_markers, resumable_folder, write_files
from megatron_cpt.checkpoint.foreign import foreign_config
from megatron_cpt.checkpoint.hf_files import HfTensors, Shard, TensorInfo, plan_shards, weight_files, write_safetensors
from megatron_cpt.checkpoint.hf_weights import Piece, check_shapes, extra_states, open_hf, pieces_of
from megatron_cpt.checkpoint.layout import (
    checkpoint_name,
    copy_hf_files,
    find_checkpoint,
    latest_checkpoint,
    read_manifest,
    sync_files,
    versions,
    write_json,
    write_text,
    write_tracker,
)
from megatron_cpt.checkpoint.megatron_weights import MegatronTensors
from megatron_cpt.checkpoint.model_card import model_card
from megatron_cpt.checkpoint.save_load import dtype_of
from megatron_cpt.checkpoint.torch_dist import (
    TorchDistReader,
    distcp_name,
    metadata_of,
    plan_of,
    split,
    write_distcp,
    write_metadata,
)
from megatron_cpt.checkpoint.vocabulary import (
    ExtendedTensors,
    Extension,
    NewRows,
    extension,
    replace_tokenizer,
    sentences,
)
from megatron_cpt.errors import InputError
from megatron_cpt.model.llama import LlamaConfig, llama_from, read_llama_config

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
FILE_BYTES = 2 << 30  # of a .distcp file: what a killed conversion has to do again, and what processes share out
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HfToMegatron:
    """Convert a Hugging Face Llama checkpoint into a Megatron checkpoint (torch_dist, loads in any layout)."""

    hf: str
    """HF folder: config.json, *.safetensors (or pytorch_model*.bin), tokenizer."""
    megatron: str
    """Folder to write; the checkpoint goes into its subfolder "release"."""
    dtype: Dtype = "keep"
    """Of the written weights; keep wants all tensors to have one dtype."""
    extend_tokenizer: str | None = None
    """HF folder of a tokenizer with all tokens of the model's own under the same ids, and more: rows are added for those."""
    added_tokens: str | None = None
    """File with a token on each line, to be added to the model's tokenizer: rows are added for them."""
    new_rows: NewRows = "subtokens"
    """What rows of new tokens begin as: the mean of the rows of what their text was before, the mean of all rows and a
    little noise, or zero."""
    repair_rows: bool = False
    """Make rows near zero, which nobody has trained, the mean of all rows and a little noise."""
    seed: int = 1234
    """Of the noise."""
    num_workers: int = 2
    """Processes that write files at the same time."""
    overwrite: bool = False


@dataclass(frozen=True)
class MegatronToHf:
    """Convert a Megatron checkpoint into a Hugging Face folder."""

    megatron: str
    """Checkpoint folder, or the folder of a run (its newest checkpoint)."""
    hf: str
    """Folder to write."""
    dtype: Dtype = "keep"
    """Of the written weights; keep leaves them as they were trained."""
    tokenizer: str | None = None
    """HF folder whose tokenizer and generation config go along; only for checkpoints of Megatron-LM and Megatron-Bridge."""
    vocab_size: int | None = None
    """Of the model, without rows of padding; only for those checkpoints, by default what they say."""
    max_shard_size: str = "5GB"
    """Of a .safetensors file."""
    upload_ready: bool = False
    """Write a model card (README.md) with what the run was: data, ALMR, learning rate, tokens."""
    num_workers: int = 2
    """Processes that write files at the same time."""
    overwrite: bool = False


def hf_to_megatron(config: HfToMegatron) -> str:
    """Run the conversion; returns the checkpoint's folder."""
    llama = read_llama_config(config.hf)
    check_workers(config.num_workers)
    if latest_or_none(config.megatron) and not config.overwrite:
        raise InputError(f"{config.megatron} already holds a checkpoint; use --overwrite true to replace it")
    source = open_hf(config.hf, llama)
    check_shapes(source.shapes(), llama, config.hf)
    dtype = config.dtype if config.dtype != "keep" else one_dtype(source)
    more = config.extend_tokenizer, config.added_tokens
    with extension(config.hf, llama, *more, config.new_rows, config.repair_rows, config.seed) as plan:
        return convert_to_megatron(config, dataclasses.replace(llama, vocab_size=plan.vocab_size), source, dtype, plan)


def convert_to_megatron(config: HfToMegatron, llama: LlamaConfig, source: HfTensors, dtype: str, plan: Extension) -> str:
    """The conversion, after everything that can be known to be wrong; `llama` with the rows that will be there."""
    tensors = ExtendedTensors(source, plan)
    reports = tensors.reports()
    for line in sentences(reports, plan):
        print(line, file=sys.stderr)
    pieces = {(piece.chunk.key, piece.chunk.offset): piece for piece in pieces_of(llama, dtype_of(dtype))}
    chunks = [piece.chunk for piece in pieces.values()]
    extra = extra_states(llama)
    plans = [plan_of(part, () if number else extra) for number, part in enumerate(split(chunks, FILE_BYTES))]
    make = partial(make_chunk, pieces, tensors, llama, config.hf)
    folder = os.path.join(config.megatron, checkpoint_name(None))
    manifest: dict[str, Any] = {"kind": "hf-to-megatron", "source": os.path.abspath(config.hf), "dtype": dtype}
    manifest["vocabulary"] = {
        "size": plan.vocab_size,
        "new_rows": plan.new_rows if plan.new else None,
        "tensors": {name: dataclasses.asdict(rows) for name, rows in reports.items()},
    }
    identity = (
        manifest
        | {"new": {str(k): v for k, v in plan.new.items()}, "seed": config.seed}
        | {"files": fingerprint(config.hf, ["config.json", *weight_files(config.hf)])}
        | versions()
    )
    with resumable_folder(folder, identity) as path:
        jobs = []
        for number, part in enumerate(split(chunks, FILE_BYTES)):
            write = partial(write_checked_distcp, path, plans, number, make)
            jobs.append(FileJob(distcp_name(number), sum(chunk.bytes for chunk in part), write))
        results: list[list[WriteResult]] = write_files(path, jobs, config.num_workers, "converting")
        remove_markers(path, jobs)
        write_metadata(path, metadata_of(chunks, extra), results)
        finish_megatron(path, config.hf, dtype, manifest, plan)
    write_tracker(config.megatron, None)
    return folder


def make_chunk(
    pieces: Mapping[tuple[str, tuple[int, ...]], Piece],
    tensors: Mapping[str, torch.Tensor],
    llama: LlamaConfig,
    folder: str,
    key: str,
    offset: tuple[int, ...],
) -> torch.Tensor:
    """One chunk of the Megatron checkpoint.

    Raises:
        InputError: it holds numbers that are not finite
    """
    piece = pieces[key, offset]
    tensor = piece.make(tensors, llama)
    check_finite(tensor, f"{folder}: tensor {' or '.join(piece.sources)}")
    return tensor.to(piece.chunk.dtype).contiguous()


def write_checked_distcp(
    folder: str,
    plans: Sequence[Any],
    number: int,
    make: Callable[[str, tuple[int, ...]], torch.Tensor],
    path: str,
    written: Callable[[int], None],
) -> list[WriteResult]:
    """Write one file of a Megatron checkpoint and compare it with its checksums."""
    results = write_distcp(folder, plans, number, make, written)
    check_archives(path, [(result.storage_data.offset, result.storage_data.length) for result in results])
    return results


def finish_megatron(folder: str, hf: str, dtype: str, manifest: dict[str, Any], plan: Extension) -> None:
    """Everything in a checkpoint's folder that is not a tensor."""
    torch.save({"checkpoint_version": 3.0}, os.path.join(folder, "common.pt"))
    save_config(CheckpointingConfig("torch_dist", 1), folder)
    target = os.path.join(folder, "hf")
    copy_hf_files(hf, target)
    if plan.tokenizer is not None:
        replace_tokenizer(plan.tokenizer, target)
    set_fields(os.path.join(target, "config.json"), dtype, plan.vocab_size)
    sizes = {name: size for name, size in sync_files(folder).items() if name != JOB}
    write_json(
        os.path.join(folder, "manifest.json"), manifest | {"optimizer": False, "versions": versions(), "files": sizes}
    )


def megatron_to_hf(config: MegatronToHf) -> str:
    """Run the conversion; returns the HF folder."""
    folder = find_checkpoint(config.megatron)
    check_workers(config.num_workers)
    check_replaceable(config.hf, config.overwrite)
    fields = described_by(folder, config)
    llama = read_llama_config(os.path.join(folder, "hf")) if fields is None else llama_from(fields, folder)
    card = make_card(folder, config) if config.upload_ready else None
    tensors = MegatronTensors(TorchDistReader(folder), llama)
    found = str(tensors.dtype("model.embed_tokens.weight")).removeprefix("torch.")
    dtype = config.dtype if config.dtype != "keep" else found
    infos = {name: TensorInfo(shape, dtype) for name, shape in tensors.shapes().items()}
    shards, index = plan_shards(infos, config.max_shard_size)
    source = {"kind": "megatron-to-hf", "source": os.path.abspath(folder), "dtype": dtype}
    names = sorted(name for name in os.listdir(folder) if name.endswith((".distcp", ".metadata")))
    identity = source | {"max_shard_size": config.max_shard_size, "files": fingerprint(folder, names)} | versions()
    with resumable_folder(config.hf, identity) as path:
        jobs = [shard_job(shard, infos, tensors) for shard in shards]
        write_files(path, jobs, config.num_workers, "converting")
        remove_markers(path, jobs)
        if index is not None:
            write_json(os.path.join(path, "model.safetensors.index.json"), index)
        if fields is None:
            copy_hf_files(os.path.join(folder, "hf"), path)
        else:
            if config.tokenizer is not None:
                copy_hf_files(config.tokenizer, path)
            write_json(os.path.join(path, "config.json"), fields)
        set_fields(os.path.join(path, "config.json"), dtype, llama.vocab_size)
        if card is not None:
            write_text(os.path.join(path, "README.md"), card)
        write_json(os.path.join(path, "manifest.json"), source | {"versions": versions()})
        sync_files(path)
    return config.hf


def make_card(folder: str, config: MegatronToHf) -> str:
    """The model card of a run's checkpoint."""
    manifest = os.path.join(folder, "manifest.json")
    return model_card(
        os.path.basename(os.path.abspath(config.hf)), read_manifest(manifest) if os.path.exists(manifest) else {}
    )


def described_by(folder: str, config: MegatronToHf) -> dict[str, Any] | None:
    """The config.json of a checkpoint of other software; None: it is one of ours, which has it in hf/.

    Raises:
        InputError: it cannot be told, or it is ours and an option for the others is given
    """
    if os.path.exists(os.path.join(folder, "hf", "config.json")):
        for name in ("tokenizer", "vocab_size"):
            if getattr(config, name) is not None:
                raise InputError(f"{name} is given but {folder} has its configuration and tokenizer in hf/; leave it out")
        return None
    if config.tokenizer is not None and not os.path.isdir(config.tokenizer):
        raise InputError(f"tokenizer {config.tokenizer}: no such folder")
    return foreign_config(folder, config.vocab_size)


def shard_job(shard: Shard, infos: Mapping[str, TensorInfo], tensors: MegatronTensors) -> FileJob:
    """Writes one .safetensors file."""
    own = {name: infos[name] for name in shard.tensors}

    def make(name: str) -> torch.Tensor:
        tensor = tensors[name]
        check_finite(tensor, f"{tensors.folder}: tensor {name}")
        return tensor.to(dtype_of(own[name].dtype))

    def write(path: str, written: Callable[[int], None]) -> None:
        write_safetensors(path, own, make, written)

    return FileJob(shard.name, sum(info.bytes for info in own.values()), write)


def open_megatron(folder: str) -> MegatronTensors:
    """The weights of a Megatron checkpoint under HF's names."""
    return MegatronTensors(TorchDistReader(folder), read_llama_config(os.path.join(folder, "hf")))


def check_workers(num_workers: int) -> None:
    """Raise InputError unless it is a number of processes."""
    if num_workers < 1:
        raise InputError(f"num_workers is {num_workers}; use 1 or more")


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise InputError if a number is NaN or infinite: such a model cannot be trained or used."""
    if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in tensor.aminmax()):
        raise InputError(f"{what} holds numbers that are not finite (NaN or infinity)")


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


def one_dtype(tensors: HfTensors) -> str:
    """The dtype all tensors share: a Megatron checkpoint has one for the same weight of all layers."""
    first, *_ = tensors.infos
    for name, info in tensors.infos.items():
        if info.dtype not in DTYPES:
            raise InputError(f"{tensors.folder}: tensor {name} is {info.dtype}; use {', '.join(DTYPES)}")
        if info.dtype != tensors.infos[first].dtype:
            both = f"tensor {name} is {info.dtype} but {first} is {tensors.infos[first].dtype}"
            raise InputError(f"{tensors.folder}: {both}; use one dtype, or give --dtype")
    return tensors.infos[first].dtype


def set_fields(path: str, dtype: str, vocab_size: int) -> None:
    """Keep config.json's dtype and vocab_size true; the file is left byte for byte as it was when they already are."""
    with open(path, encoding="utf-8") as file:
        fields = json.load(file)
    name = "torch_dtype" if "torch_dtype" in fields else "dtype"
    if fields.get(name, "float32") != dtype or fields["vocab_size"] != vocab_size:
        write_json(path, fields | {name: dtype, "vocab_size": vocab_size})


def latest_or_none(root: str) -> str | None:
    """The newest checkpoint below `root`; a broken one counts as none, for it may be replaced."""
    try:
        return latest_checkpoint(root)
    except InputError:
        return None
