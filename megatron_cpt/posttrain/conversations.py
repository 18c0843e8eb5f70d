"""Conversations and preference pairs, from the styles in which people keep them.

    alpaca     {"instruction", "input", "output"} and "history": [[question, answer], ...], "system"
    ShareGPT   {"conversations": [{"from": "human" | "gpt" | "system" | "function_call" | "observation", "value"}, ...]}
    OpenAI     {"messages": [{"role": "user" | "assistant" | "system" | "tool", "content"}, ...]}

A turn of the assistant may say that it is not to be learned: {"weight": 0} (OpenAI, Mistral), {"train": false} (Axolotl),
{"loss": false} (ms-swift) or {"masked": true} (torchtune); a row may say so of all its answers. A turn may have a reasoning
beside its answer ("reasoning_content", "reasoning", "thinking"), which is given to the chat template under its name.

A preference pair has "chosen" and "rejected" beside a prompt in one of these styles (or "prompt", as TRL has it): texts, one
message, or lists of messages of which the last is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

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


EMPTY: tuple[Any, ...] = (None, "", "[]", [], (), {})  # what files have in a column that a row does not use
SWITCHES = ("weight", "train", "loss", "trainable", "training")  # fields of a turn that say whether it is learned, 0 or 1
MASKS = ("mask", "masked")  # that say the contrary
PARTS = ("train_detail", "training_detail")  # that say so of pieces of its text
ABOUT_LEARNING = (*SWITCHES, *MASKS, *PARTS)
REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields of a turn that are read, or say nothing that a model could learn
READ = {"role", "from", "content", "value", "tool_calls", "function_call", "id", *ABOUT_LEARNING, *REASONING}
# Fields of a row, the same
READ_OF_ROWS = {"messages", "conversations", "prompt", "chosen", "rejected", "instruction", "input", "output", "history"}
READ_OF_ROWS |= {"system", "tools", "id", *ABOUT_LEARNING}
# What a model of texts cannot be shown: a row whose text speaks of it would teach to make things up
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        reasoning: (field, text) of what comes before the answer, None: nothing
        learned: whether the loss counts it, if it is the assistant's
    """

    role: Role
    content: str
    reasoning: tuple[str, str] | None = None
    learned: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns of which at least one is the assistant's, and learned.

    Attributes:
        has_tools: the row describes tools, which no template here shows to the model
    """

    messages: tuple[Message, ...]
    has_tools: bool = False


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
    check_learned(row)
    messages = messages_of(row)
    check_turns(messages)
    if messages[-1].role != "assistant":
        raise RowError("no answer at the end", f"the last message is the {messages[-1].role}'s; expected the assistant's")
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise RowError("nothing to learn", "each answer says that it is not to be learned (weight, train, loss or mask)")
    return Conversation(messages, describes_tools(row))


def parse_preference(row: Any) -> Preference:
    """A row of a file for DPO.

    Raises:
        RowError: it is in none of the styles, an answer is empty, or both are the same
    """
    fields = as_mapping(row)
    check_learned(row)
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise RowError("not a preference pair", f"it has no {name!r}; its fields are {names_of(fields)}")
    sides = {name: turns_and_answer(fields[name], name) for name in ("chosen", "rejected")}
    (before, chosen), (other, rejected) = sides["chosen"], sides["rejected"]
    before, other = read_only(before), read_only(other)
    if before != other:
        raise RowError("two prompts", "chosen and rejected begin with different messages")
    own = read_only(messages_of(fields, prompt_only=True, answer=chosen)) if has_prompt(fields) else ()
    if own and before and own not in (before, tuple(message for message in before if message.role != "system")):
        raise RowError("two prompts", "chosen begins with other messages than the prompt beside it")
    prompt = before or own
    if not prompt:
        raise RowError("no prompt", "there is nothing before the answers")
    check_turns((*prompt, chosen))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.learned:
            raise RowError("nothing to learn", f"{name} says that it is not to be learned (weight, train, loss or mask)")
    if (chosen.content, chosen.reasoning) == (rejected.content, rejected.reasoning):
        raise RowError("identical answers", "chosen and rejected are the same")
    return Preference(prompt, chosen, rejected)


def read_only(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns of a prompt, whatever they say about learning: none of them is learned."""
    return tuple(replace(message, learned=True) for message in messages)


