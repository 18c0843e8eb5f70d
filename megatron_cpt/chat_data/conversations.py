"""Conversations and preference pairs, from the styles in which people keep them.

    alpaca     {"instruction", "input", "output"} and "history": [[question, answer], ...], "system"
    ShareGPT   {"conversations": [{"from": "human" | "gpt" | "system" | "function_call" | "observation", "value"}, ...]}
    OpenAI     {"messages": [{"role": "user" | "assistant" | "system" | "tool", "content"}, ...]}

A preference pair has "chosen" and "rejected" beside a prompt in one of these styles (or "prompt", as TRL has it): texts, one
message, or lists of messages of which the last is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns of which at least one is the assistant's."""

    messages: tuple[Message, ...]
    has_tools: bool = False  # the row describes tools, which no template here shows to the model


@dataclass(frozen=True)
class Preference:
    """Two answers to the same conversation."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


class RowError(ValueError):
    """A row that cannot be used. `kind` is what rows are counted by, the text says what is wrong with this one."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def parse_conversation(row: Any) -> Conversation:
    """A row of a file for SFT.

    Raises:
        RowError: it is in none of the styles, or no conversation that something can be learned from
    """
    messages = messages_of(row)
    check_turns(messages)
    if messages[-1].role != "assistant":
        raise RowError("no answer at the end", f"the last message is the {messages[-1].role}'s; wanted the assistant's")
    return Conversation(messages, describes_tools(row))


def parse_preference(row: Any) -> Preference:
    """A row of a file for DPO.

    Raises:
        RowError: it is in none of the styles, an answer is empty, or both are the same
    """
    fields = as_mapping(row)
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise RowError("not a preference pair", f"it has no {name!r}; its fields are {names_of(fields)}")
    sides = {name: answer_of(fields[name], name) for name in ("chosen", "rejected")}
    (before, chosen), (other, rejected) = sides["chosen"], sides["rejected"]
    if before != other:
        raise RowError("two prompts", "chosen and rejected begin with different messages")
    own = messages_of(fields, prompt_only=True) if has_prompt(fields) else ()
    if own and before and own not in (before, tuple(message for message in before if message.role != "system")):
        raise RowError("two prompts", "chosen begins with other messages than the prompt beside it")
    prompt = before or own
    if not prompt:
        raise RowError("no prompt", "there is nothing before the answers")
    check_turns((*prompt, chosen))
    if chosen.content == rejected.content:
        raise RowError("identical answers", "chosen and rejected are the same")
    return Preference(prompt, chosen, rejected)


def describes_tools(row: Any) -> bool:
    """Whether a row has descriptions of tools; some files have an empty list in each, as text."""
    return as_mapping(row).get("tools") not in (None, "", "[]", [])


