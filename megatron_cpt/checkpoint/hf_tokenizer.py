"""transformers' tokenizer for fine-tuning, evaluation and chat: one that gives the ids that preprocessing gives, or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.damage import JSON_FILES, check_json, reading_hf_folder
from megatron_cpt.checkpoint.layout import WEIGHT_INDICES
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from megatron_cpt.tokenizer.behaviour import behaviour_sha256, first_encoding_difference
from megatron_cpt.tokenizer.hf_files import CONFIG, json_object, read_tokenizer_json
from megatron_cpt.utils.errors import InputError, Refusals, if_on_the_hub
from megatron_cpt.utils.input_files import load_json, shown

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "tokenizer.tiktoken", "chat_template.jinja", "chat_template.json"),
)
AS_THE_FILE_SAYS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is; others build normalizer and pre-tokenizer by themselves."""
VOCABULARIES = (".json", ".model", ".txt", ".tiktoken", ".bpe", ".vocab", ".spm")  # endings of files with one
NO_VOCABULARY = (
    *JSON_FILES,
    *("chat_template.json", "manifest.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"),
    *WEIGHT_INDICES,
)
OF_BYTES = ("ByT5", "Canine", "Perceiver")  # classes of transformers without a file


def load_hf_tokenizer(folder: str, quiet: bool = False) -> Any:
    """transformers' tokenizer of a folder, read from tokenizer.json as it is, whatever class its configuration names.

    `quiet`: do not say where other programs read the folder otherwise.

    Raises:
        InputError: it cannot be read, or is not the tokenizer that preprocessing reads there
    """
    own = read_folder(folder)
    tokenizer = _from_transformers(folder, by_file=os.path.isfile(os.path.join(folder, "tokenizer.json")))
    if getattr(getattr(getattr(tokenizer, "_tokenizer", None), "model", None), "dropout", None):
        tokenizer._tokenizer.model.dropout = None  # a noise for training; see tokenizer.hf_files
    if own is not None:
        _check_same(folder, tokenizer, own)
        _check_trained_with(folder, own)
    if not quiet:
        say_other_reading(folder)
    return tokenizer


def read_folder(folder: str) -> Tokenizer | None:
    """A folder as preprocessing reads it; None where it has files that only transformers reads. Without transformers.

    Raises:
        InputError: it is not there, or cannot be read
    """
    if not os.path.isdir(folder):
        raise InputError(f"tokenizer {folder}: no such folder{if_on_the_hub(folder)}")
    check_json(folder)
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        check_field_kinds(os.path.join(folder, CONFIG), *KINDS)
    elif not _may_be_tokenizer(folder):
        raise InputError(f"{folder} has no tokenizer; expected tokenizer.json, tokenizer.model or another vocabulary in it")
    files = (os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer.model"))
    return own_reading(folder) if any(map(os.path.isfile, files)) else None


def _may_be_tokenizer(folder: str) -> bool:
    """Whether a folder without tokenizer.json has a file that a tokenizer may be read from, or needs none."""
    config = Path(folder, CONFIG)
    needs_none = config.is_file() and str(json_object(config).get("tokenizer_class")).startswith(OF_BYTES)
    return needs_none or any(name.endswith(VOCABULARIES) and name not in NO_VOCABULARY for name in os.listdir(folder))


def say_other_reading(folder: str) -> None:
    """Print `other_reading`, once for all processes."""
    if os.environ.get("RANK", "0") == "0" and (note := other_reading(folder)):
        logger.info(f"note: {note}")


def other_reading(folder: str) -> str | None:
    """What to know about a folder that other programs, which go by its `tokenizer_class`, read otherwise; None: nothing."""
    config = Path(folder, CONFIG)
    if not (config.is_file() and Path(folder, "tokenizer.json").is_file()):
        return None
    name = json_object(config).get("tokenizer_class")
    if not isinstance(name, str) or name in AS_THE_FILE_SAYS:
        return None
    here = f"{config}: tokenizer_class is {name}, by which transformers"
    advice = "expected PreTrainedTokenizerFast, which reads tokenizer.json as it is, as all tools here do"
    try:
        other = _from_transformers(folder, by_file=False)
        difference = first_encoding_difference(own_reading(folder), _encoding_text(other))
    except InputError:
        return f"{here} cannot use this tokenizer; {advice}"
    if difference is None:
        return None
    text, ids, others = difference
    return f"{here} and programs that use it split {text[:40]!r} otherwise (ids {others}, not {ids}); {advice}"


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):  # of names and tokens
        return all(_is_token(token) and (isinstance(token, str) or "__type" in token) for token in value.values())
    return isinstance(value, list) and all(map(_is_token, value))


