"""What ranks tell each other, whatever their threads have come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_cpt.training import stopping
from megatron_cpt.training.stopping import Peers, StopController, StopRequests
from megatron_cpt.utils.errors import ProcessDiedError


def test_a_rank_that_was_asked_to_stop_has_told_the_others_when_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the reason; its thread may not have looked at the request yet."""
    monkeypatch.setattr(stopping, "POLL_SECONDS", 3600.0)
    store = dist.HashStore()
    with StopController(str(tmp_path), None, world_size=2) as stop_controller:
        stop_controller.share(store, 1, 2, 0.0)
        stop_controller.requests.stop = "SIGTERM"
        assert stop_controller.reason() == "SIGTERM"
    other = Peers(store, 0, 2, 0.0)
    assert other.store.check(["stop"])
    assert other.reason() == "SIGTERM"


def test_a_rank_that_never_showed_a_sign_of_life_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hang between the start of the process group and its first sign."""
    clock = iter(range(100))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: float(next(clock)))
    peers, requests = Peers(dist.HashStore(), 0, 2, 4.0), StopRequests()
    for _ in range(5):
        peers.exchange(requests)
    with pytest.raises(ProcessDiedError, match="rank 1 has shown no sign of life for 5 s"):
        peers.exchange(requests)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_in_the_last_step_does_not_wait_for_the_next_start(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank takes it, as always."""
    monkeypatch.setattr(stopping, "POLL_SECONDS", 3600.0)
    for name in ("stop_now", "save_now"):
        (tmp_path / name).touch()
    with StopController(str(tmp_path), None, world_size=2) as stop_controller:
        stop_controller.share(dist.HashStore(), rank, 2, 0.0)
        stop_controller.drop_requests()
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if rank == 0 else ["save_now", "stop_now"])


def test_a_request_that_cannot_be_removed_is_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stop_now").mkdir()
    with StopController(str(tmp_path), None, 2) as stop_controller:
        for _ in range(3):
            stop_controller._look_around()
        assert not stop_controller.requests.stopping()
    assert capsys.readouterr().err.count("stop_now is not obeyed, as it cannot be removed") <= 1
    (tmp_path / "stop_now").rmdir()
    (tmp_path / "stop_now").touch()
    with StopController(str(tmp_path), None, 2) as stop_controller:
        stop_controller._look_around()
        assert stop_controller.requests.stop == "the file stop_now"
    assert not (tmp_path / "stop_now").exists()
