"""Rows of all styles become the same conversations; what is wrong with a row is said and can be counted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cpt.chat_data.conversations import (
    Conversation,
    Message,
    Preference,
    RowError,
    parse_conversation,
    parse_preference,
)

ASKED, ANSWERED = Message("user", "你好？"), Message("assistant", "你好。")
SYSTEM = Message("system", "Be kind.")
TWO = (Message("user", "Hi"), Message("assistant", "Hello"), ASKED, ANSWERED)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "你好？", "output": "你好。", "system": "Be kind.", "history": [["Hi", "Hello"]]},
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "你好？"},
                {"from": "gpt", "value": "你好。"},
            ],
            "system": "Be kind.",
        },
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": [{"type": "text", "text": "你好"}, {"type": "text", "text": "？"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "你好。"}]},
            ]
        },
    ],
)
def test_all_styles_are_one_conversation(row: dict[str, Any]) -> None:
    assert parse_conversation(row) == Conversation((SYSTEM, *TWO))


def test_instruction_and_input_are_joined() -> None:
    row = {"instruction": "Translate.", "input": "cat", "output": "猫"}
    assert parse_conversation(row).messages == (Message("user", "Translate.\ncat"), Message("assistant", "猫"))


def test_calls_of_tools_are_answers_and_what_they_give_back_is_not() -> None:
    turns = [("human", "?"), ("function_call", "{}"), ("observation", "3"), ("gpt", "Three.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": "[...]"}
    found = parse_conversation(row)
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.has_tools


@pytest.mark.parametrize(("tools", "described"), [(None, False), ("", False), ("[]", False), ([], False), ("[{}]", True)])
def test_an_empty_list_of_tools_describes_none(tools: Any, described: bool) -> None:
    assert parse_conversation({"instruction": "a", "output": "b", "tools": tools}).has_tools == described


def test_fields_of_another_style_may_be_there_and_empty() -> None:
    """Parquet has all columns in each row."""
    turns = [("human", "a"), ("gpt", "b")]
    row = {"conversations": [{"from": name, "value": text, "role": None, "content": None} for name, text in turns]}
    assert parse_conversation(row).messages == (Message("user", "a"), Message("assistant", "b"))


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ("text", "not an object", "it is a str"),
        ({"prompt": "a"}, "unknown style", "its fields are prompt"),
        ({"instruction": "a", "output": ""}, "empty answer", "message 2 is empty"),
        ({"instruction": "a", "output": None}, "not a text", "output is None"),
        ({"instruction": " ", "output": "b"}, "empty message", "message 1 is empty"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history", "wanted pairs"),
        ({"messages": []}, "no messages", "messages is []; wanted a list of messages"),
        ({"messages": "hi"}, "no messages", "messages is 'hi'; wanted a list of messages"),
        ({"messages": ["hi"]}, "no messages", "messages holds 'hi'"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no messages", "no messages but the system's"),
        ({"messages": [{"role": "bot", "content": "s"}]}, "unknown role", "from 'bot'; wanted one of system, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "not a text", "messages is 3"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer at the end", "the last message is the user's"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "turns",
            "message 2 is the user's; wanted the assistant's",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "turns", "message 1 is the assistant's"),
        (
            {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "turns",
            "message 1 is the tool's; wanted the user's",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
            "call of a tool",
            "a message of messages has tool_calls",
        ),
        (
            {"system": "s", "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "a"}]},
            "two system prompts",
            "system and the first of messages are different",
        ),
    ],
)
def test_what_is_no_conversation(row: Any, kind: str, text: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_conversation(row)
    assert caught.value.kind == kind
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "你好？", "chosen": "你好。", "rejected": "不。", "system": "Be kind."},
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "你好？"}],
            "chosen": {"from": "gpt", "value": "你好。"},
            "rejected": {"from": "gpt", "value": "不。"},
        },
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好？"}],
            "chosen": [{"role": "assistant", "content": "你好。"}],
            "rejected": [{"role": "assistant", "content": "不。"}],
        },
        {"prompt": "你好？", "chosen": "你好。", "rejected": "不。", "system": "Be kind."},
        {
            name: [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "你好？"},
                {"role": "assistant", "content": text},
            ]
            for name, text in (("chosen", "你好。"), ("rejected", "不。"))
        },
        {"prompt": "你好？"}
        | {
            name: [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "你好？"},
                {"role": "assistant", "content": text},
            ]
            for name, text in (("chosen", "你好。"), ("rejected", "不。"))
        },
    ],
)
def test_all_styles_are_one_pair(row: dict[str, Any]) -> None:
    assert parse_preference(row) == Preference((SYSTEM, ASKED), ANSWERED, Message("assistant", "不。"))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": "a", "output": "b"}, "not a preference pair"),
        ({"instruction": "a", "chosen": "b", "rejected": "b"}, "identical answers"),
        ({"instruction": "a", "chosen": "b", "rejected": " "}, "empty answer"),
        ({"instruction": "a", "chosen": "b", "rejected": {"role": "user", "content": "c"}}, "no answer at the end"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"instruction": "", "chosen": "b", "rejected": "c"}, "no prompt"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "c"}],
            },
            "two prompts",
        ),
        (
            {"prompt": "x"}
            | {
                name: [{"role": "user", "content": "y"}, {"role": "assistant", "content": name}]
                for name in ("chosen", "rejected")
            },
            "two prompts",
        ),
    ],
)
def test_what_is_no_pair(row: Any, kind: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_preference(row)
    assert caught.value.kind == kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = ("messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "chosen", "rejected")
TURN = st.fixed_dictionaries({}, optional={"role": JSON, "from": JSON, "content": JSON, "value": JSON})


@example({"instruction": "x", "output": "y", "history": 5})
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(TURN, max_size=3)) | JSON)
def test_whatever_is_in_a_row_it_is_used_or_refused(row: Any) -> None:
    for parse in (parse_conversation, parse_preference):
        with contextlib.suppress(RowError):
            assert parse(row)
