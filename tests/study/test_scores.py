"""What a command for scores may leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.study.scores import read_all_scores, read_scores
from megatron_cpt.utils.errors import InputError, RunError


def test_scores_by_name_and_of_lm_eval(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"zh": 0.5, "en": 1}')
    assert read_scores(str(tmp_path)) == {"zh": 0.5, "en": 1.0}
    (tmp_path / "a.json").write_text(json.dumps({"results": {"task": {"alias": "task", "acc,none": 0.4, "f1,none": 0.3}}}))
    assert read_scores(str(tmp_path)) == {"task": 0.4}


@pytest.mark.parametrize(
    "text", ['{"zh": NaN}', '{"zh": true}', '{"zh": "0.5"}', "{}", "[0.5]", "no JSON", '{"zh": Infinity}']
)
def test_what_is_no_score(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match=r"it should be numbers by name|which is not JSON"):
        read_scores(str(tmp_path))


def test_a_file_that_was_spoiled(tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "run"
    folder.mkdir(parents=True)
    (folder / "iter_0000003.json").write_text('{"zh": 0.5}')
    assert read_all_scores(str(tmp_path), "run") == {3: {"zh": 0.5}}
    for text in ("", "[]", "{}"):
        (folder / "iter_0000003.json").write_text(text)
        with pytest.raises(InputError, match=r"iter_0000003\.json .*numbers by name"):
            read_all_scores(str(tmp_path), "run")
    (folder / "iter_0000003.json").write_text('{"zh": NaN}')
    with pytest.raises(InputError, match=r"iter_0000003\.json: zh is nan; expected a number"):
        read_all_scores(str(tmp_path), "run")
