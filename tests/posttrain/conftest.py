from __future__ import annotations

import pytest
from tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> str:
    """A random tiny model with that tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("chat") / "hf", chat_tokenizer_dir, vocab_size=406)
