"""What damaged files raise, told from all else that can go wrong while a library reads them.

An error of memory, of a device or of code keeps its traceback: whoever is told that a file is damaged would throw it away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError

from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import check_folder, load_json, shown

KINDS = (ValueError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, SafetensorError)
OF_THE_MACHINE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# torch has one class for a file that it cannot read and for a device that fails. These are of files.
WORDS = ("PytorchStreamReader", "mmap can only be used", "state_dict", "size mismatch", "mismatched_sizes", "magic number")
LIBRARIES = ("huggingface_hub.",)  # its checks of config.json have classes of their own
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
)


def is_damage(error: BaseException) -> bool:
    """Whether an error is one that reading a damaged file leads to."""
    if isinstance(error, OSError):
        return error.errno not in OF_THE_MACHINE
    if isinstance(error, KINDS) or type(error).__module__.startswith(LIBRARIES):
        return True
    if type(error) is Exception:  # so the tokenizers library calls what it cannot parse
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in WORDS)


@contextlib.contextmanager
def reading_hf_folder(what: str, folder: str) -> Iterator[None]:
    """What another library raises for damaged files of a HF folder becomes one line: "WHAT cannot be read: ...".

    Raises:
        InputError: a file is damaged
    """
    try:
        check_json(folder)
    except InputError as error:
        raise InputError(f"{what} cannot be read: {error}") from error
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_damage(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{what} cannot be read: {reason}") from error


@contextlib.contextmanager
def reading_hf_model(what: str, folder: str) -> Iterator[None]:
    """`reading_hf_folder`, after transformers has read config.json: what fails there is of that file, whatever it is.

    Raises:
        InputError: a file is damaged
    """
    from transformers import AutoConfig

    with reading_hf_folder(what, folder):
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
            raise InputError(f"{what} cannot be read: config.json leads to {type(error).__name__}: {error}") from error
        yield


def check_json(folder: str) -> None:
    """Raise InputError unless the JSON files of a folder hold objects: libraries go on with all else, and fail."""
    if os.path.isdir(folder):
        check_folder(folder)
    for name in JSON_FILES:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            json_fields(path)


def json_fields(path: str) -> dict[str, Any]:
    """What a JSON file of a HF folder holds. InputError: it is no JSON object."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is {shown(content)}; expected a JSON object")
    return content
