"""The CUDA source of the order, compiled for the CPU, for tests without a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def compile_emulated(folder: Path) -> Path:
    """The library, made in a folder."""
    library = folder / "emulated.so"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-DMCPT_EMULATE_CUDA"]
    options += os.environ.get("CFLAGS", "").split()  # of `make sanitize`
    subprocess.run(["g++", *options, "-x", "c++", str(SOURCES / "sampling_cuda.cu"), "-o", str(library)], check=True)
    return library
