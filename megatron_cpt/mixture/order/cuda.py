"""The order of the data on a GPU: csrc/sampling_cuda.cu, which `make cuda` compiles, called with pointers to device memory.

Without a GPU the tests run the same source compiled for the CPU (csrc/cuda_emulation.h).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.mixture.order.order import SampleOrder
from megatron_cpt.utils.errors import InputError

LIBRARY = Path(__file__).parents[2] / "lib" / "libmegatron_cpt_cuda.so"  # not among modules: Python would take it for one
ERROR_BYTES = 512


class DeviceOrder:
    """A SampleOrder whose places are computed on the current CUDA device."""

    def __init__(self, order: SampleOrder, library: Path = LIBRARY) -> None:
        """InputError: the library was not built, or the device cannot take the order."""
        self._library = _load(library)
        tables = order.tables()
        arrays = [np.ascontiguousarray(array) for array in (tables.nodes, tables.stages, tables.base, tables.corpora)]
        nodes, stages, base, corpora = (array.ctypes.data for array in arrays)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._handle = self._library.mcpt_order_create(
            *(nodes, len(tables.nodes), stages, len(tables.stages), base, corpora, len(tables.corpora)),
            *(tables.seed, tables.seq_length, tables.block_size, tables.block_origin, error, ERROR_BYTES),
        )
        if not self._handle:
            raise InputError(f"the data order cannot be set up on the GPU: {error.value.decode()}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.mcpt_order_destroy(self._handle)

    def locate_into(
        self, first: int, count: int, corpus: int, epoch: int, sample: int, begin: int, stream: int | None = None
    ) -> None:
        """Places of samples first to first + count - 1, queued on `stream` (the default one when None).

        `corpus`: address of int32 (count,) on the device; `epoch`, `sample` and `begin`: of int64 (count,). With torch,
        `tensor.data_ptr()` and `torch.cuda.current_stream().cuda_stream`. ValueError: samples that cannot be asked for.
        """
        error = ctypes.create_string_buffer(ERROR_BYTES)
        failed = self._library.mcpt_order_locate(
            self._handle, first, count, corpus, epoch, sample, begin, stream, error, ERROR_BYTES
        )
        if failed:
            raise ValueError(error.value.decode())


def _load(library: Path) -> Any:
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as problem:
        raise InputError(f"{library}: cannot be loaded ({problem}); `make cuda` builds it") from None
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    loaded.mcpt_order_create.restype = pointer
    loaded.mcpt_order_create.argtypes = [
        *(pointer, integer, pointer, integer, pointer, pointer, integer, ctypes.c_uint64),
        *(integer, integer, integer, text, integer),
    ]
    loaded.mcpt_order_locate.argtypes = [
        *(pointer, integer, integer, pointer, pointer, pointer, pointer, pointer, text, integer)
    ]
    loaded.mcpt_order_destroy.argtypes = [pointer]
    return loaded
