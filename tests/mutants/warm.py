"""A process that has imported the libraries, and forks one that runs pytest for each line it is told: they take ten seconds
to import, and a mutant's test often one.

Of this repository it imports nothing: each child does, from the copy that it is told to work in.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

LIBRARIES = (
    "torch",
    "megatron.core",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "sentencepiece",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "hypothesis",
    "pytest",
)


def import_libraries() -> None:
    """Those that are there."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue


def run(job: dict[str, Any]) -> int:
    """Exit status of pytest with `arguments`, in `folder`, what it prints being appended to `log`.

    An own process group, so that whoever ends it ends the tools that it has started.
    """
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.chdir(job["folder"])
        os.environ["PYTHONPATH"] = job["folder"]  # of the tools that tests start as scripts
        sys.path.insert(0, job["folder"])
        import pytest

        status = int(pytest.main(job["arguments"]))
        sys.stdout.flush()
        os._exit(status)
    print(json.dumps({"pid": pid}), flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    import_libraries()
    for line in sys.stdin:
        print(json.dumps({"status": run(json.loads(line))}), flush=True)
