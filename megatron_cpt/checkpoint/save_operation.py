"""One attempt to write one checkpoint: planned by all ranks, written by forked processes, checked, committed by the first.

Every step that can fail on one rank alone ends in an exchange, so that all ranks go on or give up together.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.background import ForkedWork, WorkerError, error_text
from megatron_cpt.checkpoint.checksums import file_checksum, sealed
from megatron_cpt.checkpoint.folders import publish_folder, temporary_name
from megatron_cpt.checkpoint.layout import check_complete, checkpoint_name, versions, write_format, write_tracker
from megatron_cpt.checkpoint.staging import Staging, kept_from_children, live_tensors
from megatron_cpt.checkpoint.state import Progress, state_to_save
from megatron_cpt.checkpoint.writing import Written, bucket_writer, common_writer
from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.files import fsync, write_json

FILES_PER_RANK = 2  # written at the same time, by a process each


class CheckpointError(RunError):
    """A checkpoint could not be written. Raised on all ranks, with the same text."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Which rank writes what into which file; the same for every checkpoint of a run."""

    central_plan: SavePlan
    local_plan: SavePlan
    metadata: Metadata | None  # on the first rank


@dataclasses.dataclass(frozen=True)
class Request:
    """What to save, and where.

    Attributes:
        root: folder of the run
        chunks: model chunks of this rank, not wrapped in DDP
        optimizer: None leaves its state out
        hf_files: configuration and tokenizer of the HF model, which travel along (`read_hf_files`); wanted on the first rank
        manifest: what went in; progress, versions and files are added
        progress: None for a converted checkpoint ("release")
        structure: of an earlier attempt with the same model and optimizer, which is not worked out again then
        staging: memory for a copy of the state, so that training can go on while it is written; without it training has to
            wait for the end (on CPU: elsewhere the state is copied anyway)
    """

    root: str
    chunks: Sequence[GPTModel]
    optimizer: MegatronOptimizer | None
    hf_files: Mapping[str, bytes]
    manifest: dict[str, Any]
    progress: Progress | None
    structure: Structure | None = None
    staging: Staging | None = None