def _is_template(value: Any) -> bool:
    named = isinstance(value, list) and all(isinstance(it, dict) and {"name", "template"} <= it.keys() for it in value)
    return isinstance(value, str | dict) or named


TOKEN = (_is_token, "a text, or an object with its content")
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"), TOKEN),
    "added_tokens_decoder": (lambda value: isinstance(value, dict), "an object"),
    "additional_special_tokens": (_are_tokens, "a list of tokens"),
    "extra_special_tokens": (_are_tokens, "a list or an object of tokens"),
    "chat_template": (_is_template, "a text, or a list of objects with name and template"),
    "model_input_names": (lambda value: isinstance(value, list), "a list"),
    "split_special_tokens": (lambda value: isinstance(value, bool), "true or false"),
    "tokenizer_object": (lambda value: False, "no such field"),
}
"""What transformers takes for granted of the fields of tokenizer_config.json: otherwise it fails somewhere inside."""
NEVER_NULL = ("added_tokens_decoder", "model_input_names", "split_special_tokens")


def check_field_kinds(config: str, *names: str) -> None:
    """Raise InputError for fields of a tokenizer_config.json of another kind than transformers takes them for."""
    fields = json_object(Path(config)) if os.path.isfile(config) else {}
    refusals = Refusals()
    for name in names:
        value, (fits, expected) = fields.get(name), KINDS[name]
        if name in fields and not (fits(value) or (value is None and name not in NEVER_NULL)):
            refusals.add(InputError(f"{config}: {name} is {shown(value)}; expected {expected}"))
    refusals.raise_any()


def _from_transformers(folder: str, by_file: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if by_file:
        with reading_hf_folder(f"tokenizer {folder}", folder):
            read_tokenizer_json(Path(folder, "tokenizer.json"))
            return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers and tokenizers raise what they like, Exception itself among it
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"tokenizer {folder} cannot be read: {reason}") from error


def own_reading(folder: str) -> Tokenizer:
    """The folder as preprocessing reads it; which token ends documents does not matter here, and may not be known."""
    file, kind = tokenizer_file(folder)
    if kind == "hf":
        return load_tokenizer(folder, eos_token=_any_token(json_object(file).get("model")))
    return load_tokenizer(folder)


def _any_token(model: Any) -> str | None:
    """A piece of the vocabulary; None where there is none, and the library says what is wrong with it."""
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return next(iter(vocabulary), None)
    if isinstance(vocabulary, list) and vocabulary and isinstance(vocabulary[0], list) and vocabulary[0]:
        return str(vocabulary[0][0])
    return None


def _encoding_text(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> ids by transformers, the text of special tokens being text."""

    def encode(text: str) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        except MemoryError:
            raise
        except Exception as error:  # the library raises Exception itself, as for an unknown token that it does not have
            raise InputError(f"tokenizer {tokenizer.name_or_path} cannot encode {text[:40]!r}: {error}") from error

    return encode


def _check_same(folder: str, tokenizer: Any, own: Tokenizer) -> None:
    """InputError where transformers and preprocessing do not read the same tokenizer in a folder."""
    more = [token for token, number in tokenizer.get_vocab().items() if number >= own.vocab_size]
    if more:
        raise InputError(
            f"{folder}/{CONFIG}: names {more[0]!r}, which is no token of {own.name}; expected tokens of the vocabulary "
            f"(in added_tokens_decoder, or leave it out)"
        )
    difference = first_encoding_difference(own, _encoding_text(tokenizer))
    if difference is not None:
        text, ids, others = difference
        raise InputError(
            f"tokenizer {folder}: transformers splits {text[:40]!r} otherwise than {tokenizer_file(folder)[0].name} says "
            f"(ids {others}, not {ids}); expected a tokenizer.json that says what is meant"
        )


def _check_trained_with(folder: str, own: Tokenizer) -> None:
    """InputError where the folder's manifest says that its model was trained with a tokenizer that splits text otherwise."""
    path = os.path.join(folder, "manifest.json")
    if not os.path.isfile(path):
        return
    manifest = load_json(path)
    tokenizer = manifest.get("tokenizer") if isinstance(manifest, dict) else None
    known = tokenizer.get("behaviour_sha256") if isinstance(tokenizer, dict) else None  # none: not ours, or from before
    if known is not None and known != behaviour_sha256(own):
        raise InputError(
            f"{path}: tokenizer.behaviour_sha256 is {str(known)[:12]}, of the tokenizer the model was trained with; that of "
            f"the one in {folder} is {behaviour_sha256(own)[:12]}: it splits text otherwise; expected its files unchanged"
        )
