"""A real SLURM of three nodes on this host, for the tests that are marked `slurm`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import HERE, Cluster
from tiny_runs import Runs

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a SLURM on this host needs root")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; apt-get install --no-install-recommends {PACKAGES}")
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("root may not make namespaces here, which the nodes of a SLURM on one host need")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # munged wants its socket reachable, which it is not in a folder of pytest's
        environment = os.environ | {"FOLDER": folder}
        try:
            subprocess.run([HERE / "up.sh"], env=environment, check=True, timeout=120)
            yield Cluster(Path(folder))
        finally:
            subprocess.run([HERE / "down.sh"], env=environment, check=True, timeout=120)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("slurm_runs"), tiny_tokenizer_dir)