class SaveOperation:
    """The writing of one checkpoint, in the background from the start on; all ranks call every method.

    Attributes:
        folder: of the checkpoint, once `finish` has returned
        structure: for later requests
    """

    def __init__(self, request: Request) -> None:
        """Plan, and start the writers. What they write is the state of now.

        Raises:
            CheckpointError: the temporary folder cannot be made
        """
        progress = request.progress
        self.folder = os.path.join(request.root, checkpoint_name(progress.iteration if progress is not None else None))
        self._request = request
        self._device = next(request.chunks[0].parameters()).device
        self._temporary = temporary_name(self.folder)
        self._workers: list[ForkedWork[list[Written]]] = []
        self._error: str | None = None
        self._make_folder()
        state = state_to_save(request.chunks, request.optimizer, progress)
        # The ranks' parts are compared with each other once; they stay the same
        sharded, common = save_preprocess(state, validate_access_integrity=request.structure is None)
        self._writer, self.structure = plan_save(sharded, self._temporary, request.structure)
        self._start_writers(common)

    def running(self) -> bool:
        """Whether a writer of any rank is still at work."""
        alive = torch.tensor(sum(worker.running() for worker in self._workers), device=self._device)
        dist.all_reduce(alive)
        return bool(alive.item())

    def finish(self) -> None:
        """Wait for the writers, check what they wrote and commit it.

        Raises:
            CheckpointError: it could not be written; nothing is left of it
        """
        written: list[Written] = []
        for worker in self._workers:
            try:
                written += worker.result()
            except WorkerError as error:
                self._error = self._error or str(error)
        first = dist.get_rank() == 0
        parts: list[tuple[str | None, list[Written]]] | None = [(None, [])] * dist.get_world_size() if first else None
        dist.gather_object((self._error, written), parts)
        if parts is not None:
            self._error = next((error for error, _ in parts if error), None)
            if self._error is None:
                try:
                    self._publish([item for _, items in parts for item in items])
                except (OSError, InputError) as error:
                    self._error = error_text(error)
        self._agree(self._error)

    def _make_folder(self) -> None:
        error = None
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(self._temporary, ignore_errors=True)
                os.makedirs(self._temporary)
            except OSError as problem:
                error = error_text(problem)
        self._agree(error)

    def _agree(self, error: str | None) -> None:
        """Raise the first rank's error on all ranks, after removing what was written."""
        if error is not None and dist.get_rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        shared = [error]
        dist.broadcast_object_list(shared)
        if shared[0] is not None:
            raise CheckpointError(shared[0])

    def _start_writers(self, common: dict[str, Any]) -> None:
        """Fork a process per file, or one for all when nobody waits. An error here is one rank's, so `finish` reports it."""
        request = self._request
        try:
            buckets, live = self._snapshot()
            work = [bucket_writer(bucket, [self._writer.transforms]) for bucket in buckets]
            if dist.get_rank() == 0:
                work.append(common_writer(self._temporary, common, request.hf_files))
            with kept_from_children(live):
                # A fork takes time that grows with the memory of the process
                for jobs in [work] if request.staging is not None else [[job] for job in work]:
                    self._workers.append(ForkedWork(partial(run_all, jobs)))
        except OSError as error:
            self._error = error_text(error)
            for worker in self._workers:
                worker.kill()
        # The forked processes have their copies; the state dict would only keep memory alive here.
        self._writer.write_buckets = None

    def _snapshot(self) -> tuple[list[WriteBucket], list[torch.Tensor]]:
        """What to write, and the tensors that the forked processes need not have for that."""
        request, buckets = self._request, self._writer.write_buckets
        if self._device.type != "cpu":
            return FileSystemWriterAsync.preload_tensors(buckets), []
        if request.staging is not None:
            return request.staging.copy(buckets), live_tensors(request.chunks, request.optimizer)
        return buckets, []

    def _publish(self, written: list[Written]) -> None:
        """Write what describes the files, check that it holds, and give the folder its name."""
        request, folder = self._request, self._temporary
        sizes = {name: size for item in written for name, size in item.sizes.items()}
        checksums = {name: value for item in written for name, value in item.checksums.items()}
        self._writer.finish(self.structure.metadata, [item.results for item in written])  # .metadata
        check_places([result for item in written for result in item.results], sizes)
        write_format(folder)
        fsync(os.path.join(folder, "metadata.json"))
        for name in (".metadata", "metadata.json"):
            sizes[name] = os.path.getsize(os.path.join(folder, name))
            checksums[name] = file_checksum(os.path.join(folder, name))
        state = {"optimizer": request.optimizer is not None, "versions": versions(), "files": dict(sorted(sizes.items()))}
        if request.progress is not None:
            state |= dataclasses.asdict(request.progress)
        write_json(os.path.join(folder, "manifest.json"), sealed(request.manifest | state, checksums))
        check_complete(folder)
        publish_folder(folder, self.folder)
        write_tracker(request.root, request.progress.iteration if request.progress is not None else None)


def plan_save(sharded: dict[str, Any], folder: str, structure: Structure | None) -> tuple[FileSystemWriterAsync, Structure]:
    """Plan the files of this rank, together with the other ranks unless the structure is known.

    The steps of megatron-core's TorchDistSaveShardedStrategy.async_save.
    """
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = FileSystemWriterAsync(folder, thread_count=FILES_PER_RANK)
    (_, metadata, _), central_plan, local_plan, *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key),
        writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        cached_ckpt_structure=structure and (structure.central_plan, structure.local_plan, True),
    )
    return writer, structure or Structure(central_plan, local_plan, metadata)


def run_all(jobs: Sequence[Callable[[], Written]]) -> list[Written]:
    """The results of several jobs."""
    return [job() for job in jobs]


def check_places(results: list[WriteResult], sizes: dict[str, int]) -> None:
    """Every tensor of .metadata lies within its file."""
    for result in results:
        place = result.storage_data
        if place.offset + place.length > sizes.get(place.relative_path, -1):
            raise OSError(f"{result.index.fqn} is not within {place.relative_path}")


def save_checkpoint(
    root: str,
    chunks: Sequence[GPTModel],
    hf_files: Mapping[str, bytes],
    manifest: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    progress: Progress | None = None,
) -> str:
    """Write one checkpoint below `root` now (all ranks call this); see Request. Returns its folder.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched
    """
    attempt = SaveOperation(Request(root, chunks, optimizer, hf_files, manifest, progress))
    attempt.finish()
    return attempt.folder
