"""Who can reach the store through which the ranks of a job find each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.platforms.process_groups import bound_store, listening_socket

GROUP = """
from pathlib import Path
import os
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.platforms.process_groups import process_groups
with process_groups(ParallelConfig()):
    port = f":{int(os.environ['MASTER_PORT']):04X}"
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            number, local, remote, state, *_ = line.split()
            if state == "0A" and local.endswith(port):
                print(local.removesuffix(port))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_the_store_listens_on_the_address_of_the_job_only() -> None:
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | job | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", GROUP], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["0100007F"], result.stderr  # 127.0.0.1


def test_a_loopback_name_serves_only_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a machine's own name the address 127.0.1.1, which other machines cannot reach."""
    address = ("127.0.1.1", free_port())
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)])
    assert listening_socket("node1", address[1], loopback=False) is None
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": str(address[1])}
    assert bound_store(job | {"LOCAL_WORLD_SIZE": "1", "SLURM_NNODES": "2"}) is None
    listener = listening_socket("node1", address[1], loopback=True)
    assert listener is not None
    assert listener.getsockname() == address
    assert listening_socket("node1", address[1], loopback=True) is None  # taken
    listener.close()


def test_other_ranks_and_torchrun_are_left_to_torch() -> None:
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for change in (
        {"RANK": "1"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"MASTER_ADDR": "192.0.2.1"},
        {"MASTER_PORT": "x"},
    ):
        assert bound_store(job | change) is None
