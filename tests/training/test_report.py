"""A report can be made of any run: short or long, stopped or finished, with and without validation."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_logs import record, results, start, step_row, validated

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.mixture.stages import Schedule, StagePlan
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.report import main, parameters, read_run_folder, report_markdown, show_ranges, write_run_report
from megatron_cpt.training.report_figure import binned, draw, draw_learning_rate, limit, running_median
from megatron_cpt.training.validation_result import ValidationResult
from megatron_cpt.utils.errors import InputError


def report(folder: Path) -> str:
    """The text, after a look at the picture: it is one, and not empty."""
    text = Path(write_run_report(str(folder))).read_text()
    picture = np.asarray(Image.open(folder / "report.png").convert("L"))
    assert picture.shape == (910, 2860 if "## Validation" in text else 2145)
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


def test_what_the_run_was_asked_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, mixture, batch, schedule; the ALMR at each moment of a run whose mixture was changed once."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("megatron_cpt.training.report.draw", lambda *rows: drawn.update(asked=rows[-1], path=rows[-2]))
    config = {
        "mixture": "mixtures/zh.yaml",
        "training": {"global_batch_size": 8, "micro_batch_size": 2, "params_dtype": "bf16"},
        "optimizer": {"lr": 1.5e-4, "min_lr": 1.5e-5},
        "lr": {"decay_style": "cosine"},
    }
    record(tmp_path, 1, 4, lr=1e-4)
    run = json.loads((tmp_path / "run.json").read_text())
    model = dataclasses.asdict(llama_config(mlp_bias=True, attention_bias=True))
    (tmp_path / "run.json").write_text(json.dumps(run | {"config": config, "model": model}))
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    ledger["planned"] |= {"seq_length": 64}
    ramp = [{"samples": 10, "almr": ["1/5", "1/5"]}, {"samples": 20, "almr": ["1/5", "4/5"]}]
    constant = [{"samples": None, "almr": ["1/2", "1/2"]}]
    ledger["segments"] = [{"start": 0, "schedule": ramp}, {"start": 25, "schedule": constant}]
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    monkeypatch.setattr("os.replace", lambda *_: None)  # of a picture that is not drawn
    lines = report_lines(tmp_path)
    for line in (
        f"| model | {parameters(model) / 1e9:.3g} B parameters: 4 layers of 64, vocabulary 400 |",
        "| mixture | mixtures/zh.yaml, ALMR 0.5 asked |",
        "| batch | 8 samples of 64 tokens: 512 tokens, micro-batches of 2 |",
        "| precision | bf16 |",
        "| learning rate | 0.00015 to 1.5e-05, cosine; highest so far 0.0001 |",
    ):
        assert line in lines
    asked = drawn["asked"]
    assert asked.borders == (10 * 64, 25 * 64)
    plans = [StagePlan(10, (Fraction(1, 5),) * 2, None, None), StagePlan(20, (Fraction(1, 5), Fraction(4, 5)), None, None)]
    schedule = Schedule(tuple(plans), 0, (0, 10))
    for n in (1, 10, 11, 17, 25):
        assert asked.so_far(n * 64) == pytest.approx(float(schedule.asked(n)) / n)
    assert asked.so_far(35 * 64) == pytest.approx((float(schedule.asked(25)) + 5) / 35)


def report_lines(folder: Path) -> list[str]:
    return report_markdown(read_run_folder(write_run_report(str(folder)).removesuffix("/report.md"))).splitlines()


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(4, 64, 160, 4, 2, 32, 400, 256, 1e-5, 1e4, None, False, "float32", **changes)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_parameters_are_those_of_the_checkpoint(changes: dict[str, Any]) -> None:
    from megatron_cpt.model.llama import hf_shapes

    for tied in (False, True):
        llama = dataclasses.replace(llama_config(**changes), tie_word_embeddings=tied)
        assert parameters(dataclasses.asdict(llama)) == sum(math.prod(shape) for shape in hf_shapes(llama).values())


@pytest.mark.parametrize("lr", [2.25e-5, 1e-4, 3e-3])
def test_labels_of_learning_rates_are_what_they_stand_at(lr: float) -> None:
    """Rounding to two digits would put 2.2e-05 beside 2.25e-05, and give two ticks one label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    draw_learning_rate(axis, [{"iteration": n, "lr": lr * n / 50} for n in range(1, 51)])
    FigureCanvasAgg(figure).draw()
    power = float(axis.yaxis.get_offset_text().get_text().replace("\N{MINUS SIGN}", "-"))
    shown = [float(label.get_text()) * power for label in axis.get_yticklabels()]
    assert shown == pytest.approx(list(axis.get_yticks()), rel=1e-9)


def test_the_figure_is_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that took another batch size half-way; over steps where a step's tokens are not known."""
    axes: list[Any] = []
    monkeypatch.setattr("megatron_cpt.training.report_figure.finish_axis", lambda axis, *rest: axes.append((axis, rest)))
    steps = [step_row(n, consumed_tokens=100 * n if n < 5 else 400 + 1000 * (n - 4)) for n in range(1, 9)]
    evaluations = [
        {"iteration": n, "validation": {"zh": {"loss": 2.0, "bits_per_byte": 1.0, "language": "zh"}}} for n in (0, 8)
    ]
    draw(steps, evaluations, [4], str(tmp_path / "a.png"))
    assert list(axes[0][0].lines[0].get_xdata()) == [100, 200, 300, 400, 1400, 2400, 3400, 4400]
    assert list(axes[1][0].lines[0].get_xdata()) == [0, 4400]
    assert axes[0][1] == (4400, [400], True, 8)
    axes.clear()
    draw(steps, [evaluations[0] | {"iteration": 9}], [], str(tmp_path / "b.png"))
    assert list(axes[0][0].lines[0].get_xdata()) == list(range(1, 9))


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
        write_run_report(str(tmp_path / "nowhere"))


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
    assert show_ranges([8, 0, 1, 2, 3, 5]) == "0-3, 5, 8"
