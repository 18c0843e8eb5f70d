"""Runs on packed samples are the same under every parallel layout. Real tools, gloo, torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import VARIANTS, read_rows
from tiny_runs import Layout, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("packed_layouts"), tiny_tokenizer_dir, **VARIANTS["tied"])


PACKED = ("--data.reset_attention_mask", "true", "--data.eod_mask_loss", "true", "--training.train_iters", "3")


@pytest.fixture(scope="module")
def single(runs: Runs) -> Path:
    return runs.train("single", Layout(), *PACKED)


def test_the_settings_reach_the_run(runs: Runs, single: Path) -> None:
    plain = read_rows(runs.train("plain", Layout(), *PACKED[4:]))
    packed = read_rows(single)
    assert plain[0]["validation"]["en"]["text_bytes"] > packed[0]["validation"]["en"]["text_bytes"] > 0
    for before, after in zip(plain, packed, strict=True):
        for key in {"loss", "grad_norm"} & before.keys():
            assert abs(before[key] - after[key]) > 1e-4 * before[key]


# Other micro-batches mean other splits of the counted targets, which must not change how much each weighs.
@pytest.mark.parametrize(
    ("layout", "micro_batch_size"),
    [(Layout(tp=2, sp=True), 2), (Layout(pp=2), 2), (Layout(pp=4), 1), (Layout(dp=2), 1)],
    ids=str,
)
def test_every_layout_trains_alike_on_packed_samples(
    runs: Runs, single: Path, layout: Layout, micro_batch_size: int
) -> None:
    folder = runs.train(f"layout-{layout}", layout, *PACKED, "--training.micro_batch_size", str(micro_batch_size))
    rows, expected = read_rows(folder), read_rows(single)
    assert len([row for row in expected if "loss" in row]) == 3
    for row, wanted in zip(rows, expected, strict=True):
        for key in {"loss", "grad_norm"} & wanted.keys():
            assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=0), (row["iteration"], key)
        for name, result in wanted.get("validation", {}).items():
            for key in ("loss", "bits_per_byte", "tokens", "text_bytes"):
                assert row["validation"][name][key] == pytest.approx(result[key], rel=1e-5, abs=0), (name, key)
