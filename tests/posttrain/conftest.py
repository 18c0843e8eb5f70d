from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama

TEMPLATE_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


def add_template_tokens(folder: Path) -> None:
    """The tokens of both templates, as special ones from id 400 on."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": 400 + i, "content": token, **flags} for i, token in enumerate(TEMPLATE_TOKENS)]
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def chat_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> str:
    """The tiny tokenizer with the special tokens of both templates, and no template."""
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    shutil.copytree(tiny_tokenizer_dir, folder, dirs_exist_ok=True)
    add_template_tokens(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> str:
    """A random tiny model with that tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("chat") / "hf", chat_tokenizer_dir, vocab_size=406)
