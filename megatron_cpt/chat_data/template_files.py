"""The chat templates that are built in, and those in files. Imports no torch."""

from __future__ import annotations

import os

from megatron_cpt.errors import InputError

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
