"""Tokens for a model's own tokenizer: tokenizer.json with more `added_tokens`, and otherwise byte for byte what it was."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.hf_tokenizer import load_hf_tokenizer, own_reading
from megatron_cpt.tokenizer import Tokenizer
from megatron_cpt.tokenizer.hf_files import CONFIG, json_object, read_tokenizer_json
from megatron_cpt.utils.errors import InputError

logger = logging.getLogger(__name__)

OTHER = "make a tokenizer that has it in its own vocabulary and use --extend_tokenizer"
# Matched in the text as it is: matched after the normalizer, which may put or replace characters, some are never found
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
SENTENCES = ("{}", "We saw {} there.", "我们去{}了。", "a{}b", " {} ", "{}{}", "\n{}\n")
"""Where a token has to be found."""


def add_tokens(hf: str, path: str, folder: str, names: Sequence[str]) -> None:
    """Write the files `names` of the model's tokenizer with the tokens of a file added; known ones are passed over.

    Raises:
        InputError: naming the file, and the token that cannot be added
    """
    tokens = read_tokens(path)
    original = load_hf_tokenizer(hf, quiet=True)  # one that transformers and preprocessing read alike
    for name in names:
        if os.path.exists(os.path.join(hf, name)):
            shutil.copyfile(os.path.join(hf, name), os.path.join(folder, name))
    target = Path(folder, "tokenizer.json")
    if not target.exists():
        original.save_pretrained(folder)  # of a bare tokenizer.model, transformers' form of it, which is compared above
    old = own_reading(folder)
    known = _known_tokens(target)
    new = [token for token in dict.fromkeys(tokens) if token not in known and not is_token(old, token)]
    if not new:
        raise InputError(f"added_tokens {path}: the tokenizer of {hf} has all of these tokens already")
    if len(new) < len(tokens):
        logger.info(f"added_tokens {path}: {len(tokens) - len(new)} of {len(tokens)} are there already")
    ids = next_ids(target, new, path)
    entries = [{"id": number, "content": token} | FLAGS for token, number in ids.items()]
    edit(target, "added_tokens", entries)
    config = Path(folder, CONFIG)
    if config.exists() and "added_tokens_decoder" in json_object(config):  # then transformers' classes go by it alone
        listed = {str(number): {"content": token} | FLAGS for token, number in ids.items()}
        edit(config, "added_tokens_decoder", listed)
    check_added(old, own_reading(folder), ids, path)


def read_tokens(path: str) -> list[str]:
    """The lines of a file that hold more than white space. InputError: there is none, or it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            tokens = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"added_tokens {path} cannot be read: {error}") from error
    tokens = [token for token in tokens if token.strip()]
    if not tokens:
        raise InputError(f"added_tokens {path} holds no token; put one on each line")
    return tokens


def is_token(tokenizer: Any, text: str) -> bool:
    """Whether a text is one token. Its name in the vocabulary does not tell: byte-level tokenizers spell it in their way."""
    ids = tokenizer.encode(text)
    return len(ids) == 1 and bool(tokenizer.decode(ids) == text)


def next_ids(file: Path, tokens: Sequence[str], path: str) -> dict[str, int]:
    """Token -> the id that `tokenizers` gives it, the next free one. InputError: that is taken."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_buffer(read_tokenizer_json(file).content)
    taken = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    backend.add_tokens([AddedToken(token, **{k: v for k, v in FLAGS.items() if k != "special"}) for token in tokens])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    ids = {token: vocabulary[token] for token in tokens}
    for token, number in ids.items():
        if taken.get(number) == token:
            raise InputError(
                f"added_tokens {path}: token {token!r} is in the vocabulary (id {number}), but no text gives it; {OTHER}"
            )
        if number in taken:
            gap = f"{token!r} would have id {number}, which is that of {taken[number]!r}"
            raise InputError(f"added_tokens {path}: token {gap}: the ids of the tokenizer have gaps; {OTHER}")
    return ids


def check_added(old: Tokenizer, new: Tokenizer, ids: dict[str, int], path: str) -> None:
    """InputError where a text with a new token is not encoded with it, or where it is decoded as something else."""
    changed: dict[str, tuple[str, str]] = {}
    added = {number for token in new.added_tokens() if len(ids_of := new.encode(token)) == 1 for number in ids_of}
    for token, number in ids.items():
        decoded = new.decode([number])
        if decoded != token:  # as with letters that a byte-level decoder takes for bytes
            raise InputError(f"added_tokens {path}: token {token!r} would be decoded as {decoded!r}; {OTHER}")
        for sentence in SENTENCES:
            text = sentence.replace("{}", token)
            found = new.encode(text)
            longer = sentence != "{}" and not added.isdisjoint(set(found) - {number})  # another token that holds this one
            if found.count(number) != sentence.count("{}") and not longer:
                raise InputError(f"added_tokens {path}: token {token!r} is not found in the text {text!r}; {OTHER}")
            if new.decode(found) != text == old.decode(old.encode(text)):
                changed.setdefault(token, (text, new.decode(found)))
    for token, (text, decoded) in list(changed.items())[:1]:
        others = f" (and so with {len(changed) - 1} others)" if len(changed) > 1 else ""
        logger.info(
            f"note: added_tokens {path}: with token {token!r} the text {text!r} is read as {decoded!r}{others}, as this "
            f"tokenizer takes what follows an added token for the beginning of a text; if that matters, {OTHER}"
        )


def edit(file: Path, key: str, more: list[Any] | dict[str, Any]) -> None:
    """`with_more` on a file, in bytes: its line ends stay."""
    file.write_bytes(with_more(file.read_bytes().decode(), key, more).encode())


def with_more(text: str, key: str, more: list[Any] | dict[str, Any]) -> str:
    """The text of a JSON object with more elements in the list, or fields in the object, under `key`; the rest as it is."""
    inner = json.dumps(more, ensure_ascii=False, indent=2)[1:-1].rstrip()
    indented = inner.replace("\n", "\n  ")
    place = _value_of(text, key)
    if place is None:
        opening = text.index("{") + 1
        empty = "" if text[opening:].lstrip().startswith("}") else ","
        ends = "[]" if isinstance(more, list) else "{}"
        return f'{text[:opening]}\n  "{key}": {ends[0]}{indented}\n  {ends[1]}{empty}{text[opening:]}'
    start, end = place
    if text[start:end] == "null":
        return text[:start] + json.dumps(more, ensure_ascii=False) + text[end:]
    last = len(text[: end - 1].rstrip())  # the end of its last element, or of its opening bracket
    separator, space = ("", "\n  ") if last == start + 1 else (",", text[last : end - 1])
    return f"{text[:last]}{separator}{indented}{space}{text[end - 1 :]}"


def _value_of(text: str, key: str) -> tuple[int, int] | None:
    """(begin, end) of the value under a key of the outermost object, or None when it is not there."""
    decoder, place = json.JSONDecoder(), text.index("{") + 1
    while True:
        place = _skip(text, place, " \t\r\n,")
        if text[place] != '"':
            return None
        name, place = decoder.raw_decode(text, place)
        start = _skip(text, place, " \t\r\n:")
        _, place = decoder.raw_decode(text, start)
        if name == key:
            return start, place


def _skip(text: str, place: int, characters: str) -> int:
    while text[place] in characters:
        place += 1
    return place


def _known_tokens(file: Path) -> set[str]:
    """Contents of the added tokens, special ones as well, whose text encodes to no token by itself."""
    return {token["content"] for token in read_tokenizer_json(file).fields.get("added_tokens") or []}
