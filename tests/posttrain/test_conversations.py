"""Rows of all styles become the same conversations; what is wrong with a row is said and can be counted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cpt.posttrain.conversations import (
    Conversation,
    Message,
    Preference,
    RowError,
    parse_conversation,
    parse_preference,
    unused_fields,
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
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history", "expected pairs"),
        ({"messages": []}, "no messages", "messages is []; expected a list of messages"),
        ({"messages": "hi"}, "no messages", "messages is 'hi'; expected a list of messages"),
        ({"messages": ["hi"]}, "no messages", "messages holds 'hi'"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no messages", "no messages but the system's"),
        ({"messages": [{"role": "bot", "content": "s"}]}, "unknown role", "from 'bot'; expected one of system, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "not a text", "messages is 3"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer at the end", "the last message is the user's"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "turns",
            "message 2 is the user's; expected the assistant's",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "turns", "message 1 is the assistant's"),
        (
            {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "turns",
            "message 1 is the tool's; expected the user's",
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


def spoken(**fields: Any) -> dict[str, Any]:
    """A row of two turns with fields beside the answer."""
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"} | fields, *LAST]}


LAST = [{"role": "user", "content": "你好？"}, {"role": "assistant", "content": "你好。"}]


@pytest.mark.parametrize("field", ["weight", "train", "loss", "trainable", "training"])
@pytest.mark.parametrize(
    ("value", "learned"), [(0, False), (0.0, False), (False, False), (1, True), (1.0, True), (True, True), (None, True)]
)
def test_a_turn_says_whether_it_is_learned(field: str, value: Any, learned: bool) -> None:
    found = parse_conversation(spoken(**{field: value})).messages
    assert [message.learned for message in found] == [True, learned, True, True]


@pytest.mark.parametrize("field", ["mask", "masked"])
def test_a_turn_says_whether_it_is_masked(field: str) -> None:
    """The contrary: torchtune has `masked`; NeMo's rows name the role that is not learned."""
    for value, learned in ((True, False), (1, False), (0, True), (False, True), (None, True), ("User", True)):
        found = parse_conversation(spoken(**{field: value})).messages
        assert [message.learned for message in found] == [True, learned, True, True]
        assert unused_fields(spoken(**{field: value})) == ()
    row = {"instruction": "a", "output": "b"}
    assert parse_conversation(row | {field: "User"}) == parse_conversation(row)
    with pytest.raises(RowError, match="it says that it is not to be learned"):
        parse_conversation(row | {field: True})
    for odd in ("Assistant", [1, 0], 0.5):
        with pytest.raises(RowError, match=rf"{field} .*; expected 0 or 1"):
            parse_conversation(spoken(**{field: odd}))


@pytest.mark.parametrize("field", ["train_detail", "training_detail"])
def test_a_turn_that_is_to_be_learned_in_pieces_is_refused(field: str) -> None:
    """As Axolotl has it: all of it would be learned."""
    pieces = [{"begin_offset": 0, "end_offset": 2, "train": False}]
    with pytest.raises(RowError, match=f"has {field}; expected answers that are learned as a whole or not") as caught:
        parse_conversation(spoken(**{field: pieces}))
    assert caught.value.kind == "weight of a turn"
    assert parse_conversation(spoken(**{field: []})) == parse_conversation(spoken())


def test_turns_of_a_prompt_are_the_same_whatever_they_say_about_learning() -> None:
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    silent = [before[0], before[1] | {"weight": 0}, before[2]]
    answers = {side: {"role": "assistant", "content": side} for side in ("chosen", "rejected")}
    expected = parse_preference({"prompt": before} | answers)
    whole = {side: [*before, answer] for side, answer in answers.items()}
    rows: list[dict[str, Any]] = [
        whole | {"chosen": [*silent, answers["chosen"]]},
        {"prompt": silent} | whole,
        {"messages": silent} | answers,
    ]
    for row in rows:
        assert parse_preference(row) == expected