def check_learned(row: Any) -> None:
    """Raise RowError if a row says beside its messages that nothing of it is to be learned."""
    if not learned(as_mapping(row), "row", "it"):
        raise RowError("nothing to learn", "it says that it is not to be learned (weight, train, loss or mask)")


def describes_tools(row: Any) -> bool:
    """Whether a row has descriptions of tools."""
    return as_mapping(row).get("tools") not in EMPTY


def unused_fields(row: Any) -> tuple[str, ...]:
    """Names of fields of a row, and of its turns, that hold something and are not used."""
    fields = as_mapping(row)
    beside = {str(name) for name in fields if fields[name] not in EMPTY} - READ_OF_ROWS
    found: set[str] = set()
    for place in ("messages", "conversations", "prompt", "chosen", "rejected"):
        value = fields.get(place)
        for turn in [value] if isinstance(value, Mapping) else value if is_list(value) else []:
            if isinstance(turn, Mapping):
                found |= {str(name) for name in turn if turn[name] not in EMPTY}
    return tuple(sorted(beside | (found - READ)))


def as_mapping(row: Any) -> Mapping[str, Any]:
    """The fields of a row."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"it is a {type(row).__name__}; expected an object with fields")
    return row


def names_of(fields: Mapping[str, Any]) -> str:
    """For errors."""
    return ", ".join(map(str, fields)) or "none"


def has_prompt(fields: Mapping[str, Any]) -> bool:
    """Whether the prompt stands in fields of its own."""
    return any(fields.get(name) for name in ("messages", "conversations", "prompt", "instruction"))


def messages_of(row: Any, prompt_only: bool = False, answer: Message | None = None) -> tuple[Message, ...]:
    """All turns of a row; `prompt_only`: those before an answer that stands elsewhere, and may be there once more.

    Raises:
        RowError: it has them in no style, in two that differ, or something that is no text
    """
    fields = as_mapping(row)
    for name in MEDIA:
        if fields.get(name) not in EMPTY:
            raise RowError("images, videos or sounds", f"it has {name}; expected a conversation in text alone")
    styles = {
        name: fields.get(name) is not None for name in ("messages", "conversations", *(["prompt"] if prompt_only else []))
    }
    styles["instruction"] = fields.get("instruction") is not None or fields.get("history") not in EMPTY
    filled = [name for name, given in styles.items() if given and fields.get(name) not in EMPTY]
    # One that is there and empty is refused as such, unless it is a column that this row does not use
    used = filled or [name for name, given in styles.items() if given]
    if not used:
        raise RowError(
            "unknown style", f"it has no messages, conversations or instruction; its fields are {names_of(fields)}"
        )
    found = {name: messages_in(fields, name, prompt_only) for name in used}
    found = {name: turns[:-1] if turns[-1] == answer else turns for name, turns in found.items()}
    first = found[used[0]]
    for name, messages in found.items():
        if messages != first:
            raise RowError("two conversations", f"{used[0]} and {name} are both there, and differ; expected one of them")
    return first


def messages_in(fields: Mapping[str, Any], style: str, prompt_only: bool) -> tuple[Message, ...]:
    """All turns of a row in the style that this field is the mark of."""
    system = (Message("system", message_text(fields["system"], "system")),) if fields.get("system") else ()
    if style == "instruction":
        if "instruction" not in fields:
            raise RowError("unknown style", f"it has history without instruction; its fields are {names_of(fields)}")
        return (*system, *alpaca_turns(fields, prompt_only))
    if style == "prompt" and isinstance(fields["prompt"], str):
        return (*system, Message("user", fields["prompt"]))
    turns = turns_of(fields[style], style)
    if turns[0].role != "system":
        return (*system, *turns)
    if system and system[0] != turns[0]:
        raise RowError("two system prompts", f"system and the first of {style} are different")
    return turns


def alpaca_turns(fields: Mapping[str, Any], prompt_only: bool) -> list[Message]:
    """Of instruction, input, output and history."""
    turns = []
    history = fields.get("history") or []
    if not isinstance(history, Sequence):
        raise RowError("history", f"history is {short_text(history)}; expected a list of questions and answers")
    for pair in history:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError("history", f"history holds {short_text(pair)}; expected pairs of question and answer")
        turns += [Message("user", message_text(pair[0], "history")), Message("assistant", message_text(pair[1], "history"))]
    parts = [message_text(fields["instruction"], "instruction"), message_text(fields.get("input") or "", "input")]
    turns.append(Message("user", "\n".join(part for part in parts if part)))
    if not prompt_only:
        turns.append(Message("assistant", message_text(fields.get("output"), "output")))
    return turns


def turns_of(value: Any, name: str) -> tuple[Message, ...]:
    """A list of messages in the style of ShareGPT or OpenAI."""
    if not is_list(value) or not len(value):
        raise RowError("no messages", f"{name} is {short_text(value)}; expected a list of messages")
    return tuple(message_of(item, name) for item in value)


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a sequence, but no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def message_of(item: Any, name: str) -> Message:
    """One of them."""
    if not isinstance(item, Mapping):
        raise RowError("no messages", f"{name} holds {short_text(item)}; expected messages")
    for call in ("tool_calls", "function_call"):
        if item.get(call):
            raise RowError("call of a tool", f"a message of {name} has {call}; expected the call as its text")
    role = item.get("from") if item.get("role") is None else item["role"]  # Parquet has all columns in each row
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("unknown role", f"a message of {name} is from {role!r}; expected one of {', '.join(ROLES)}")
    content = item.get("value") if item.get("content") is None else item["content"]
    for medium in MEDIA:
        if item.get(medium) not in EMPTY:
            raise RowError("images, videos or sounds", f"a message of {name} has {medium}; expected text alone")
    counts = learned(item, "turn", f"a message of {name}")
    return Message(ROLES[role], message_text(content, name), reasoning_of(item, name), counts)


def learned(item: Mapping[str, Any], kind: str, what: str) -> bool:
    """Whether none of the fields of a turn, or of a row (`kind`), says that it is not to be learned."""
    for switch in (*SWITCHES, *MASKS):
        value = item.get(switch)
        if switch in MASKS and is_default_mask(value):
            continue
        if value is not None and (not isinstance(value, (int, float)) or value not in (0, 1)):
            raise RowError(f"weight of a {kind}", f"{what} has {switch} {short_text(value)}; expected 0 or 1")
    for part in PARTS:
        if item.get(part) not in EMPTY:
            raise RowError(f"weight of a {kind}", f"{what} has {part}; expected answers that are learned as a whole or not")
    return all(item.get(switch) is None or item[switch] == 1 for switch in SWITCHES) and not any(
        item.get(mask) == 1 for mask in MASKS
    )


def is_default_mask(value: Any) -> bool:
    """Whether a mask says, as in NeMo's rows, that the turns of the user are not learned: they never are."""
    return isinstance(value, str) and ROLES.get(value.lower()) == "user"


