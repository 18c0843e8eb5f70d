"""Importing changes nothing: rooms leave torch as it is, and load megatron-core, or torch, only where a model is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_cpt

PACKAGE = Path(megatron_cpt.__file__).parent
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
WITHOUT_TORCH = {"config", "corpus", "curation", "mixture", "tokenizer", "utils"}
WITHOUT_MEGATRON = {"evaluation", "posttrain", "study"}
RUN_A_MODEL = ROOMS - WITHOUT_TORCH - WITHOUT_MEGATRON
# The decorator of megatron-core's small fusions, which compiles them on a GPU only
NOT_COMPILED = "jit_fuser"

FIND = """
import importlib, json, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
hidden = [name for name, module in sys.modules.items() if module is None and name in ("apex", "transformer_engine", "wandb")]
patched = []
if "torch" in loaded:
    import torch

    if "megatron" not in loaded:
        import megatron.core  # of what was not imported nothing can have been changed
    owners = [torch.Tensor, *(module for name, module in sys.modules.items() if name.split(".")[0] in ("torch", "megatron"))]
    for owner in owners:
        for name, thing in list(vars(owner).items() if owner is not None else ()):
            if str(getattr(thing, "__module__", "")).startswith("megatron_cpt"):
                patched.append(f"{owner.__name__}.{name}")
    if torch.zeros(2).type() != "torch.FloatTensor":
        patched.append("Tensor.type")
print(json.dumps([sorted(loaded & {"torch", "megatron"}), hidden, patched]))
"""


def modules(room: str) -> list[str]:
    """All modules of a room but those that are programs."""
    paths = [path for path in sorted((PACKAGE / room).rglob("*.py")) if path.stem not in ("__init__", "sandbox_child")]
    return [".".join(("megatron_cpt", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in paths]


def after_importing(*names: str) -> tuple[set[str], list[str], list[str]]:
    """(which of torch and megatron a fresh process has loaded, packages that are hidden, what of them was replaced)."""
    done = subprocess.run([sys.executable, "-c", FIND, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded, hidden, patched = json.loads(done.stdout.splitlines()[-1])
    return set(loaded), hidden, patched


@pytest.mark.parametrize(
    ("rooms", "libraries"),
    [(WITHOUT_TORCH, set()), (WITHOUT_MEGATRON, {"torch"}), (RUN_A_MODEL, {"torch", "megatron"})],
    ids=["without torch", "without megatron-core", "that run a model"],
)
def test_importing_rooms_changes_nothing(rooms: set[str], libraries: set[str]) -> None:
    loaded, hidden, patched = after_importing(*(name for room in sorted(rooms) for name in modules(room)))
    assert (loaded, hidden) == (libraries, [])
    assert {name for name in patched if not name.endswith(f".{NOT_COMPILED}")} == set()


def test_what_prepares_a_platform_is_seen() -> None:
    """Else the test above could not fail."""
    code = FIND.replace(
        "loaded = {", "from megatron_cpt.platforms import prepare_platform; prepare_platform()\nloaded = {", 1
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    _, hidden, patched = json.loads(done.stdout.splitlines()[-1])
    assert hidden == ["transformer_engine", "apex"]
    assert {"Tensor.cuda", "torch.cuda.current_stream", "megatron.core.optimizer.Adam"} <= set(patched)


def test_helpers_for_files_load_neither() -> None:
    helpers = ("checkpoint.layout", "checkpoint.weight_files", "model.hf_folder", "convert.run_files", "training.run_files")
    assert after_importing(*(f"megatron_cpt.{name}" for name in helpers))[0] == set()


def test_all_of_megatron_is_imported_where_nothing_is_found_that_wants_a_gpu() -> None:
    """A module of megatron-core that a room alone imports would find Transformer Engine without a GPU, or the compiler."""
    code = """
import importlib, sys
import megatron_cpt.platforms.imported_megatron
before = {name for name in sys.modules if name.startswith("megatron.")}
for name in sys.argv[1:]:
    importlib.import_module(name)
print(sorted({name for name in sys.modules if name.startswith("megatron.")} - before))
"""
    names = [name for room in sorted(RUN_A_MODEL) for name in modules(room)]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "[]\n"


FIRST = "import megatron_cpt.platforms.imported_megatron"


def test_who_imports_from_megatron_has_it_imported_as_the_machine_can() -> None:
    """Also a test: the one that is collected first decides for all in its process."""
    found = 0
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if match := re.search(r"^(?:from|import) megatron[. ]", text, re.MULTILINE):
            found += 1
            assert FIRST in text[: match.start()], f"{path} imports from megatron; expected {FIRST!r} before"
    assert found > 15
