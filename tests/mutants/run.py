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
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
        Mutant(**entry)
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


def outcome(mutant: Mutant, timeout: float) -> tuple[str, str]:
    """Run the mutant's tests: what came of it, and the end of pytest's output."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        try:
            mutant.apply(tree)
        except (OSError, ValueError) as error:
            return BROKEN, str(error)
        # Tools are started as scripts: without PYTHONPATH they would import the installed package, not the copy
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]
        try:
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return KILLED, f"no end within {timeout:g} s"
    if done.returncode in (FAILED, INTERRUPTED):
        return KILLED, done.stdout[-2000:]
    return (SURVIVED if done.returncode == 0 else BROKEN), done.stdout[-2000:] + done.stderr[-2000:]


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
    parser.add_argument("--only", default="", help="mutants whose file or name holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a mutant counts as noticed")
    options = parser.parse_args()
    mutants = [m for m in read_mutants(Path(__file__).parent) if options.only in m.file or options.only in m.name]

    def run(mutant: Mutant) -> bool:
        begin = time.monotonic()
        result, text = outcome(mutant, options.timeout)
        return report(mutant, result, text, time.monotonic() - begin)

    with ThreadPoolExecutor(options.jobs) as pool:
        good = list(pool.map(run, mutants))
    known = sum(bool(mutant.survives) for mutant in mutants)
    print(f"{len(mutants)} mutants, {sum(good)} as expected, {known} of them known to survive")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
