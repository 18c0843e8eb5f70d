"""HF folder <-> Megatron torch_dist checkpoint, file by file, one tensor in memory at a time; no GPU, no process group."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.filesize import decimal

from megatron_cpt.checkpoint.checksums import checksums_of, sealed
from megatron_cpt.checkpoint.hf_files import (
    HfTensors,
    Shard,
    TensorInfo,
    plan_shards,
    say_notes,
    weight_files,
    write_safetensors,
)
from megatron_cpt.checkpoint.hf_tokenizer import load_hf_tokenizer, say_other_reading
from megatron_cpt.checkpoint.layout import (
    checkpoint_name,
    copy_hf_files,
    find_checkpoint,
    hf_files,
    is_ours,
    read_manifest,
    versions,
    write_format,
    write_tracker,
)
from megatron_cpt.checkpoint.torch_dist import (
    TorchDistReader,
    WrittenItem,
    distcp_name,
    metadata_of,
    plan_of,
    split,
    write_distcp,
    write_metadata,
)
from megatron_cpt.checkpoint.zip_reader import check_archives
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf
from megatron_cpt.convert.conversion_folder import JOB, FileJob, file_stats, resumable_folder, write_files
from megatron_cpt.convert.hf_weights import WeightPiece, check_shapes, extra_states, open_hf, pieces_of
from megatron_cpt.convert.megatron_lm import foreign_config
from megatron_cpt.convert.megatron_weights import MegatronTensors
from megatron_cpt.convert.model_card import model_card
from megatron_cpt.convert.run_files import check_ours
from megatron_cpt.convert.targets import check_hf_target, check_megatron_target, is_converted, job_name
from megatron_cpt.convert.vocabulary import ExtendedTensors, Extension, extension, replace_tokenizer, vocabulary_notes
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.llama import LlamaConfig, llama_from, read_llama_config
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import sync_files, write_json, write_text
from megatron_cpt.utils.input_files import load_json
from megatron_cpt.utils.signals import interruptible

logger = logging.getLogger(__name__)

FILE_BYTES = 2 << 30  # of a .distcp file: what a killed conversion has to do again, and what processes share out
DTYPES = ("float32", "bfloat16", "float16")


def hf_to_megatron(config: HfToMegatron) -> str:
    """Run the conversion, or with check_only what comes before it; returns the checkpoint's folder."""
    check_megatron_target(config.megatron)
    llama = read_llama_config(config.hf)
    say_notes(config.hf)
    say_other_reading(config.hf)
    source = open_hf(config.hf, llama)
    check_shapes(source.shapes(), llama, config.hf)
    found = one_dtype(config.hf, {name: info.dtype for name, info in source.infos.items()}, config.dtype != "keep")
    dtype = found if config.dtype == "keep" else config.dtype
    more = config.extend_tokenizer, config.added_tokens
    with (
        interruptible(),
        extension(config.hf, llama, *more, config.embedding_init, config.repair_untrained_embeddings, config.seed) as plan,
    ):
        return convert_to_megatron(config, dataclasses.replace(llama, vocab_size=plan.vocab_size), source, dtype, plan)


def convert_to_megatron(config: HfToMegatron, llama: LlamaConfig, source: HfTensors, dtype: str, plan: Extension) -> str:
    """The conversion, after everything that can be known to be wrong; `llama` with the rows that will be there."""
    tensors = ExtendedTensors(source, plan)
    reports = tensors.reports()
    for line in vocabulary_notes(reports, plan):
        logger.info(line)
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
        | {"new": {str(k): v for k, v in plan.new.items()}, "seed": config.seed, "tokenizer": plan.tokenizer_hash()}
        | {"files": file_stats(config.hf, [*hf_files(config.hf), *weight_files(config.hf)])}
        | versions()
    )
    manifest["job"] = job_name(identity)
    if is_converted(folder, manifest["job"], config.overwrite):
        if not config.check_only:
            write_tracker(config.megatron, None)  # an attempt may have been killed before
        return folder
    if config.check_only:
        return say_size(folder, sum(chunk.bytes for chunk in chunks), dtype)
    with resumable_folder(folder, identity) as path:
        jobs = []
        for number, part in enumerate(split(chunks, FILE_BYTES)):
            write = partial(write_checked_distcp, path, plans, number, make)
            jobs.append(FileJob(distcp_name(number), sum(chunk.bytes for chunk in part), write))
        results: list[list[WrittenItem]] = write_files(path, jobs, config.num_workers, "converting")
        write_metadata(path, metadata_of(chunks, extra), results)
        finish_megatron(path, config.hf, dtype, manifest, plan, config.num_workers)
    write_tracker(config.megatron, None)
    return folder


