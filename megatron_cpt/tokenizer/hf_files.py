"""What the files of a Hugging Face tokenizer say together: tokenizer.json, and tokens that only its configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import shown

MOST_GROWTH = 1000  # of a text by its normalizer; that of Llama 2 replaces one character by one
MOST_STEPS = 500
CONFIG = "tokenizer_config.json"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer.json as it is read here.

    Attributes:
        content: its bytes; others than the file's only where a note says what was changed
        fields: the same, parsed
        configured: entries of `added_tokens` that tokenizer_config.json alone names, in order of their ids
        notes: a line for each difference from the file
    """

    content: bytes
    fields: dict[str, Any]
    configured: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def read_tokenizer_json(file: Path) -> TokenizerJson:
    """The one reading of `file` that preprocessing, fine-tuning, evaluation and conversion share.

    BPE dropout, a noise for training that makes every encoding another one, is switched off. Tokens that only the
    `added_tokens_decoder` of the tokenizer_config.json beside it names are added, as transformers adds them.

    Raises:
        InputError: one of the two is no JSON object, or names tokens in another form
    """
    content = file.read_bytes()
    fields = json_object(file, content)
    added = fields.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in added):
        raise InputError(f"{file}: added_tokens is {shown(added)}; expected a list of tokens with their content")
    _check_growth(file, fields.get("normalizer"))
    notes = []
    model = fields.get("model")
    _check_merges(file, model)
    if isinstance(model, dict) and model.get("dropout"):
        notes.append(f"{file}: model.dropout is {model['dropout']}, which makes every encoding another one; read as 0")
        fields = fields | {"model": model | {"dropout": None}}
    if more := _only_configured(file, fields):
        names = ", ".join(repr(token["content"]) for token in more[:3]) + (", ..." if len(more) > 3 else "")
        notes.append(f"{file.with_name(CONFIG)}: {len(more)} tokens that {file.name} does not have ({names}) are added")
        fields = fields | {"added_tokens": [*(fields.get("added_tokens") or []), *more]}
    return TokenizerJson(orjson.dumps(fields) if notes else content, fields, tuple(more), tuple(notes))


def _check_growth(file: Path, normalizer: Any) -> None:
    """InputError for replacements that would make a text thousands of times as long, one after the other.

    Each pattern is put through all steps; of a regular expression it is taken that every character matches it.
    """
    steps = _text_steps(normalizer)
    expected = f"{file}: normalizer makes of a pattern of its own {{}}; expected at most {MOST_GROWTH} times its characters"
    if len(steps) > MOST_STEPS:
        raise InputError(f"{file}: normalizer has {len(steps)} steps; expected at most {MOST_STEPS}")
    for start in {pattern or "a" for pattern, _ in steps}:
        text = start
        for pattern, content in steps:
            if pattern is None:
                text = content * max(1, len(text)) or text
            else:
                text = text.replace(pattern, content) if pattern else content + text
            if len(text) > MOST_GROWTH * len(start):
                raise InputError(expected.format(f"{len(text)} characters"))


def _check_merges(file: Path, model: Any) -> None:
    """InputError for merges without the prefix of pieces inside of words: the library cuts it off unseen, and aborts."""
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not prefix or not isinstance(prefix, str):
        return
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not parts or not isinstance(parts[-1], str) or not parts[-1].startswith(prefix):
            raise InputError(
                f"{file}: model.merges has {shown(merge)}; expected a second part that begins with {shown(prefix)}, "
                "model.continuing_subword_prefix"
            )


def _text_steps(normalizer: Any) -> list[tuple[str | None, str]]:
    """(pattern, what replaces it) of a normalizer's steps, in order: None: a regular expression; "": put before the text."""
    found: list[tuple[str | None, str]] = []
    left = [normalizer]
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        if step.get("type") == "Replace":
            pattern = step.get("pattern")
            found.append((pattern.get("String") if isinstance(pattern, dict) else None, str(step.get("content", ""))))
        elif step.get("type") == "Prepend":
            found.append(("", str(step.get("prepend", ""))))
        parts = step.get("normalizers")
        left += reversed(parts) if isinstance(parts, list) else []
    return found


def json_object(file: Path, content: bytes | None = None) -> dict[str, Any]:
    """The fields of a JSON file. InputError: it holds something else."""
    try:
        fields = orjson.loads(file.read_bytes() if content is None else content)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON ({error}); expected a Hugging Face tokenizer's file") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file}: not a JSON object; expected a Hugging Face tokenizer's file")
    return fields


def named_token(folder: Path, field: str) -> tuple[str, str] | None:
    """(token, name of the file) of `eos_token` or `bos_token` as the files beside tokenizer.json have it, or None."""
    for name in (CONFIG, "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        value = json_object(file).get(field)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value, name
    return None


def _only_configured(file: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries for `added_tokens` of what tokenizer_config.json names and tokenizer.json has nowhere, in the order of ids."""
    config = file.with_name(CONFIG)
    listed = json_object(config).get("added_tokens_decoder") if config.is_file() else None
    if not isinstance(listed, dict):
        return []
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = {token["content"] for token in fields.get("added_tokens") or []}
    if isinstance(vocabulary, dict):
        pieces = set(vocabulary)
    else:
        pieces = {piece[0] for piece in vocabulary or [] if isinstance(piece, list) and piece and isinstance(piece[0], str)}
    found = []
    for number, token in listed.items():
        if not (number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)):
            raise InputError(f"{config}: added_tokens_decoder.{number} is {token!r}; expected an id and its token")
        if token["content"] not in known and token["content"] not in pieces:
            found.append({"id": int(number), "content": token["content"]} | {f: bool(token.get(f)) for f in FLAGS})
    return sorted(found, key=lambda token: int(token["id"]))
