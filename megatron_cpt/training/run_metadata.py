"""What a run ran on and with: versions, code, hosts, command line, environment. For run.json."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import megatron_cpt
from megatron_cpt.checkpoint.layout import versions
from megatron_cpt.platforms import current_platform

OPTIONAL_PACKAGES = (
    "transformer-engine",
    "apex",
    "flash-attn",
    "triton",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "wandb",
)
# What decides how fast or how a run computes and where it ran. Listed, so that nothing secret is recorded by accident.
ENVIRONMENT = re.compile(
    r"(CUDA|NCCL|GLOO|NVTE|TORCH|PYTORCH|TORCHELASTIC|TORCH_NCCL|OMP|MKL|KMP|OPENBLAS|UCX|FI|MEGATRON_CPT)_[A-Z0-9_]+"
    r"|SLURM_(JOB_(ID|NAME|PARTITION|NODELIST|NUM_NODES)|NNODES|NTASKS|NTASKS_PER_NODE|CPUS_PER_TASK|GPUS_PER_NODE|RESTART_COUNT"
    r"|ARRAY_JOB_ID|ARRAY_TASK_ID|CLUSTER_NAME)"
    r"|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LD_PRELOAD|PYTHONHASHSEED|PYTHONPATH"
    r"|TOKENIZERS_PARALLELISM|HF_HOME|HF_HUB_OFFLINE"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|JWT|(^|_)(API_?)?KEY(_|$)", re.IGNORECASE)
HARMLESS = ("TOKENIZERS_PARALLELISM",)
GIT_SECONDS = 20
FILES_NAMED = 20


def run_facts(gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """What run.json says beside the configuration. To be called on every rank at once.

    Args:
        gather: gives the objects of all ranks, in their order, on every rank (at least on the first)

    Returns:
        versions, git (None if the code is no checkout), hosts, command, working_directory, started, environment
    """
    build = {"torch": torch.__version__}  # as in 2.13.0+cu130: PyPI's metadata leaves out what it was built for
    return {
        "versions": versions() | build | installed(OPTIONAL_PACKAGES) | current_platform().library_versions(),
        "git": git_state(os.path.dirname(os.path.abspath(megatron_cpt.__file__))),
        "hosts": hosts(gather(this_process())),
        "command": [sys.executable, *sys.argv],
        "working_directory": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": relevant_environment(dict(os.environ)),
    }


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def this_process() -> dict[str, Any]:
    """What every rank says of itself."""
    return {
        "hostname": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "device": current_platform().device_name(),
        "pid": os.getpid(),
    }


def hosts(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per host, with the ranks on it, in the order of their first ranks."""
    found: dict[str, dict[str, Any]] = {}
    for rank, process in enumerate(processes):
        name = process["hostname"]
        empty = {"hostname": name, "cpu_count": process["cpu_count"], "ranks": [], "devices": [], "pids": []}
        host = found.setdefault(name, empty)
        host["ranks"].append(rank)
        host["devices"].append(process["device"])
        host["pids"].append(process["pid"])
    return list(found.values())


def relevant_environment(variables: dict[str, str]) -> dict[str, str]:
    """The variables that matter; nothing whose name sounds like a secret."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if ENVIRONMENT.fullmatch(name) and (name in HARMLESS or not SECRET.search(name))
    }


def git_state(package: str) -> dict[str, Any] | None:
    """Commit and changed files of the checkout that a package's folder belongs to; None if it is not part of one."""
    tracked = git(package, "ls-files", "--error-unmatch", "__init__.py")  # not just installed somewhere below a repository
    commit = git(package, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    branch = git(package, "rev-parse", "--abbrev-ref", "HEAD")
    changed = (git(package, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    files = [entry[3:] for entry in changed]
    return {
        "commit": commit.strip(),
        "branch": branch.strip() if branch else None,
        "dirty": bool(files),
        "changed_files": files[:FILES_NAMED],
    }


def git(folder: str, *arguments: str) -> str | None:
    """What a git command prints; None if it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # a reader must not take the lock of a person's commit
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