def as_mapping(row: Any) -> Mapping[str, Any]:
    """The fields of a row."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"it is a {type(row).__name__}; wanted an object with fields")
    return row


def names_of(fields: Mapping[str, Any]) -> str:
    """For errors."""
    return ", ".join(map(str, fields)) or "none"


def has_prompt(fields: Mapping[str, Any]) -> bool:
    """Whether the prompt stands in fields of its own."""
    return any(fields.get(name) for name in ("messages", "conversations", "prompt", "instruction"))


def messages_of(row: Any, prompt_only: bool = False) -> tuple[Message, ...]:
    """All turns of a row; `prompt_only`: those before an answer that stands elsewhere."""
    fields = as_mapping(row)
    system = (Message("system", text_of(fields["system"], "system")),) if fields.get("system") else ()
    for name in ("messages", "conversations", *(["prompt"] if prompt_only else [])):
        if fields.get(name) is not None and not (name == "prompt" and isinstance(fields[name], str)):
            turns = turns_of(fields[name], name)
            if turns[0].role != "system":
                return (*system, *turns)
            if system and system[0] != turns[0]:
                raise RowError("two system prompts", f"system and the first of {name} are different")
            return turns
    if prompt_only and isinstance(fields.get("prompt"), str):
        return (*system, Message("user", text_of(fields["prompt"], "prompt")))
    if "instruction" not in fields:
        raise RowError(
            "unknown style", f"it has no messages, conversations or instruction; its fields are {names_of(fields)}"
        )
    return (*system, *alpaca_turns(fields, prompt_only))


def alpaca_turns(fields: Mapping[str, Any], prompt_only: bool) -> list[Message]:
    """Of instruction, input, output and history."""
    turns = []
    history = fields.get("history") or []
    if not isinstance(history, Sequence):
        raise RowError("history", f"history is {shortened(history)}; wanted a list of questions and answers")
    for pair in history:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError("history", f"history holds {shortened(pair)}; wanted pairs of question and answer")
        turns += [Message("user", text_of(pair[0], "history")), Message("assistant", text_of(pair[1], "history"))]
    parts = [text_of(fields["instruction"], "instruction"), text_of(fields.get("input") or "", "input")]
    turns.append(Message("user", "\n".join(part for part in parts if part)))
    if not prompt_only:
        turns.append(Message("assistant", text_of(fields.get("output"), "output")))
    return turns


def turns_of(value: Any, name: str) -> tuple[Message, ...]:
    """A list of messages in the style of ShareGPT or OpenAI."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise RowError("no messages", f"{name} is {shortened(value)}; wanted a list of messages")
    return tuple(message_of(item, name) for item in value)


def message_of(item: Any, name: str) -> Message:
    """One of them."""
    if not isinstance(item, Mapping):
        raise RowError("no messages", f"{name} holds {shortened(item)}; wanted messages")
    for call in ("tool_calls", "function_call"):
        if item.get(call):
            raise RowError("call of a tool", f"a message of {name} has {call}; wanted the call as its text")
    role = item.get("from") if item.get("role") is None else item["role"]  # Parquet has all columns in each row
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("unknown role", f"a message of {name} is from {role!r}; wanted one of {', '.join(ROLES)}")
    content = item.get("value") if item.get("content") is None else item["content"]
    return Message(ROLES[role], text_of(content, name))


def answer_of(value: Any, name: str) -> tuple[tuple[Message, ...], Message]:
    """(turns before, answer) of one side of a pair: a text, a message, or messages with the answer at the end."""
    if isinstance(value, str):
        turns: tuple[Message, ...] = (Message("assistant", value),)
    elif isinstance(value, Mapping):
        turns = (message_of(value, name),)
    else:
        turns = turns_of(value, name)
    if turns[-1].role != "assistant":
        raise RowError("no answer at the end", f"{name} ends with a message of the {turns[-1].role}")
    if not turns[-1].content.strip():
        raise RowError("empty answer", f"{name} is empty")
    return turns[:-1], turns[-1]


def text_of(value: Any, name: str) -> str:
    """A text; OpenAI's list of parts is joined."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [part.get("text", part.get("value")) for part in value if isinstance(part, Mapping)]
        if len(parts) == len(value) and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise RowError("not a text", f"{name} is {shortened(value)}; wanted a text")
    return value


def check_turns(messages: Sequence[Message]) -> None:
    """Raise RowError unless user (or tool) and assistant take turns, after at most one system message, none empty."""
    turns = list(messages[1:] if messages and messages[0].role == "system" else messages)
    if not turns:
        raise RowError("no messages", "it has no messages but the system's")
    if turns[0].role == "tool":
        raise RowError("turns", "message 1 is the tool's; wanted the user's")
    for number, message in enumerate(turns, 1):
        if not message.content.strip():
            raise RowError(f"empty {'answer' if message.role == 'assistant' else 'message'}", f"message {number} is empty")
        if (message.role == "assistant") != (number % 2 == 0):
            wanted = "assistant's" if number % 2 == 0 else "user's"
            raise RowError("turns", f"message {number} is the {message.role}'s; wanted the {wanted}")


def shortened(value: Any) -> str:
    """For errors."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
