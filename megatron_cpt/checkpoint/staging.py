"""Memory for the snapshot of an asynchronous save on CPU.

A fork alone would be a snapshot too, but a dear one: the next step would fault on each page it writes to, and copy it, which
took seconds for 2.1 GB where copying it beforehand takes 0.3 s. So the live tensors stay out of the forked processes
(MADV_DONTFORK), and these read a copy in memory that is shared with them and used again for the next save.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import WriteBucket
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

MADV_DONTFORK, MADV_DOFORK = 10, 11  # <linux/mman.h>
ALIGNMENT = 64  # bytes, of each tensor in the staging memory


class Staging:
    """A block of memory shared with forked processes, kept from one save to the next."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None

    def reserve(self, size: int) -> None:
        """Get `size` bytes ready in the background: new memory costs several times what copying into it does."""
        if size > self._block.numel():
            self._allocate(size)
            self._thread = threading.Thread(target=self._block.zero_, name="reserve-staging", daemon=True)
            self._thread.start()

    def copy(self, buckets: Sequence[WriteBucket]) -> list[WriteBucket]:
        """The same buckets with their tensors copied into this memory, in place of what was there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        tensors = [tensor for _, _, (_, items) in buckets for _, tensor in items]
        size = sum(room(tensor.nbytes) for tensor in tensors)
        if size > self._block.numel():
            self._allocate(size)
        start = 0
        copies: list[tuple[Any, list[Any]]] = []
        for _, _, (objects, items) in buckets:
            copies.append((objects, []))
            for item, tensor in items:
                copies[-1][1].append((item, self._put(tensor, start)))
                start += room(tensor.nbytes)
        return [(path, name, copy) for (path, name, _), copy in zip(buckets, copies, strict=True)]

    def _allocate(self, size: int) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)  # the old memory goes first
        self._block = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)

    def _put(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        if tensor.numel() == 0:
            return tensor
        # by way of numpy, which gives a tensor with a storage of its own: torch.save writes whole storages
        place = torch.from_numpy(self._block[start : start + tensor.nbytes].numpy())
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def room(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def staging_size(chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None) -> int:
    """Bytes that a save of this rank will need at most: weights, and fp32 weights and two moments of the optimizer."""
    weights = [param for chunk in chunks for param in chunk.parameters()]
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    owned = [param for part in parts if part is not None for group in part.param_groups for param in group["params"]]
    # A tensor may be cut in up to three boxes (two of them less than a row), each with a room of its own
    return sum(room(x.nbytes) for x in weights) + 3 * sum(room(4 * x.numel()) + 2 * ALIGNMENT for x in owned)


def live_tensors(chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None) -> list[torch.Tensor]:
    """What training writes to: weights, gradients, optimizer state."""
    tensors: list[torch.Tensor] = []
    for chunk in chunks:
        for param in chunk.parameters():
            tensors += [param, *(grad for grad in (getattr(param, "main_grad", None), param.grad) if grad is not None)]
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        for state in part.optimizer.state.values() if part is not None else []:
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return tensors


@contextlib.contextmanager
def kept_from_children(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Processes forked within the block do not have the memory of these tensors (Linux; elsewhere they have it)."""
    if sys.platform != "linux":
        yield
        return
    page = mmap.PAGESIZE
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    pages = {begin: -(-begin // page) * page for begin in storages}
    ranges = [(first, (begin + storages[begin]) // page * page - first) for begin, first in pages.items()]
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    ranges = [(first, length) for first, length in ranges if length > 0]
    try:
        for first, length in ranges:
            advise(first, length, MADV_DONTFORK)
        yield
    finally:
        for first, length in ranges:
            advise(first, length, MADV_DOFORK)
