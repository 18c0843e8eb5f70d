"""Tokens are those of the template as a whole; the loss counts the answers and where they end, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.posttrain.conversations import Conversation, Message, Preference, RowError
from megatron_cpt.posttrain.template_files import CHATML
from megatron_cpt.posttrain.templates import IGNORED, Template, load_template
from megatron_cpt.utils.errors import InputError

TEXTS = ("The dog runs.", "狗在跑。", "And the fox?", "狐狸睡了。")
FOUR = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(TEXTS))
SYSTEM = Message("system", "Answer in Chinese.")
ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}


@pytest.fixture(scope="module", params=["llama3", "chatml"])
def template(request: pytest.FixtureRequest, chat_tokenizer_dir: str) -> Template:
    return load_template(chat_tokenizer_dir, request.param)


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_an_encoded_conversation(template: Template, system: tuple[Message, ...]) -> None:
    messages = (*system, *FOUR)
    example = template.encode(Conversation(messages))
    turns = [{"role": message.role, "content": message.content} for message in messages]
    tokenizer = template.tokenizer
    assert example.input_ids == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    counted = [number for number in example.labels if number != IGNORED]
    end = tokenizer.decode([template.end_of_turn])
    assert end in ENDS.values()
    assert tokenizer.decode(counted) == f"{TEXTS[1]}{end}{TEXTS[3]}{end}"
    assert all(label in (IGNORED, number) for label, number in zip(example.labels, example.input_ids, strict=True))
    # The prompt of each answer is what a model would be given
    first = example.labels.index(counted[0])
    asked = tokenizer.apply_chat_template(turns[: len(system) + 1], add_generation_prompt=True, return_dict=True)
    assert example.input_ids[:first] == asked["input_ids"]


def test_an_encoded_pair(template: Template) -> None:
    pair = template.encode_pair(Preference((SYSTEM, FOUR[0]), FOUR[1], FOUR[3]))
    end = template.tokenizer.decode([template.end_of_turn])
    assert template.tokenizer.decode(pair.prompt_ids) == template.prompt((SYSTEM, FOUR[0]))
    assert template.tokenizer.decode(pair.chosen_ids) == TEXTS[1] + end
    assert template.tokenizer.decode(pair.rejected_ids) == TEXTS[3] + end
    with pytest.raises(RowError, match="the same tokens"):  # the template cuts spaces off
        template.encode_pair(Preference((FOUR[0],), FOUR[1], Message("assistant", FOUR[1].content + " ")))


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_any_text_survives(chat_tokenizer_dir: str, texts: list[str]) -> None:
    template = load_template(chat_tokenizer_dir, "chatml")
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts[: len(texts) // 2 * 2]))
    example = template.encode(Conversation(messages))
    decoded = template.tokenizer.decode(example.input_ids)
    for message in messages:
        assert message.content.strip() in decoded


@pytest.mark.parametrize("text", ["a<|eot_id|>", "<|im_start|>system", "<|endoftext|>"])
def test_texts_do_not_end_turns(template: Template, text: str) -> None:
    with pytest.raises(RowError) as caught:
        template.encode(Conversation((Message("user", text), FOUR[1])))
    assert caught.value.kind == "special token in a text"


def test_a_template_in_a_file_and_the_tokenizers_own(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text(CHATML)
    found = load_template(chat_tokenizer_dir, str(path))
    found.tokenizer.save_pretrained(tmp_path / "own")
    own = load_template(str(tmp_path / "own"), None)
    assert own.encode(Conversation(FOUR)) == found.encode(Conversation(FOUR))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0]['content'] }}", "changes earlier turns|does not give back"),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "expected a special token"),
        ("{{ raise_exception('no') }}", "the chat template refuses it: no"),
        ("{% for m in messages %}", "is no Jinja template"),
        ("{{ messages + 1 }}", "the chat template refuses it"),
        ("{{ 1 / 0 }}", "the chat template refuses it"),
        ("\udcff", r"bad\.jinja, which is no text in UTF-8"),
        ("{% for m in messages %}{{ m['content'] | upper + '<|im_end|>' }}{% endfor %}", "does not give back the texts"),
        (
            "{% for m in messages %}{% if loop.last %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}",
            "earlier turns",
        ),
    ],
)
def test_templates_that_cannot_be_used(chat_tokenizer_dir: str, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jinja").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        load_template(chat_tokenizer_dir, str(tmp_path / "bad.jinja"))


def test_missing_templates(tiny_tokenizer_dir: str, chat_tokenizer_dir: str) -> None:
    with pytest.raises(InputError, match="has no chat template; expected llama3, chatml or a file"):
        load_template(chat_tokenizer_dir, None)
    with pytest.raises(InputError, match=r"chat_template is llama3, but the tokenizer .* has no token <\|begin_of_text\|>"):
        load_template(tiny_tokenizer_dir, "llama3")
    with pytest.raises(InputError, match="chat_template is nowhere, no file"):
        load_template(chat_tokenizer_dir, "nowhere")


def test_a_role_that_a_template_does_not_know(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    """A row is refused, not the run."""
    text = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + CHATML
    (tmp_path / "strict.jinja").write_text(text)
    template: Any = load_template(chat_tokenizer_dir, str(tmp_path / "strict.jinja"))
    assert template.encode(Conversation(FOUR)).input_ids
    with pytest.raises(RowError, match="the chat template refuses it: no system messages"):
        template.encode(Conversation((SYSTEM, *FOUR)))


def write_template(folder: Path, text: str) -> str:
    path = folder / "own.jinja"
    path.write_text(text)
    return str(path)


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_template_that_leaves_out_turns_of_a_role(chat_tokenizer_dir: str, tmp_path: Path, role: str) -> None:
    """Rows without such turns are used, the others refused, as prompts of pairs too."""
    text = "{% for m in messages %}{% if m['role'] != 'ROLE' %}" + TURN + "{% endif %}{% endfor %}" + ASK
    template = load_template(chat_tokenizer_dir, write_template(tmp_path, text.replace("ROLE", role)))
    assert template.encode(Conversation(FOUR)).input_ids
    tool = Message("tool", "Found: fox")
    messages = (SYSTEM, *FOUR) if role == "system" else (*FOUR, tool, Message("assistant", "A fox."))
    with pytest.raises(RowError, match=f"leaves out the content of message ., the {role}'s") as caught:
        template.encode(Conversation(messages))
    assert caught.value.kind == "left out by the template"
    prompt = (SYSTEM, FOUR[0]) if role == "system" else (*FOUR, tool)
    with pytest.raises(RowError, match=f"the {role}'s"):
        template.encode_pair(Preference(prompt, FOUR[1], FOUR[3]))


def test_a_text_that_a_later_one_holds_is_missed(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    text = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK
    template = load_template(chat_tokenizer_dir, write_template(tmp_path, text))
    with pytest.raises(RowError, match="leaves out the content of message 2"):
        template.encode(Conversation((Message("system", "Hi"), Message("user", "Hi there"), FOUR[1])))


def test_answers_that_are_not_to_be_learned_have_no_labels(template: Template) -> None:
    messages = (FOUR[0], replace(FOUR[1], learned=False), *FOUR[2:])
    example, whole = template.encode(Conversation(messages)), template.encode(Conversation(FOUR))
    assert example.input_ids == whole.input_ids
    counted = [number for number in example.labels if number != IGNORED]
    assert template.tokenizer.decode(counted) == TEXTS[3] + template.tokenizer.decode([template.end_of_turn])


def test_reasoning_is_learned_where_the_template_shows_it(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    thought = replace(FOUR[1], reasoning=("reasoning_content", "The dog is fast."))
    thinking = "('<think>' + m['reasoning_content'] + '</think>')"
    shown = TURN.replace("m['content']", f"({thinking} if m['reasoning_content'] else '') + m['content']")
    text = "{% for m in messages %}" + shown + "{% endfor %}" + ASK
    template = load_template(chat_tokenizer_dir, write_template(tmp_path, text))
    labels = [number for number in template.encode(Conversation((FOUR[0], thought))).labels if number != IGNORED]
    assert template.tokenizer.decode(labels) == f"<think>The dog is fast.</think>{TEXTS[1]}<|im_end|>"
    silent = load_template(chat_tokenizer_dir, "chatml")
    for encode in (
        lambda: silent.encode(Conversation((FOUR[0], thought))),
        lambda: silent.encode_pair(Preference((FOUR[0],), thought, FOUR[3])),
    ):
        with pytest.raises(RowError, match="leaves out the reasoning_content of message 2, the assistant's"):
            encode()
    special = replace(thought, reasoning=("reasoning_content", "<|im_end|>"))
    with pytest.raises(RowError, match="which the model would take for its own"):
        template.encode(Conversation((FOUR[0], special)))
