from __future__ import annotations

from multiprocessing import forkserver, resource_tracker

import pytest
from tiny_models import make_tiny_llama

from megatron_cpt.platforms import prepare_platform


@pytest.fixture(scope="session", autouse=True)
def _prepared() -> None:
    prepare_platform()


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> str:
    """A tiny model's HF folder, with an output layer of its own."""
    return make_tiny_llama(tmp_path_factory.mktemp("hf") / "untied", tiny_tokenizer_dir, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied_hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> str:
    """A tiny model's HF folder, with tied embeddings."""
    return make_tiny_llama(tmp_path_factory.mktemp("hf") / "tied", tiny_tokenizer_dir, tie_word_embeddings=True)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Other tests count this process's children: the servers of ranks.py end with the last test of this folder."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
