"""examples/slurm_quickstart/check_cluster.sh on two nodes that have nothing but files in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dry_runs import assert_refused, start
from slurm_cluster import Cluster
from tiny_models import ROOT

SCRIPT = ROOT / "examples" / "slurm_quickstart" / "check_cluster.sh"


@pytest.mark.slurm
def test_the_check_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """The second machine finds the store of the first, sees its files and adds up with it; a training splits over both."""
    words = {"FOLDER": str(tmp_path / "check"), "LOGS": str(tmp_path / "logs"), "ONLY": "clocks file links DP1"}
    job = cluster.submit(str(SCRIPT), **words)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    report = json.loads((tmp_path / "check" / "check_cluster.json").read_text())
    assert {row["state"] for row in report["checks"]} == {"passed"}, report["checks"]
    assert {"clocks", "file system", "links", "TP2 PP2 DP1"} <= {row["name"] for row in report["checks"]}
    assert (report["processes"], report["nodes"]) == (4, 2)


def test_wrong_settings_are_refused_before_it_is_queued(tmp_path: Path) -> None:
    done = start(SCRIPT, FOLDER=str(tmp_path), NODES="two")
    assert_refused(done, "NODES is 'two'")
