"""Chat templates and tokenizers that go together, before transformers is imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_cpt.posttrain.template_files import TEMPLATES, check_asking, check_chat_tokenizer, read_template
from megatron_cpt.posttrain.templates import load_template
from megatron_cpt.utils.errors import InputError


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
    check_chat_tokenizer(str(model), None)
    assert load_template(str(model), None).tokenizer.chat_template


@pytest.mark.parametrize("read", [check_chat_tokenizer, load_template])
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


IN_CONFIG, IN_FILE = "tokenizer_config.json", "chat_template.jinja"
BAD: dict[str, tuple[str, object, str]] = {
    "broken": (IN_FILE, "{% for x in %}", r"chat_template\.jinja is no Jinja template: line 1: Expected an expression"),
    "a filter that there is not": (
        IN_FILE,
        "\n{{ messages | lost }}",
        "is no Jinja template: line 2: No filter named 'lost'",
    ),
    "empty": (IN_FILE, " \n", r"chat_template\.jinja is empty; expected a Jinja template"),
    "no text": (IN_FILE, b"\xe9\xff{{ messages }}", "byte 0 is not UTF-8; expected UTF-8 text"),
    "empty in the configuration": (IN_CONFIG, "", r"tokenizer_config\.json: chat_template is empty"),
    "a number": (IN_CONFIG, 7, "chat_template is 7; expected a text, or a list of objects with name and template"),
    "a default that is null": (IN_CONFIG, {"default": None}, "chat_template: default is null; expected a text"),
    "a default that is a number": (IN_CONFIG, {"default": 5}, "chat_template: default is 5; expected a text"),
    "none by default": (IN_CONFIG, [{"name": "tool_use", "template": "x"}], "chat_template has tool_use and no default"),
    "no file by default": (
        "additional_chat_templates/tool_use.jinja",
        "x",
        "templates has tool_use and no default; expected",
    ),
}
GOOD = {
    "loop controls": "{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "{{ message.content }}<|im_end|>{% endfor %}",
    "answers marked": "{% for message in messages %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% endfor %}",
    "functions of transformers": "{% if not messages %}{{ raise_exception('none') }}{{ messages | tojson(indent=2) }}"
    "{{ strftime_now('%Y') }}{% endif %}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}",
}


def give(model: Path, place: str, value: object) -> None:
    """Let a model have a chat template."""
    path = model / place
    path.parent.mkdir(exist_ok=True)
    if place == IN_CONFIG:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))
    elif isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(str(value))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("check", [check_chat_tokenizer, check_asking])
def test_a_template_that_cannot_be_used(model: Path, name: str, check: object) -> None:
    assert callable(check)
    place, value, said = BAD[name]
    give(model, place, value)
    with pytest.raises(InputError, match=said) as caught:
        check(str(model), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["broken", "empty", "none by default", "no file by default"])
def test_another_template_is_used_instead(model: Path, name: str) -> None:
    give(model, *BAD[name][:2])
    check_chat_tokenizer(str(model), "chatml")
    load_template(str(model), "chatml")


@pytest.mark.parametrize("name", GOOD)
def test_what_transformers_renders_is_let_through(model: Path, name: str) -> None:
    give(model, IN_FILE, GOOD[name])
    check_chat_tokenizer(str(model), None)
    assert read_template(str(model / IN_FILE)) == GOOD[name]
    load_template(str(model), None)


def test_a_template_of_the_users_own_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages")
    with pytest.raises(InputError, match=r"mine\.jinja is no Jinja template: line 1: unexpected end of template"):
        read_template(str(tmp_path / "mine.jinja"))


def test_a_folder_is_no_template(model: Path) -> None:
    (model / IN_FILE).mkdir()
    with pytest.raises(InputError, match=r"has no chat template \(.*chat_template\.jinja: it is a folder\); expected"):
        check_chat_tokenizer(str(model), None)
    check_chat_tokenizer(str(model), "chatml")  # transformers passes over it
    check_asking(str(model), None)


def test_prompts_are_asked_by_the_own_template_or_another_or_none(model: Path, tiny_tokenizer_dir: str) -> None:
    check_asking(tiny_tokenizer_dir, None)
    with pytest.raises(InputError, match=r"chat_template is chatml, but the tokenizer .* has no token <\|im_start\|>"):
        check_asking(tiny_tokenizer_dir, "chatml")
    check_asking(str(model), "chatml")
    give(model, IN_FILE, GOOD["answers marked"])
    check_asking(str(model), "llama3")


def test_kinds_of_the_configuration_are_named_all_at_once(model: Path) -> None:
    fields = json.loads((model / IN_CONFIG).read_text()) | {"eos_token": 5, "split_special_tokens": None}
    (model / IN_CONFIG).write_text(json.dumps(fields))
    with pytest.raises(InputError, match="eos_token is 5; expected a text") as caught:
        check_chat_tokenizer(str(model), "chatml")
    assert "split_special_tokens is null; expected true or false" in str(caught.value)


def test_a_folder_without_any_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model has no tokenizer; expected tokenizer\.json"):
        check_chat_tokenizer(str(model), "chatml")
    (model / "vocab.txt").write_text("a")  # which only transformers reads
    check_chat_tokenizer(str(model), "chatml")
    (model / "vocab.txt").unlink()
    (model / IN_CONFIG).write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    check_chat_tokenizer(str(model), "chatml")
