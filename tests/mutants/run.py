"""Break the code in one place at a time and run the tests that should notice: `make mutants`.

A mutant is an entry of a YAML file beside this one:

    - name: what is wrong with the code afterwards
      file: path from the root of the repository
      old: text that stands there exactly once
      new: what is put in its place
      tests: the tests that should fail, as pytest takes them: paths or node ids, with -k or -m
      survives: why no test can notice (only where it is known that none does)

Each runs in a copy of the working tree, so the tree itself is never changed. Status 1 if a mutant survives that should not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KILLED, SURVIVED, BROKEN = "killed", "survived", "broken"
# pytest's exit statuses: a test failed; what was collected could not be imported, which a mutant may cause as well
FAILED, INTERRUPTED = 1, 2


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of the code, and the tests that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""
    topic: str = ""

    def apply(self, tree: Path) -> None:
        """Make the change in a copy of the repository.

        Raises:
            ValueError: `old` does not stand there exactly once
        """
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.old!r} is there {found} times; expected 1")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def read_mutants(folder: Path) -> list[Mutant]:
    """All mutants of the YAML files in a folder."""
    return [
        Mutant(**entry, topic=path.stem)
        for path in sorted(folder.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


def copy_tree(target: Path) -> None:
    """Copy what git knows or does not ignore, and the compiled extensions."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("megatron_cpt/**/*.so")]
    for name in [*listed, *built]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


class Warm:
    """A process of warm.py, which runs one mutant's tests at a time."""

    def __init__(self) -> None:
        # Tools are started as scripts: without PYTHONPATH, which warm.py sets, they would import the installed package
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def pytest(self, folder: Path, arguments: list[str], log: Path, timeout: float) -> int | None:
        """Its exit status; None where it is ended after `timeout` seconds."""
        self._say({"folder": str(folder), "arguments": arguments, "log": str(log)})
        timed_out = threading.Event()

        def end(pid: int) -> None:
            timed_out.set()
            os.killpg(pid, signal.SIGKILL)

        timer = threading.Timer(timeout, end, [self._hear()["pid"]])
        timer.start()
        status: int = self._hear()["status"]
        timer.cancel()
        return None if timed_out.is_set() else status

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))


def outcome(warm: Warm, mutant: Mutant, timeout: float) -> tuple[str, str]:
    """Run the mutant's tests: what came of it, and the end of pytest's output."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        try:
            mutant.apply(tree)
        except (OSError, ValueError) as error:
            return BROKEN, str(error)
        log = tree / "mutant.log"
        arguments = ["-q", "-x", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]
        status = warm.pytest(tree, arguments, log, timeout)
        text = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        if status is not None and status < 0:  # a crash, as some libraries have in a forked process
            environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-m", "pytest", *arguments]
            try:
                done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
                status, text = done.returncode, done.stdout[-4000:]
            except subprocess.TimeoutExpired:
                status = None
    if status is None:
        return KILLED, f"no end within {timeout:g} s"
    return (KILLED if status in (FAILED, INTERRUPTED) or status < 0 else SURVIVED if status == 0 else BROKEN), text


def report(mutant: Mutant, result: str, text: str, seconds: float) -> bool:
    """Print a line about a mutant; whether that is as expected."""
    good = (result == KILLED and not mutant.survives) or (result == SURVIVED and bool(mutant.survives))
    note = f" (known: {mutant.survives})" if result == SURVIVED and mutant.survives else ""
    print(f"{'' if good else 'WRONG: '}{result:8} {seconds:4.0f} s  {mutant.file}: {mutant.name}{note}", flush=True)
    if not good:
        print(text, flush=True)
    return good


def main() -> int:
    """Run all mutants, or those whose name or file holds a word."""
    parser = argparse.ArgumentParser(
        description="Break the code in one place at a time and run the tests that should notice."
    )
    parser.add_argument("--only", default="", help="mutants whose file, name or YAML file holds this text")
    parser.add_argument("--skip", default="", help="a report of an earlier run: those that were killed in it are left out")
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a mutant counts as noticed")
    options = parser.parse_args()
    everything = read_mutants(Path(__file__).parent)
    mutants = [m for m in everything if any(options.only in text for text in (m.file, m.name, m.topic))]
    before = Path(options.skip).read_text(encoding="utf-8").splitlines() if options.skip else []
    done = {line.split(" s  ", 1)[1] for line in before if line.startswith(KILLED)}
    mutants = [m for m in mutants if f"{m.file}: {m.name}" not in done]

    idle: queue.SimpleQueue[Warm] = queue.SimpleQueue()
    for _ in range(options.jobs):
        idle.put(Warm())

    def run(mutant: Mutant) -> bool:
        begin, warm = time.monotonic(), idle.get()
        try:
            result, text = outcome(warm, mutant, options.timeout)
        finally:
            idle.put(warm)
        return report(mutant, result, text, time.monotonic() - begin)

    with ThreadPoolExecutor(options.jobs) as pool:
        good = list(pool.map(run, mutants))
    known = sum(bool(mutant.survives) for mutant in mutants)
    print(f"{len(mutants)} mutants, {sum(good)} as expected, {known} of them known to survive")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
