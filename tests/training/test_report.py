"""A report can be made of any run: short or long, stopped or finished, with and without validation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_logs import record, results, start, step_row, validated

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.errors import InputError
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.report import main, ranges, write_report
from megatron_cpt.training.report_figure import binned, limit, running_median
from megatron_cpt.training.validation import ValidationResult


def report(folder: Path) -> str:
    """The text, after a look at the picture: it is one, and not empty."""
    text = Path(write_report(str(folder))).read_text()
    picture = np.asarray(Image.open(folder / "report.png").convert("L"))
    assert picture.shape == (910, 2145 if "## Validation" in text else 1430)
    assert 0.01 < (picture < 200).mean() < 0.3
    assert not list(folder.glob("*.tmp*"))
    return text


def test_what_the_report_says(tmp_path: Path) -> None:
    folder = tmp_path / "my_run"
    with RunLog(str(folder), LoggingConfig(), 0) as log:
        layout = {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 1,
            "data_parallel_size": 4,
            "context_parallel_size": 1,
            "device": "cpu",
        }
        hosts = [{"hostname": "node1", "ranks": [0, 1, 2, 3], "devices": ["chip"] * 4}]
        start(log, layout=layout, hosts=hosts, versions={"torch": "2.13"})
        validated(log, 0, results())
        for iteration in range(1, 12):
            skipped = {"loss": float("nan"), "skipped": "loss is nan"} if iteration == 5 else {}
            log.step(step_row(iteration, tokens_per_second=1000.0 + iteration, **skipped), 20)
        validated(log, 11, results(0.9))
        log.metrics({"iteration": 11, "peak_memory_bytes": 3_000_000_000})
        (folder / "iter_0000011").mkdir()
        log.status("stopped", 11, 20, "time limit")
        log.finish()
    lines = (folder / "report.md").read_text().splitlines()
    for line in (
        "# Run my\\_run",
        "| state | stopped at step 11 of 20: time limit |",
        "| layout | TP2 x PP1 x DP4 on cpu |",
        "| tokens | 5,632 |",
        "| training loss, first and last step | 3.9900, 3.8900 |",
        "| skipped steps | 1 |",
        "| peak memory, all processes | 3.0 GB |",
        "| checkpoints | iter\\_0000011 |",
        "| zh | zh | 4.0000 → 3.6000 | 54.60 → 36.60 | 2.0000 → 1.8000 | 0 | -10.0 % | gain |",
        "| en | en | 2.0000 → 2.2222 | 7.39 → 9.23 | 1.0000 → 1.1111 | 0 | +11.1 % | forgetting |",
        "ALMR realised so far: 0.500000. Asked for the whole run: 0.500000, planned: 0.500000.",
        "| en\\_wiki | general | en | 2,816 | 50.00% |",
        "| tokens/s | 1,006 | 1,002 | 1,010 |",
        "| MFU | 41.20% | 41.20% | 41.20% |",
        "| 5 | loss is nan |",
        "| host node1 | ranks 0-3: chip |",
        "| torch | 2.13 |",
    ):
        assert line in lines
    assert (folder / "report.png").exists()


def rows_of(steps: int, sets: int, every: int) -> list[dict[str, Any]]:
    """A run with noise, spikes and skipped steps."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for iteration in range(steps + 1):
        if iteration:
            skipped = {"loss": None, "grad_norm": None, "skipped": "loss is nan"} if iteration % 97 == 3 else {}
            loss = {"loss": float(2 + 1 / iteration + 0.1 * random.standard_normal())}
            rows.append(step_row(iteration, **(loss | skipped)))
        if sets and (iteration % every == 0 or iteration == steps):
            figures = {"loss": 2.0, "bits_per_byte": 1 + 0.1 * iteration / steps, "language": "zh", "perplexity": 7.4}
            rows.append({"iteration": iteration, "validation": {f"set{n}": figures for n in range(sets)}})
    return rows


@pytest.mark.parametrize(("steps", "sets"), [(1, 1), (5, 2), (60, 0), (50_000, 6)])
def test_runs_of_any_length_and_number_of_sets(tmp_path: Path, steps: int, sets: int) -> None:
    record(tmp_path, 1, 1)
    rows = rows_of(steps, sets, max(steps // 20, 1))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = time.perf_counter()
    text = report(tmp_path)
    assert time.perf_counter() - begin < 60
    assert text.count("| set") == sets + (sets > 0)


def test_a_run_of_which_every_step_was_skipped(tmp_path: Path) -> None:
    record(tmp_path, 1, 4, loss=float("nan"), grad_norm=float("nan"), skipped="loss is nan")
    assert "| skipped steps | 4 |" in report(tmp_path)


def test_a_run_that_stopped_before_its_first_step(tmp_path: Path) -> None:
    with RunLog(str(tmp_path), LoggingConfig(), 0) as log:
        start(log)
        log.finish()  # nothing at all yet
        assert not (tmp_path / "report.png").exists()
        validated(log, 0, results())
    text = report(tmp_path)
    assert "1 evaluations, the last at step 0." in text
    assert "%" not in text


def test_no_report_where_none_is_wanted(tmp_path: Path) -> None:
    with RunLog(str(tmp_path), LoggingConfig(report=False), 0) as log:
        start(log)
        validated(log, 0, results())
        log.finish()
    assert (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "report.md").exists()


def test_names_may_be_anything(tmp_path: Path) -> None:
    names = ("_hidden", "$x^{", "中文|集", "<b>*a*")
    with RunLog(str(tmp_path), LoggingConfig(), 0) as log:
        start(log)
        for iteration in (0, 5):
            validated(log, iteration, [ValidationResult(name, "zh", 2.0, 1.0 + iteration, 1, 1) for name in names])
    text = report(tmp_path)
    for name in ("\\_hidden", "$x^{", "中文\\|集", "\\<b>\\*a\\*"):
        assert f"| {name} | zh |" in text


def test_the_command_makes_it_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, 1, 3)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.md'}\n"
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not the folder of a run: run.json is missing" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"run\.json is missing"):
        write_report(str(tmp_path / "nowhere"))


def test_a_spike_does_not_move_the_median_nor_the_scale() -> None:
    from matplotlib.figure import Figure

    y = np.r_[np.linspace(2.0, 1.0, 300), 50.0, np.nan, np.full(298, 1.0)]
    places, smooth = running_median(y, 12)
    assert places[-1] == 599
    assert smooth.max() == np.median(y[:6])
    assert np.isfinite(smooth).all()
    axis = Figure().subplots()
    axis.plot(y)
    limit(axis, y)
    assert axis.get_ylim()[1] < 3.0


def test_bins_keep_the_extremes() -> None:
    x = np.arange(1.0, 5001.0)
    y = np.where(x == 2500, 9.0, 1.0)
    place, mean, low, high = binned(x, y)
    assert len(place) == 1000
    assert (high.max(), low.min()) == (9.0, 1.0)
    assert mean.mean() == pytest.approx(y.mean())


def test_ranks_are_written_as_ranges() -> None:
    assert ranges([8, 0, 1, 2, 3, 5]) == "0-3, 5, 8"