def for_asking(row: Any) -> Any:
    """A row without what it says about learning, which is nothing to whoever asks its question."""
    if not isinstance(row, Mapping):
        return row

    def bare(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: field for name, field in value.items() if name not in ABOUT_LEARNING}

    return {name: [bare(turn) for turn in value] if is_list(value) else bare(value) for name, value in bare(row).items()}


def reasoning_of(item: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """(field, text) of the reasoning in a turn."""
    found = [(field, message_text(item[field], field)) for field in REASONING if item.get(field) not in EMPTY]
    if len({text for _, text in found}) > 1:
        raise RowError("two reasonings", f"a message of {name} has {found[0][0]} and {found[1][0]}, which differ")
    return found[0] if found else None


def turns_and_answer(value: Any, name: str) -> tuple[tuple[Message, ...], Message]:
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


def message_text(value: Any, name: str) -> str:
    """A text; OpenAI's list of parts is joined."""
    if is_list(value):
        parts = [part.get("text", part.get("value")) for part in value if isinstance(part, Mapping)]
        if len(parts) == len(value) and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise RowError("not a text", f"{name} is {short_text(value)}; expected a text")
    return value


def check_turns(messages: Sequence[Message]) -> None:
    """Raise RowError unless user (or tool) and assistant take turns, after at most one system message, none empty."""
    turns = list(messages[1:] if messages and messages[0].role == "system" else messages)
    if not turns:
        raise RowError("no messages", "it has no messages but the system's")
    if turns[0].role == "tool":
        raise RowError("turns", "message 1 is the tool's; expected the user's")
    for number, message in enumerate(turns, 1):
        if not message.content.strip():
            raise RowError(f"empty {'answer' if message.role == 'assistant' else 'message'}", f"message {number} is empty")
        if (message.role == "assistant") != (number % 2 == 0):
            wanted = "assistant's" if number % 2 == 0 else "user's"
            raise RowError("turns", f"message {number} is the {message.role}'s; expected the {wanted}")


def short_text(value: Any) -> str:
    """For errors."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
