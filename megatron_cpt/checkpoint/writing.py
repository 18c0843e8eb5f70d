"""Files of a checkpoint: written, forced to disk and read back. Runs in the forked processes of a save."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.checksums import file_checksum
from megatron_cpt.checkpoint.layout import write_hf_files
from megatron_cpt.checkpoint.zip_reader import check_archives
from megatron_cpt.utils.files import fsync, sync_files


@dataclass(frozen=True)
class Written:
    """What one writer process has written, and found again."""

    sizes: dict[str, int]  # file, relative to the checkpoint's folder -> bytes
    checksums: dict[str, str]  # of these files
    results: list[WriteResult]  # where in the files the tensors are, for .metadata


def bucket_writer(bucket: WriteBucket, transforms: list[Any]) -> Callable[[], Written]:
    """Work that writes one .distcp file and checks it."""

    def write() -> Written:
        path, name, _ = bucket
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        counts: queue.Queue[int] = queue.Queue()
        counts.put(0)  # megatron-core counts its writers down
        FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, counts, use_fsync=True)
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        check_archives(path, [(r.storage_data.offset, r.storage_data.length) for r in outcome])
        return Written({name: os.path.getsize(path)}, {name: file_checksum(path)}, outcome)

    return write


def common_writer(folder: str, common: dict[str, Any], hf_files: Mapping[str, bytes]) -> Callable[[], Written]:
    """Work that writes what is not a tensor of one rank: common.pt and the HF files."""

    def write() -> Written:
        path = os.path.join(folder, COMMON_STATE_FNAME)
        torch.save(common, path)
        fsync(path)
        check_archives(path, [(0, os.path.getsize(path))])
        hf = os.path.join(folder, "hf")
        write_hf_files(hf_files, hf)
        sizes = {os.path.join("hf", name): size for name, size in sync_files(hf).items()}
        sizes[COMMON_STATE_FNAME] = os.path.getsize(path)
        return Written(sizes, {name: file_checksum(os.path.join(folder, name)) for name in sizes}, [])

    return write
