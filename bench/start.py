"""CPU time of what a tool answers without running anything, for the slowest of all tools."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.preprocess import REPEATS, REPOSITORY
from bench.row import Row, compare

RECIPES = {  # of --check_only; where nothing was made yet, they end with a line for each file that is missing
    "convert_checkpoint.py": ["hf-to-megatron", "--config", "examples/llama3_8b/convert.yaml"],
    "evaluate.py": ["--config", "examples/llama3_8b/evaluate.yaml"],
    "finetune_dpo.py": ["--config", "examples/llama3_8b/dpo.yaml"],
    "finetune_sft.py": ["--config", "examples/llama3_8b/sft.yaml"],
    "preprocess_data.py": ["--config", "examples/llama3_8b/preprocess.yaml"],
    "pretrain_cpt.py": ["--config", "examples/llama3_8b/cpt.yaml"],
}
COMMANDS = {"almr_study.py": ["run"], "convert_checkpoint.py": ["hf-to-megatron"]}
NAMES = ("start of tools --help", "start of tools --print_config", "start of tools --check_only")
LIMIT = 2.0  # seconds


def rows(wanted: str) -> Iterator[Row]:
    """The rows whose name contains `wanted`."""
    tools = sorted(path.name for path in (REPOSITORY / "tools").glob("*.py"))
    words = {
        NAMES[0]: {tool: ["--help"] for tool in tools},
        NAMES[1]: {tool: [*COMMANDS.get(tool, []), "--print_config"] for tool in tools},
        NAMES[2]: {tool: [*recipe, "--check_only"] for tool, recipe in RECIPES.items()},
    }
    for name in NAMES:
        if wanted in name:
            seconds = {tool: cpu_seconds(tool, command) for tool, command in words[name].items()}
            slowest = max(seconds, key=seconds.__getitem__)
            yield compare(name, "s of CPU", seconds[slowest], LIMIT, f"the limit; the slowest is {slowest}", 1.0, "most")


def cpu_seconds(tool: str, words: list[str]) -> float:
    """User and system time of a tool, the least of some runs."""
    found = []
    for _ in range(REPEATS):
        before = used()
        command = [sys.executable, str(Path("tools") / tool), *words]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 2) or "Traceback" in done.stderr:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
        found.append(used() - before)
    return min(found)


def used() -> float:
    """CPU seconds of all children so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