def test_turns_that_say_it_in_no_known_way_are_refused() -> None:
    for value in (0.5, 2, "no", [0], float("nan")):
        with pytest.raises(RowError, match=r"a message of messages has weight .*; expected 0 or 1") as caught:
            parse_conversation(spoken(weight=value))
        assert caught.value.kind == "weight of a turn"
    silent = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False}]
    with pytest.raises(RowError) as caught:
        parse_conversation({"conversations": silent})
    assert caught.value.kind == "nothing to learn"
    pair = {"prompt": "a", "chosen": {"role": "assistant", "content": "b", "weight": 0}, "rejected": "c"}
    with pytest.raises(RowError, match="chosen says that it is not to be learned"):
        parse_preference(pair)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stays_with_its_answer(field: str) -> None:
    found = parse_conversation(spoken(**{field: "Greet."})).messages
    assert [message.reasoning for message in found] == [None, (field, "Greet."), None, None]
    with pytest.raises(RowError, match=f"{field} is 3; expected a text"):
        parse_conversation(spoken(**{field: 3}))


def test_two_reasonings_of_one_answer() -> None:
    assert parse_conversation(spoken(reasoning="a", thinking="a")).messages[1].reasoning == ("reasoning", "a")
    with pytest.raises(RowError, match="reasoning and thinking, which differ"):
        parse_conversation(spoken(reasoning="a", thinking="b"))


@pytest.mark.parametrize("field", ["images", "image", "videos", "audios", "audio"])
def test_media_are_refused_in_rows_and_in_turns(field: str) -> None:
    for row in (spoken() | {field: ["1.png"]}, spoken(**{field: "1.png"})):
        with pytest.raises(RowError, match=f"has {field}") as caught:
            parse_conversation(row)
        assert caught.value.kind == "images, videos or sounds"
    assert parse_conversation(spoken(**{field: []}) | {field: None})


def test_a_second_style_has_to_say_the_same() -> None:
    """Parquet has the columns of all styles in each row, and most are empty."""
    same = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "instruction": "a",
        "output": "b",
    }
    assert parse_conversation(same | {"messages": None}).messages == (Message("user", "a"), Message("assistant", "b"))
    assert parse_conversation(same | {"messages": [], "history": []}).messages[1].content == "b"
    for other in ({"instruction": "c"}, {"history": [["c", "d"]]}, {"messages": LAST}):
        with pytest.raises(RowError, match="are both there, and differ") as caught:
            parse_conversation(same | other)
        assert caught.value.kind == "two conversations"
    pair = {"prompt": "a", "instruction": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(RowError, match="prompt and instruction are both there"):
        parse_preference(pair)
    assert parse_preference(pair | {"instruction": "a"}).prompt == (Message("user", "a"),)


def test_fields_of_turns_that_nothing_uses_are_named() -> None:
    assert unused_fields(spoken(name="bot", weight=1, refusal=None, id="3")) == ("name",)
    assert unused_fields({"prompt": "a", "chosen": {"content": "b", "score": 3}, "rejected": 5}) == ("score",)
    assert unused_fields({"instruction": "a", "output": "b", "topic": "c", "source": "", "weight": 1}) == ("topic",)


def test_the_better_answer_may_stand_in_the_conversation_too() -> None:
    """As in UltraFeedback: prompt, messages with the chosen answer, and whole conversations as chosen and rejected."""
    user, good, bad = ({"role": r, "content": t} for r, t in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
    row = {"prompt": "a", "messages": [user, good], "chosen": [user, good], "rejected": [user, bad], "score_chosen": 8.0}
    assert parse_preference(row) == Preference((Message("user", "a"),), Message("assistant", "b"), Message("assistant", "c"))
    with pytest.raises(RowError, match="messages and prompt are both there, and differ"):
        parse_preference(row | {"messages": [user, bad]})
