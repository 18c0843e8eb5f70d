"""Fixtures shared by all tests; nothing here touches the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from forks import Forks
from hypothesis import settings
from tiny_tokenizer import add_template_tokens, make_tiny_tokenizer

from megatron_cpt.utils.logs import start_logs

os.environ["TOKENIZERS_PARALLELISM"] = "false"
settings.register_profile("here", deadline=None)  # a busy machine is no failure
settings.load_profile("here")


@pytest.fixture(autouse=True)
def started_logs() -> None:
    """Messages are on stderr, as in a tool, whatever the test before has made of it."""
    start_logs()


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face tokenizer folder: byte-level BPE of 400 tokens, `<|endoftext|>` (id 0) both eos and bos."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tiny_tokenizer"))


@pytest.fixture(scope="session")
def chat_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> str:
    """The tiny tokenizer with the special tokens of both templates, and no template."""
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    shutil.copytree(tiny_tokenizer_dir, folder, dirs_exist_ok=True)
    add_template_tokens(folder)
    return str(folder)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts runs of the training tool without importing everything for each."""
    server = Forks()
    yield server
    server.close()
