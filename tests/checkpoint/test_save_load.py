"""A checkpoint of one layout is the same checkpoint in any other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from ranks import Layout, build, fake_step, run_ranks, tensors_of

from megatron_cpt.checkpoint.save_load import Progress, load_checkpoint, take_rates

LAYOUTS = {
    "single": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "dp2": Layout(data=2),
    "interleaved": Layout(pipeline=2, chunks=2),
}


def train_and_save(rank: int, hf: str, layout: Layout, root: str) -> None:
    trained = build(hf, layout)
    fake_step(trained, seed=1)
    trained.save(root, 1)


def load_and_save(rank: int, hf: str, layout: Layout, source: str, root: str) -> None:
    trained = build(hf, layout, step=False)
    assert load_checkpoint(source, trained.chunks, trained.optimizer) == Progress(1, 8)
    steps = {group["step"] for group in trained.optimizer.param_groups if group["params"]}
    assert steps == {2}
    trained.save(root, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [("interleaved", "single"), ("single", "interleaved"), ("dp2", "tp2"), ("tp2", "pp2"), ("pp2", "interleaved")],
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_weights_and_optimizer_survive_another_layout(
    first: str, second: str, kind: str, tied_hf: str, tiny_hf: str, tmp_path: Path
) -> None:
    if kind == "tied" and "interleaved" not in (first, second):
        pytest.skip("tied embeddings are special in pipelines only")
    hf = tied_hf if kind == "tied" else tiny_hf
    run_ranks(LAYOUTS[first], train_and_save, hf, LAYOUTS[first], str(tmp_path))
    run_ranks(LAYOUTS[second], load_and_save, hf, LAYOUTS[second], str(tmp_path / "iter_0000001"), str(tmp_path))
    before, after = (tensors_of(str(tmp_path / name)) for name in ("iter_0000001", "iter_0000002"))
    assert before.keys() == after.keys()
    assert len(before) == 4 * (8 + (kind == "untied"))  # weights and three of the optimizer; layers are stacked
    for name in before:
        assert torch.equal(before[name], after[name]), name


def draw() -> list[float]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [torch.rand(1).item(), tracked]


def save_then_draw(rank: int, hf: str, layout: Layout, root: str) -> list[float]:
    trained = build(hf, layout)
    torch.manual_seed(100 + rank)
    draw()
    trained.save(root, 1)
    return draw()


def load_then_draw(rank: int, hf: str, layout: Layout, folder: str, whole_state: bool) -> tuple[list[float], list[float]]:
    """What is drawn after loading, and what would have been drawn without."""
    trained = build(hf, layout)
    states = torch.get_rng_state(), get_cuda_rng_tracker().get_states()
    without = draw()
    torch.set_rng_state(states[0])
    get_cuda_rng_tracker().set_states(states[1])
    load_checkpoint(folder, trained.chunks, trained.optimizer if whole_state else None)
    return draw(), without


def test_random_numbers_go_on_in_the_same_layout_and_are_left_alone_in_another(tiny_hf: str, tmp_path: Path) -> None:
    layout = Layout(pipeline=2)
    drawn = run_ranks(layout, save_then_draw, tiny_hf, layout, str(tmp_path))
    assert drawn[0] != drawn[1]
    folder = str(tmp_path / "iter_0000001")
    assert [after for after, _ in run_ranks(layout, load_then_draw, tiny_hf, layout, folder, True)] == drawn
    for other, whole_state in ((Layout(data=2), True), (Layout(), True), (layout, False)):
        for after, without in run_ranks(other, load_then_draw, tiny_hf, other, folder, whole_state):
            assert after == without


def test_groups_have_another_learning_rate_than_their_checkpoint() -> None:
    """By which megatron-core 0.19 pairs them; a run that goes on so is in tests/training/test_damaged.py."""
    now = SimpleNamespace(param_groups=[{"max_lr": 2e-3, "min_lr": None, "wd_mult": 1.0}, {"max_lr": 2e-3, "min_lr": None}])
    saved = {"optimizer": {"param_groups": [{"max_lr": 1e-3, "min_lr": None, "wd_mult": 1.0}, {"wd_mult": 0.0, "step": 3}]}}
    take_rates(saved, now)  # type: ignore[arg-type]
    assert saved["optimizer"]["param_groups"] == [
        {"max_lr": 2e-3, "min_lr": None, "wd_mult": 1.0},
        {"wd_mult": 0.0, "step": 3},
    ]