def make_chunk(
    pieces: Mapping[tuple[str, tuple[int, ...]], WeightPiece],
    tensors: Mapping[str, torch.Tensor],
    llama: LlamaConfig,
    folder: str,
    key: str,
    offset: tuple[int, ...],
) -> torch.Tensor:
    """One chunk of the Megatron checkpoint.

    Raises:
        InputError: it holds numbers that are not finite, or that its dtype cannot hold
    """
    piece = pieces[key, offset]
    for name in piece.sources:
        check_numbers(tensors[name], piece.chunk.dtype, f"{folder}: tensor {name}")
    return piece.make(tensors, llama).to(piece.chunk.dtype).contiguous()


def write_checked_distcp(
    folder: str,
    plans: Sequence[Any],
    number: int,
    make: Callable[[str, tuple[int, ...]], torch.Tensor],
    path: str,
    written: Callable[[int], None],
) -> list[WrittenItem]:
    """Write one file of a Megatron checkpoint and compare it with its checksums."""
    results = write_distcp(folder, plans, number, make, written)
    check_archives(path, [(begin, length) for *_, begin, length in results])
    return results


def finish_megatron(folder: str, hf: str, dtype: str, manifest: dict[str, Any], plan: Extension, threads: int) -> None:
    """Everything in a checkpoint's folder that is not a tensor."""
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0}, common)  # not to a file: torch has no OSError for a full disk
    with open(os.path.join(folder, "common.pt"), "wb") as file:
        file.write(common.getvalue())
    write_format(folder)
    target = os.path.join(folder, "hf")
    copy_hf_files(hf, target)
    if plan.tokenizer is not None:
        replace_tokenizer(plan.tokenizer, target)
    set_fields(os.path.join(target, "config.json"), dtype, plan.vocab_size)
    sizes = {name: size for name, size in sync_files(folder).items() if not name.startswith(JOB + os.sep)}
    checksums = checksums_of(folder, sizes, threads)
    manifest = manifest | {"optimizer": False, "versions": versions(), "files": sizes}
    write_json(os.path.join(folder, "manifest.json"), sealed(manifest, checksums))


def megatron_to_hf(config: MegatronToHf) -> str:
    """Run the conversion, or with check_only what comes before it; returns the HF folder."""
    folder = find_checkpoint(config.megatron)
    check_hf_target(config.hf)
    fields = described_by(folder, config)
    llama = read_llama_config(os.path.join(folder, "hf")) if fields is None else llama_from(fields, folder)
    card, run = make_card(folder, config) if config.upload_ready else (None, {})
    tensors = MegatronTensors(TorchDistReader(folder), llama)
    found = one_dtype(folder, {name: name_of(tensors.dtype(name)) for name in tensors}, config.dtype != "keep")
    dtype = found if config.dtype == "keep" else config.dtype
    infos = {name: TensorInfo(shape, dtype) for name, shape in tensors.shapes().items()}
    shards, index = plan_shards(infos, config.max_shard_size)
    source = {"kind": "megatron-to-hf", "source": os.path.abspath(folder), "dtype": dtype}
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    beside = os.path.join(folder, "hf") if fields is None else config.tokenizer
    if fields is None:
        say_other_reading(os.path.join(folder, "hf"))
    options = {"max_shard_size": config.max_shard_size, "card": card, "fields": fields}
    files = {"files": file_stats(folder, names), "hf_files": file_stats(beside, hf_files(beside)) if beside else {}}
    identity = source | options | files | versions()
    source["job"] = job_name(identity)
    if is_converted(config.hf, source["job"], config.overwrite):
        return config.hf
    if config.check_only:
        return say_size(config.hf, sum(info.bytes for info in infos.values()), dtype)
    with interruptible(), resumable_folder(config.hf, identity) as path:
        jobs = [shard_job(shard, infos, tensors) for shard in shards]
        write_files(path, jobs, config.num_workers, "converting")
        if index is not None:
            write_json(os.path.join(path, "model.safetensors.index.json"), index)
        if beside is not None:
            copy_hf_files(beside, path)
        if fields is not None:
            write_json(os.path.join(path, "config.json"), fields)
        set_fields(os.path.join(path, "config.json"), dtype, llama.vocab_size)
        if card is not None:
            write_text(os.path.join(path, "README.md"), card)
        manifest = source | trained_with(folder) | run | {"versions": versions()}
        write_json(os.path.join(path, "manifest.json"), manifest)
        sync_files(path)
    return config.hf


