"""A stand-in for Transformer Engine's compiled extension, so that its layers can be built on a machine without a GPU.

`python stand_in.py FOLDER` reads the names that transformer_engine_torch defines out of its sources on PyPI, of the version
that is in FOLDER, and writes a module of them there. Its functions raise when they are called: layers can be built, loaded
and saved, not run. `install(FOLDER)` has a process use it.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

INDEX = "https://pypi.org/simple/transformer-engine-torch/"
NAME = "transformer_engine_torch_stand_in"


def make(folder: Path) -> None:
    """Write the module."""
    (installed,) = folder.glob("transformer_engine-*.dist-info")
    version = installed.name.removeprefix("transformer_engine-").removesuffix(".dist-info")
    (folder / f"{NAME}.py").write_text(module(sources(version)))


def sources(version: str) -> str:
    """All C++ of the extension, one file after the other."""
    request = urllib.request.Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request) as answer:
        files = {file["filename"]: file for file in json.load(answer)["files"]}
    wanted = files[f"transformer_engine_torch-{version}.tar.gz"]
    with urllib.request.urlopen(wanted["url"]) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != wanted["hashes"]["sha256"]:
        raise ValueError(f"{wanted['url']}: another checksum than the index says")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = [name for name in archive.getnames() if re.search(r"/csrc/.*\.cpp$|/pybind_helper\.h$", name)]
        texts = [file.read().decode() for name in names if (file := archive.extractfile(name)) is not None]
    return "\n".join(texts).replace("\\\n", "\n")


def module(text: str) -> str:
    """Python with the enumerations, classes and functions that pybind11 is told of in `text`."""
    lines = ["import enum", "", "", "class Function:", "    def __init__(self, name):", "        self.name = name", ""]
    lines += [
        "    def __call__(self, *args, **kwargs):",
        "        raise RuntimeError(f'tex.{self.name} was called')",
        "",
        "",
    ]
    seen = set[str]()
    for name, body in re.findall(r'enum_<[^>]*>\s*\(\s*m\s*,\s*"(\w+)"(.*?);', text, re.DOTALL):
        if name in seen:
            continue
        seen.add(name)
        values = re.findall(r'\.value\(\s*"(\w+)"', body)
        lines += [
            f"class {name}(enum.IntEnum):",
            *(f"    {value} = {i}" for i, value in enumerate(values)),
            "    pass",
            "",
            "",
        ]
    for name in re.findall(r'class_<[^;]*?>\s*\(\s*m\s*,\s*"(\w+)"', text):
        if name not in seen:
            seen.add(name)
            lines += [f"class {name}:", "    def __init__(self, *args, **kwargs):", "        pass", "", ""]
    for name in re.findall(r'm\.def\(\s*"(\w+)"', text):
        if name not in seen:
            seen.add(name)
            lines.append(f"{name} = Function('{name}')")
    return "\n".join(lines) + "\n"


def install(folder: str) -> Any:
    """Import Transformer Engine from `folder` with the stand-in in the place of its extension; returns the package."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # then it does not look for its library of kernels
    sys.path.append(folder)  # last: what both have is taken from the environment
    sys.modules["transformer_engine_torch"] = importlib.import_module(NAME)
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    return importlib.import_module("transformer_engine.pytorch")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
