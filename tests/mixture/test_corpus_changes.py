"""Files of corpora that change while a run reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_cpt.corpus.indexed_dataset import FileReader
from megatron_cpt.mixture.corpus_changes import ExpectedFile, FileChecks
from megatron_cpt.utils.errors import RunError

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def expected(tmp_path: Path) -> ExpectedFile:
    path = tmp_path / "zh.bin"
    path.write_bytes(CONTENT)
    return ExpectedFile(FileReader(path), "zh.json", hashlib.sha256(CONTENT).hexdigest())


def overwrite(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"other bytes")


def test_a_file_that_is_right(expected: ExpectedFile, tmp_path: Path) -> None:
    with FileChecks([expected], str(tmp_path)) as checks:
        checks.poll()
        assert checks.finish(10) == []
    assert (tmp_path / "checked_files.json").exists()


def test_a_file_that_is_written_to_after_it_was_compared(expected: ExpectedFile, tmp_path: Path) -> None:
    """The end of the run may be nearer than the next look."""
    with FileChecks([expected], str(tmp_path)) as checks:
        assert checks.finish(10) == []
        overwrite(tmp_path / "zh.bin", 5000)
        checks.poll()  # too early for another look
        with pytest.raises(RunError, match=r"zh\.bin: sha256 is \w+; expected \w+, as zh\.json says: the file was replaced"):
            checks.finish(10)


def test_a_file_that_cannot_be_compared_in_time_is_named(expected: ExpectedFile, tmp_path: Path) -> None:
    with FileChecks([expected], str(tmp_path)) as checks:
        checks.finish(10)
        (tmp_path / "zh.bin").touch()
        checks._look_again = lambda: None  # type: ignore[method-assign]  # what no time does
        assert checks.finish(0) == [str(tmp_path / "zh.bin")]
