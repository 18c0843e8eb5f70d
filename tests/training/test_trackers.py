"""TensorBoard and Weights & Biases show one history, however often a run is resumed."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_logs import record, start, step_row

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.trackers import check_logging, is_installed
from megatron_cpt.utils.errors import InputError

WANDB = LoggingConfig(wandb_project="cpt", wandb_mode="offline")


def tensorboard_steps(folder: Path, series: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(series)]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: 7 bytes, then LevelDB's log format (blocks; checksum, length, kind)."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        room = -place % 32768
        if 0 < room < 7:
            place += room  # the rest of a block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """The rows in the files of all starts, in order."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path.read_bytes()):
            entry = wandb_internal_pb2.Record.FromString(content)
            if entry.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item}
                )
    return rows


def test_tensorboard_has_the_series_and_forgets_steps_done_again(tmp_path: Path) -> None:
    record(tmp_path, 1, 9, LoggingConfig(tensorboard=True))
    record(tmp_path, 6, 8, LoggingConfig(tensorboard=True), loss=1.0)
    losses = tensorboard_steps(tmp_path, "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [value for _, value in losses[5:]] == [1.0, 1.0, 1.0]
    assert [step for step, _ in tensorboard_steps(tmp_path, "validation/zh/bits_per_byte")] == [0, 8]
    assert tensorboard_steps(tmp_path, "data/consumed_tokens")[-1] == (8, 8 * 512)
    for series in ("train/lr", "train/grad_norm", "throughput/mfu", "throughput/tokens_per_second", "data/almr"):
        assert len(tensorboard_steps(tmp_path, series)) == 8


def test_tensorboard_of_a_run_that_begins_anew_forgets_all(tmp_path: Path) -> None:
    record(tmp_path, 1, 5, LoggingConfig(tensorboard=True))
    record(tmp_path, 1, 2, LoggingConfig(tensorboard=True))
    assert [step for step, _ in tensorboard_steps(tmp_path, "train/loss")] == [1, 2]
    assert [step for step, _ in tensorboard_steps(tmp_path, "validation/zh/loss")] == [0, 2]


def test_wandb_offline_goes_on_with_one_run_and_repeats_no_step(tmp_path: Path) -> None:
    record(tmp_path, 1, 9, WANDB)
    identity = (tmp_path / "wandb_id").read_text()
    record(tmp_path, 6, 12, WANDB)
    assert (tmp_path / "wandb_id").read_text() == identity
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1  # run-ID.wandb
    patience = time.monotonic() + 10  # rows were missing once, on a busy machine; W&B's own process writes them
    while len(rows := wandb_history(tmp_path)) < 13 and time.monotonic() < patience:
        time.sleep(0.1)
    assert [row["_step"] for row in rows] == list(range(13))
    assert rows[3]["train/loss"] == pytest.approx(3.97)
    assert rows[3]["data/consumed_tokens"] == 3 * 512
    assert rows[0]["validation/zh/loss"] == 4.0
    assert rows[9]["validation/zh/bits_per_byte"] == pytest.approx(1.8)  # with the figures of the step


def test_wandb_of_a_run_that_begins_anew_is_another(tmp_path: Path) -> None:
    record(tmp_path, 1, 2, WANDB)
    identity = (tmp_path / "wandb_id").read_text()
    record(tmp_path, 1, 2, WANDB)
    assert (tmp_path / "wandb_id").read_text() != identity


def test_a_sink_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(str(tmp_path), LoggingConfig(tensorboard=True), 0) as log:
        start(log)
        assert log.trackers is not None
        failing = log.trackers.open[0]

        def full(*_: object) -> None:
            raise OSError("no space left")

        failing.write = full  # type: ignore[method-assign]
        log.step(step_row(1), 20)
        log.step(step_row(2), 20)
    assert capsys.readouterr().err.count("TensorBoard is left out from step 1 on: no space left") == 1


@pytest.mark.parametrize(
    ("config", "package", "field"),
    [
        (WANDB, "wandb", "logging.wandb_project is given"),
        (LoggingConfig(tensorboard=True), "tensorboard", "logging.tensorboard"),
    ],
)
def test_a_missing_package_is_named(
    config: LoggingConfig, package: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[..., Any] = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(InputError, match=rf"{field}.*{package} is not installed; pip install 'megatron-cpt\[logging\]'"):
        check_logging(config)
    check_logging(LoggingConfig())


def test_a_folder_named_like_the_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surely_not_installed").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("surely_not_installed")
    assert is_installed("json")
