"""The chat templates that are built in, and those in files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from megatron_cpt.checkpoint.damage import json_fields
from megatron_cpt.checkpoint.hf_tokenizer import check_field_kinds, read_folder
from megatron_cpt.model.hf_folder import check_answer_fits, positions_of
from megatron_cpt.posttrain.template_limits import check_jinja
from megatron_cpt.tokenizer import Tokenizer
from megatron_cpt.tokenizer.hf import HuggingFaceTokenizer
from megatron_cpt.tokenizer.hf_files import CONFIG
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.input_files import CHAT_TEMPLATES, decoded, shown, why_unreadable

MOST_CHARACTERS = 1_000_000  # of a template
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name -> (template, special tokens in it, the one that ends a turn)
TEMPLATES = {
    "llama3": (LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
}

FILE = "chat_template.jinja"  # in a model's folder, with its own template


def check_chat_tokenizer(model: str, template: str | None, field: str = "chat_template") -> None:
    """Check that the tokenizer of a model's folder can be read, and goes with a chat template. None: with its own.

    `field`: of the configuration, which names the template.

    Raises:
        InputError: it is damaged, has no template of its own, or lacks a token of a built-in one; InputErrors: several
    """
    refusals = Refusals()
    with refusals.noted():
        check_tokens(model, read_folder(model), template, field)
    with refusals.noted():
        own_templates(model)  # which are read with the tokenizer, whatever template is used
        if template is None:
            own = own_template(model)
            if own is None:
                raise no_template(model)
            check_jinja(*own)
    refusals.raise_any()


def check_asking(model: str, template: str | None) -> None:
    """As `check_chat_tokenizer`, for prompts: a model with a template of its own gets them by that one; None: or by none."""
    refusals = Refusals()
    with refusals.noted():
        own = own_template(model)
        if own is not None:
            check_jinja(*own)
    with refusals.noted():
        tokenizer = read_folder(model)
        if own_template(model) is None:
            check_tokens(model, tokenizer, template)
    refusals.raise_any()


def check_tokens(model: str, tokenizer: Tokenizer | None, template: str | None, field: str = "chat_template") -> None:
    """Raise InputError if a tokenizer lacks a token of a built-in template; None is one that only transformers reads."""
    if template in TEMPLATES and isinstance(tokenizer, HuggingFaceTokenizer):  # others have what transformers adds to them
        missing = [token for token in TEMPLATES[template][1] if not tokenizer.has_token(token)]
        if missing:
            raise missing_token(template, model, missing[0], field)


def check_prompts(model: str, prompts: Sequence[str]) -> None:
    """Raise InputError for a text to go on with, without a template, of which a tokenizer makes no token."""
    tokenizer = read_folder(model)
    for prompt in prompts:
        if isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.encode_prompt(prompt):
            raise no_tokens(prompt, model)


def check_prompts_fit(model: str, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raise InputError for a text that leaves what a model goes on with too few positions."""
    tokenizer, positions = read_folder(model), positions_of(model)
    for prompt in prompts:
        if isinstance(tokenizer, HuggingFaceTokenizer):
            check_answer_fits(model, positions, prompt, len(tokenizer.encode_prompt(prompt)), max_new_tokens)


def no_tokens(prompt: str, model: str) -> InputError:
    """Why nothing can be made of a prompt."""
    return InputError(f"prompt is {prompt!r}, of which the tokenizer {model} makes no token; expected a text")


def own_template(model: str) -> tuple[str, str] | None:
    """(file, Jinja) of the chat template that transformers takes from a model's folder; None: it finds none there.

    Raises:
        InputError: a file of them cannot be read, or there are some, but none for what is done here
    """
    where, texts = own_templates(model)
    if not texts:
        return None
    if "default" in texts and not isinstance(texts["default"], str):
        raise InputError(f"{where}: default is {shown(texts['default'])}; expected a text")
    if "default" not in texts:
        raise InputError(f"{where} has {', '.join(map(str, texts))} and no default; expected a template of that name")
    return where, texts["default"]


def own_templates(model: str) -> tuple[str, dict[str, Any]]:
    """(file that says which is the default, name -> Jinja) of all chat templates in a model's folder.

    Raises:
        InputError: a file of them cannot be read
    """
    files, path = template_files(model), os.path.join(model, CONFIG)
    if files:
        texts = {name: template_in(path) for name, path in files.items()}
        return files.get("default", os.path.join(model, CHAT_TEMPLATES)), texts
    if not os.path.exists(path):
        return path, {}
    fields = json_fields(path)
    check_field_kinds(path, "chat_template")
    return f"{path}: chat_template", named_templates(fields.get("chat_template"))


def template_files(model: str) -> dict[str, str]:
    """Name -> path of the templates in files of their own in a model's folder; they come before tokenizer_config.json."""
    folder = os.path.join(model, CHAT_TEMPLATES)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    paths = {"default": os.path.join(model, FILE)}
    paths |= {name.removesuffix(".jinja"): os.path.join(folder, name) for name in names if name.endswith(".jinja")}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}  # transformers passes over folders


def template_in(path: str) -> str:
    """The text of a template's file in a model's folder. InputError: it cannot be read."""
    why = why_unreadable(path)
    if why is not None:
        raise InputError(f"{path}: {why}; expected a file with a Jinja template")
    with open(path, "rb") as file:
        return decoded(file.read(), path)


def named_templates(value: Any) -> dict[str, Any]:
    """Name -> Jinja of the field chat_template of a tokenizer_config.json: null, a text, or several."""
    if isinstance(value, list):
        return {str(item["name"]): item["template"] for item in value}
    return value if isinstance(value, dict) else {} if value is None else {"default": value}


def no_template(model: str) -> InputError:
    """Why a model cannot be talked with."""
    path = os.path.join(model, FILE)
    why = f" ({path}: {why_unreadable(path)})" if os.path.lexists(path) and not os.path.isfile(path) else ""
    return InputError(f"the tokenizer {model} has no chat template{why}; expected llama3, chatml or a file")


def missing_token(template: str, model: str, token: str, field: str = "chat_template") -> InputError:
    """Why a built-in template does not go with a tokenizer."""
    found = f"the tokenizer {model} has no token {token}"
    return InputError(f"{field} is {template}, but {found}; use another template, or add its tokens")


def read_template(name: str, field: str = "chat_template") -> str:
    """As `template_to_use`, checked.

    Raises:
        InputError: there is no such file, or no template in it
    """
    text = template_to_use(name, field)
    if name not in TEMPLATES:
        check_jinja(name, text)
    return text


def template_to_use(name: str, field: str = "chat_template") -> str:
    """The Jinja text of a chat template: llama3, chatml, or a file.

    `field`: of the configuration, which names it.

    Raises:
        InputError: there is no such file, or no text in it
    """
    if name in TEMPLATES:
        return TEMPLATES[name][0]
    if not os.path.isfile(name):
        raise InputError(f"{field} is {name}, no file; expected llama3, chatml, or a file with a Jinja template")
    with open(name, encoding="utf-8") as file:
        try:
            text = file.read(MOST_CHARACTERS + 1)
        except UnicodeDecodeError as error:
            raise InputError(f"{field} is {name}, which is no text in UTF-8: {error}") from error
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{field} is {name}, which has more than {MOST_CHARACTERS:,} characters; expected fewer")
    return text