def make_card(folder: str, config: MegatronToHf) -> tuple[str, dict[str, Any]]:
    """The model card of a run's checkpoint, and what manifest.json has to say for it; no path of this machine."""
    path = os.path.join(folder, "manifest.json")
    manifest = read_manifest(path) if os.path.exists(path) else {}
    try:
        card = model_card(os.path.basename(os.path.abspath(config.hf)), manifest)
        run = {name: manifest[name] for name in ("iteration", "consumed_samples", "tokenizer", "data")}
        run["tokenizer"] = {name: value for name, value in run["tokenizer"].items() if name not in ("path", "notes")}
        run["config"] = {name: manifest["config"][name] for name in ("training", "optimizer", "lr", "parallel")}
        return card, {"source": os.path.basename(folder), "run": run | {"versions": manifest["versions"]}}
    except KeyError as error:
        raise InputError(f"{path} has no field {error}; expected the manifest that a run writes") from error


def trained_with(folder: str) -> dict[str, Any]:
    """For the manifest of a HF folder: what the tokenizer of the checkpoint's training does, so that another is noticed."""
    path = os.path.join(folder, "manifest.json")
    known = read_manifest(path).get("tokenizer") if os.path.exists(path) else None
    if not isinstance(known, dict) or known.get("behaviour_sha256") is None or "name" not in known:
        return {}
    return {"tokenizer": {name: known[name] for name in ("name", "behaviour_sha256")}}


def described_by(folder: str, config: MegatronToHf) -> dict[str, Any] | None:
    """The config.json of a checkpoint of other software; None: it is one of ours, which has it in hf/.

    Raises:
        InputError: it cannot be told, or it is ours and an option for the others is given
    """
    if is_ours(folder):
        check_ours(folder, config)
        return None
    fields = foreign_config(folder, config.vocab_size)
    if config.tokenizer is not None:
        tokenizer = load_hf_tokenizer(config.tokenizer)
        if len(tokenizer) > fields["vocab_size"]:
            rows = f"{len(tokenizer)} tokens, more than the model's {fields['vocab_size']}"
            raise InputError(
                f"tokenizer {config.tokenizer} has {rows}; use the model's own tokenizer, or another vocab_size"
            )
        fields |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return fields


def shard_job(shard: Shard, infos: Mapping[str, TensorInfo], tensors: MegatronTensors) -> FileJob:
    """Writes one .safetensors file."""
    own = {name: infos[name] for name in shard.tensors}

    def make(name: str) -> torch.Tensor:
        tensor, dtype = tensors[name], dtype_of(own[name].dtype)
        check_numbers(tensor, dtype, f"{tensors.folder}: tensor {name}")
        return tensor.to(dtype)

    def write(path: str, written: Callable[[int], None]) -> None:
        write_safetensors(path, own, make, written)

    return FileJob(shard.name, sum(info.bytes for info in own.values()), write)


def say_size(folder: str, size: int, dtype: str) -> str:
    """Print what would be written into a folder, `size` bytes of weights; returns the folder."""
    logger.info(f"size: {decimal(size)} of {dtype} weights, into {folder}")
    return folder


def check_numbers(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise InputError if a number is NaN or infinite, or would be in `dtype`: such a model cannot be trained or used."""
    if not tensor.numel():
        return
    for bound in tensor.aminmax():
        if not torch.isfinite(bound):
            raise InputError(f"{what} holds numbers that are not finite (NaN or infinity)")
        if not torch.isfinite(bound.to(dtype)):
            most = f"{name_of(dtype)} holds at most {torch.finfo(dtype).max:g}"
            raise InputError(f"{what} holds {bound.item():g}, and {most}; use another --dtype")


def one_dtype(where: str, dtypes: Mapping[str, str], converted: bool) -> str:
    """The dtype that all tensors share: a checkpoint has one for all. Any of theirs if they are `converted`.

    Raises:
        InputError: they have several, or one that is not for weights
    """
    first, *_ = dtypes
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise InputError(f"{where}: tensor {name} is {dtype}; weights are {', '.join(DTYPES)}")
        if dtype != dtypes[first] and not converted:
            both = f"tensor {name} is {dtype} but {first} is {dtypes[first]}"
            raise InputError(f"{where}: {both}; use one dtype, or give --dtype")
    return dtypes[first]


def name_of(dtype: torch.dtype) -> str:
    """HF's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def set_fields(path: str, dtype: str, vocab_size: int) -> None:
    """Keep what config.json says of dtype and vocab_size true; the file is left byte for byte as it was when it is."""
    fields = load_json(path)
    true = {name: dtype for name in ("dtype", "torch_dtype") if fields.get(name) is not None} | {"vocab_size": vocab_size}
    if any(fields[name] != value for name, value in true.items()):
        write_json(path, fields | true)
