"""The order of the data on a real GPU, with memory and streams of torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_orders import Case, plan

from megatron_cpt.mixture.order.cuda import LIBRARY, DeviceOrder
from megatron_cpt.training.device_order import OnDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="make cuda builds the library"),
]


@pytest.mark.parametrize("sizes", [[7, 300, 4096], [5000, 2**40, 11]])
@pytest.mark.parametrize("block_size", [1, 1024, 10_000])
def test_a_gpu_gives_the_same_places(sizes: list[int], block_size: int) -> None:
    case = Case([plan(Fraction(1, 3), 1, [Fraction(1), Fraction(1), Fraction(2)])], sizes, 5, block_size)
    order, count, first = case.order(), 1_500_000, 12_345
    wanted = order.lookup_many(first, count)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = [torch.full((count,), -1, dtype=dtype, device="cuda") for dtype in (torch.int32, *[torch.int64] * 3)]
        device_order = DeviceOrder(order)
        device_order.locate_into(first, count, *(tensor.data_ptr() for tensor in found), stream.cuda_stream)
    stream.synchronize()
    for tensor, array in zip(found, wanted, strict=True):
        assert np.array_equal(tensor.cpu().numpy(), array)


def test_an_export_on_a_gpu_has_the_same_places() -> None:
    order = Case([plan(Fraction(1, 3), 1, [Fraction(1), Fraction(1), Fraction(2)])], [7, 300, 4096], 5, 1024).order()
    for found, wanted in zip(OnDevice()(order, 123, 70_000), order.lookup_many(123, 70_000), strict=True):
        assert np.array_equal(found, wanted)
