"""The order of the data on a GPU, for those who want places of samples in memory of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.mixture.order.cuda import LIBRARY, DeviceOrder
from megatron_cpt.mixture.order.order import SampleLocations, SampleOrder
from megatron_cpt.utils.errors import InputError


def check_library() -> None:
    """Raise InputError unless the order was compiled for GPUs."""
    if not LIBRARY.exists():
        raise InputError(f"device is cuda; expected cpu, or {LIBRARY}, which make cuda builds")


class OnDevice:
    """Computes orders on a CUDA device. The tests use the library that is compiled for the CPU, on "cpu"."""

    def __init__(self, device: str = "cuda", library: Path = LIBRARY) -> None:
        """InputError: there is no such device."""
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda; expected cpu: torch sees no GPU here")
        self._device, self._library, self._orders = device, library, dict[int, Any]()

    def __call__(self, order: SampleOrder, first: int, count: int) -> SampleLocations:
        """Places of samples, see `Lookup`."""
        import torch

        if id(order) not in self._orders:
            self._orders[id(order)] = DeviceOrder(order, self._library)
        kinds = (torch.int32, torch.int64, torch.int64, torch.int64)
        found = [torch.empty(count, dtype=kind, device=self._device) for kind in kinds]
        stream = torch.cuda.current_stream().cuda_stream if self._device == "cuda" else None
        self._orders[id(order)].locate_into(first, count, *(column.data_ptr() for column in found), stream)
        columns: list[np.ndarray] = [column.cpu().numpy() for column in found]
        return SampleLocations(*columns)
