"""When a run's checkpoints are written, tried again and deleted."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.checkpoint.folders import make_tombstone, remove_unfinished, to_delete
from megatron_cpt.checkpoint.save_operation import CheckpointError, Request, SaveOperation, Structure
from megatron_cpt.checkpoint.staging import Staging, staging_size
from megatron_cpt.checkpoint.state import Progress
from megatron_cpt.config.run import CheckpointConfig

logger = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints: now or in the background, verified, committed by a rename; deletes old ones.

    All ranks make the same calls in the same order, between steps. A save that fails leaves nothing behind and all earlier
    checkpoints as they were; the run goes on and tries again later, with the state it then has.

    Attributes:
        committed: iteration of the newest checkpoint that this object has committed
        seconds_blocked: how long the last save held up its caller, from start to publication
    """

    def __init__(self, config: CheckpointConfig) -> None:
        """Remove what a killed run has left unfinished in the folder of the run. Needs the process groups.

        Args:
            config: where, how often tried, and what is kept
        """
        self.committed: int | None = None
        self.seconds_blocked = 0.0
        self._config = config
        self._operation: SaveOperation | None = None
        self._iteration = 0
        self._started = 0.0
        self._failures = 0  # in a row
        self._failed_at = 0.0
        self._error = ""
        self._structure: Structure | None = None
        self._staging = Staging()
        self._deletion: threading.Thread | None = None
        self._first = dist.get_rank() == 0
        if self._first:
            remove_unfinished(config.save)

    def prepare(self, chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None) -> None:
        """Get memory ready, in the background, so that the first asynchronous save is as quick as the later ones."""
        if self._config.async_save and next(chunks[0].parameters()).device.type == "cpu":
            self._staging.reserve(staging_size(chunks, optimizer))

    def save(
        self,
        chunks: Sequence[GPTModel],
        optimizer: MegatronOptimizer | None,
        hf_files: Mapping[str, bytes],
        manifest: dict[str, Any],
        progress: Progress,
        last: bool = False,
    ) -> None:
        """Write the state of now. Finishes the save under way first; this one only if it is not to be asynchronous.

        Args:
            chunks: model chunks of this rank, not wrapped in DDP
            optimizer: None leaves its state out, and the checkpoint cannot be resumed from
            hf_files: configuration and tokenizer of the HF model, which travel along; wanted on the first rank
            manifest: what went in; progress, versions and the files' sizes are added
            last: there is no later: finish it here, and try again here if it fails

        Raises:
            CheckpointError: with `last`, when it could not be written after all retries
        """
        self._finish_save()
        staging = self._staging if self._config.async_save and not last else None
        request = Request(self._config.save, chunks, optimizer, hf_files, manifest, progress, self._structure, staging)
        while True:
            self._start(request, progress.iteration)
            if last or not self._config.async_save:
                self._finish_save()
            if not (last and self._failures):
                return
            self._raise_if_used_up()
            time.sleep(self._config.save_retry_seconds)

    def poll(self) -> None:
        """Publish what has been written in the background; call it after every step. Without a save under way it is free."""
        if self._operation is not None and not self._operation.running():
            self._finish_save()

    def retry_due(self) -> bool:
        """Whether an earlier save failed and it is time to try again (`save` with the state of now); same on all ranks.

        Free unless a save has failed.

        Raises:
            CheckpointError: all retries have failed
        """
        if not self._failures or self._operation is not None:
            return False
        self._raise_if_used_up()
        due = [time.monotonic() - self._failed_at >= self._config.save_retry_seconds]
        dist.broadcast_object_list(due)  # clocks differ
        return due[0]

    def retry_pending(self) -> bool:
        """Whether an earlier save failed and will be tried again: until then another would fail like it."""
        return bool(self._failures)

    def finish(self) -> None:
        """Wait for the save under way, if any, and commit it; wait for deletions too."""
        self._finish_save()
        if self._deletion is not None:
            self._deletion.join()

    def _finish_save(self) -> None:
        operation, self._operation = self._operation, None
        if operation is not None:
            begin = time.perf_counter()
            try:
                operation.finish()
            except CheckpointError as error:
                self._failed(error)
            else:
                self._succeeded(operation.folder, begin)
            self.seconds_blocked += time.perf_counter() - begin

    def _start(self, request: Request, iteration: int) -> None:
        begin = time.perf_counter()
        self._started, self._iteration = time.monotonic(), iteration
        try:
            self._operation = SaveOperation(request)
        except CheckpointError as error:
            self._failed(error)
        else:
            self._structure = self._operation.structure
        self.seconds_blocked = time.perf_counter() - begin

    def _succeeded(self, folder: str, begin: float) -> None:
        self.committed, self._failures = self._iteration, 0
        if self._first:
            seconds = time.monotonic() - self._started
            blocked = self.seconds_blocked + time.perf_counter() - begin
            logger.info(f"saved {folder} in {seconds:.1f} s; training waited {blocked:.2f} s")
            self._delete_old()

    def _failed(self, error: CheckpointError) -> None:
        self._failures, self._failed_at, self._error = self._failures + 1, time.monotonic(), str(error)
        if self._first:
            left = self._config.save_retries + 1 - self._failures
            again = f"trying again in {self._config.save_retry_seconds:g} s ({left} left)" if left > 0 else "giving up"
            logger.warning(f"the checkpoint of iteration {self._iteration} was not written: {error}; {again}")

    def _raise_if_used_up(self) -> None:
        if self._failures > self._config.save_retries:
            raise CheckpointError(
                f"no checkpoint could be written to {self._config.save} in {self._failures} attempts: {self._error}"
            )

    def _delete_old(self) -> None:
        """Apply retention: old checkpoints stop counting at once, and their files go in the background."""
        config = self._config
        if config.keep_last is None:
            return
        try:
            tombstones = [
                make_tombstone(folder) for folder in to_delete(config.save, config.keep_last, config.keep_every, config.load)
            ]
        except OSError as error:
            logger.warning(f"an old checkpoint could not be deleted: {error}")
            return
        if self._deletion is not None:
            self._deletion.join()
        self._deletion = threading.Thread(target=_remove, args=(tombstones,), name="delete-checkpoints", daemon=True)
        self._deletion.start()


def _remove(folders: list[str]) -> None:
    for folder in folders:  # what cannot be removed is tried again at the next start
        shutil.rmtree(folder, ignore_errors=True)
