"""What a rank says it has is what megatron-core would have gathered."""

from __future__ import annotations

import math
from pathlib import Path

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from ranks import Layout, Trained, build, run_ranks, tensors_of

from megatron_cpt.checkpoint.state import OPTIMIZER_METADATA, alias, boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    parts = []
    for offset, extent in boxes(tuple(shape), start, end):
        assert len(offset) == len(extent) == len(shape)
        box = whole
        for axis, (first, length) in enumerate(zip(offset, extent, strict=True)):
            box = box.narrow(axis, first, length)
        parts.append(box.flatten())
    assert len(parts) <= 2 * len(shape) - 1
    found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    assert found.tolist() == list(range(start, end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_an_alias_is_the_same_memory_and_no_more(dtype: torch.dtype) -> None:
    buffer = torch.arange(100).to(dtype)
    part = buffer[10:40].view(5, 6)
    same = alias(part)
    assert torch.equal(same, part)
    assert same.dtype == dtype
    assert same.untyped_storage().nbytes() == same.nbytes
    buffer[11] = 77
    assert same[0, 1] == 77
    assert alias(buffer[5]).shape == ()


def save_both_ways(rank: int, hf: str, layout: Layout, root: str) -> None:
    trained = build(hf, layout)
    trained.save(root, 1)
    save_as_megatron(trained, f"{root}/megatron")


def save_as_megatron(trained: Trained, folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    weights = trained.chunks[0].sharded_state_dict()
    state = {"model": weights, "optimizer": trained.optimizer.sharded_state_dict(weights, metadata=OPTIMIZER_METADATA)}
    dist_checkpointing.save(state, folder)


@pytest.mark.parametrize("layout", [Layout(), Layout(data=3), Layout(tensor=2, data=2), Layout(pipeline=2)], ids=str)
def test_optimizer_state_is_what_megatron_gathers(layout: Layout, tied_hf: str, tmp_path: Path) -> None:
    run_ranks(layout, save_both_ways, tied_hf, layout, str(tmp_path))
    ours, theirs = tensors_of(str(tmp_path / "iter_0000001")), tensors_of(str(tmp_path / "megatron"))
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[2] for name in ours if name.startswith("optimizer.")} == {"param", "exp_avg", "exp_avg_sq"}
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
