"""Chat templates and tokenizers that go together, before transformers is imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_cpt.chat_data.template_files import TEMPLATES, check_tokenizer
from megatron_cpt.chat_data.templates import load_template
from megatron_cpt.errors import InputError


@pytest.fixture
def model(tmp_path: Path, chat_tokenizer_dir: str) -> Path:
    return Path(shutil.copytree(chat_tokenizer_dir, tmp_path / "model"))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"])
def test_a_template_of_its_own(model: Path, where: str) -> None:
    if where.endswith(".json"):
        config = model / where
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATES["llama3"][0]}))
    elif where.endswith(".jinja"):
        (model / where).write_text(TEMPLATES["llama3"][0])
    else:
        (model / where).mkdir()
        (model / where / "default.jinja").write_text(TEMPLATES["llama3"][0])
    check_tokenizer(str(model), None)
    assert load_template(str(model), None).tokenizer.chat_template


@pytest.mark.parametrize("read", [check_tokenizer, load_template])
def test_what_is_refused_before_transformers_is_imported_is_refused_by_it(
    model: Path, tiny_tokenizer_dir: str, read: object
) -> None:
    assert callable(read)
    with pytest.raises(InputError, match="model has no chat template; expected llama3, chatml or a file"):
        read(str(model), None)
    for name in TEMPLATES:
        read(str(model), name)
        token = r"<\|im_start\|>" if name == "chatml" else r"<\|begin_of_text\|>"
        with pytest.raises(InputError, match=rf"chat_template is {name}, but the tokenizer .* has no token {token}; use"):
            read(tiny_tokenizer_dir, name)
    (model / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        read(str(model), "llama3")
