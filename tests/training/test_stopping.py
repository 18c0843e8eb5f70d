"""What ranks tell each other, whatever their threads have come to."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_cpt.training import stopping
from megatron_cpt.training.stopping import Peers, Watch


def test_a_rank_that_was_asked_to_stop_has_told_the_others_when_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the reason; its thread may not have looked at the request yet."""
    monkeypatch.setattr(stopping, "POLL_SECONDS", 3600.0)
    store = dist.HashStore()
    with Watch(str(tmp_path), None, world_size=2) as watch:
        watch.share(store, 1, 2, 0.0, io.StringIO())
        watch.requests.stop = "SIGTERM"
        assert watch.reason() == "SIGTERM"
    other = Peers(store, 0, 2, 0.0)
    assert other.store.check(["stop"])
    assert other.reason() == "SIGTERM"
