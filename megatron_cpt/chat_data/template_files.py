"""The chat templates that are built in, and those in files. Imports no torch."""

from __future__ import annotations

import os

from megatron_cpt.checkpoint.hf_tokenizer import read_folder
from megatron_cpt.errors import InputError
from megatron_cpt.input_files import load_json
from megatron_cpt.tokenizer.hf import HuggingFaceTokenizer

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

OWN = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")  # where models have one of their own


def check_tokenizer(model: str, template: str | None) -> None:
    """Check that the tokenizer of a model's folder can be read, and goes with a chat template. None: with its own.

    Raises:
        InputError: it is damaged, has no template of its own, or lacks a token of a built-in one
    """
    tokenizer = read_folder(model)
    if template is None and not has_template(model):
        raise no_template(model)
    if template in TEMPLATES and isinstance(tokenizer, HuggingFaceTokenizer):  # others have what transformers adds to them
        missing = [token for token in TEMPLATES[template][1] if not tokenizer.has_token(token)]
        if missing:
            raise missing_token(template, model, missing[0])


def has_template(model: str) -> bool:
    """Whether a model's folder has a chat template."""
    if any(os.path.exists(os.path.join(model, name)) for name in OWN):
        return True
    path = os.path.join(model, "tokenizer_config.json")
    fields = load_json(path) if os.path.exists(path) else {}
    return isinstance(fields, dict) and fields.get("chat_template") is not None


def no_template(model: str) -> InputError:
    """Why a model cannot be talked with."""
    return InputError(f"the tokenizer {model} has no chat template; expected llama3, chatml or a file")


def missing_token(template: str, model: str, token: str) -> InputError:
    """Why a built-in template does not go with a tokenizer."""
    found = f"the tokenizer {model} has no token {token}"
    return InputError(f"chat_template is {template}, but {found}; use another template, or add its tokens")


def read_template(name: str) -> str:
    """The Jinja text of a chat template: llama3, chatml, or a file.

    Raises:
        InputError: there is no such file, or no text in it
    """
    if name in TEMPLATES:
        return TEMPLATES[name][0]
    if not os.path.isfile(name):
        raise InputError(f"chat_template is {name}, no file; expected llama3, chatml, or a file with a Jinja template")
    with open(name, encoding="utf-8") as file:
        try:
            text = file.read(MOST_CHARACTERS + 1)
        except UnicodeDecodeError as error:
            raise InputError(f"chat_template is {name}, which is no text in UTF-8: {error}") from error
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"chat_template is {name}, which has more than {MOST_CHARACTERS:,} characters; expected fewer")
    return text
