"""`PREFIX.json`, the manifest beside a corpus: what went in and came out, the tokenizer, counts and checksums."""

from __future__ import annotations

import platform
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import orjson

from megatron_cpt.corpus.sources import parse_partition, printable
from megatron_cpt.tokenizer.base import Tokenizer, token_bytes_sha256
from megatron_cpt.tokenizer.behaviour import behaviour_sha256, lost_letters
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import atomic_file
from megatron_cpt.version import __version__

FORMAT_VERSION = 2

Record = TypeVar("Record")


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the corpus; corpora go together in one run when their `fingerprint`s are equal."""

    path: str
    name: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    fingerprint: str
    token_bytes_sha256: str
    """Tells vocabularies apart whatever the file format (`tokenizer.base.token_bytes_sha256`)."""
    eos_token: str | None = None
    """The token of `eos_id`. This field and the following ones are not in manifests of before."""
    eos_reason: str | None = None
    """Why it is this one."""
    behaviour_sha256: str | None = None
    """Of the ids of a set of texts (`tokenizer.behaviour`): tells apart what splits text in another way."""
    notes: list[str] = field(default_factory=list)
    """In what the tokenizer was read otherwise than its files say, and which scripts it cannot spell."""

    @classmethod
    def of(cls, path: str, tokenizer: Tokenizer) -> TokenizerInfo:
        """What `tokenizer`, which was loaded from `path`, says of itself."""
        lost = lost_letters(tokenizer)
        lost_note = f"tokenizer {path} cannot spell every script: {', '.join(lost)} do not come back from its tokens"
        return cls(
            path=printable(str(Path(path).expanduser().absolute())),
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            fingerprint=tokenizer.fingerprint,
            token_bytes_sha256=token_bytes_sha256(tokenizer),
            eos_token=tokenizer.eos_token,
            eos_reason=tokenizer.eos_reason,
            behaviour_sha256=behaviour_sha256(tokenizer),
            notes=[*map(printable, tokenizer.notes), *([printable(lost_note)] if lost else [])],
        )


@dataclass(frozen=True)
class SourceInfo:
    """One input file: its size, its checksum, and how many documents of it are in the corpus."""

    path: str
    format: str
    bytes: int
    sha256: str | None
    """None when it was not computed: the file is not on this machine, or its checksum was not wanted."""
    documents: int
    records: int | None = None
    """Lines or rows that were read, blank and skipped ones too. None: in manifests of before."""


@dataclass(frozen=True)
class FileInfo:
    """One output file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CorpusManifest:
    """Everything `PREFIX.json` says. `text_bytes` is UTF-8 text, eos and bos tokens are in `tokens` but not in it."""

    language: str
    documents: int
    tokens: int
    text_bytes: int
    characters: int
    bytes_per_token: float
    """Of the text, without the tokens that end and begin documents."""
    skipped: dict[str, int]
    """Documents that are not in the corpus, by reason; each is a line of PREFIX.errors.jsonl."""
    languages: dict[str, float]
    """Share of the text by language, told by CLD2 from a sample ("un": unknown)."""
    dtype: str
    eos: str
    """"document" when every document ends with eos, "none" when none does."""
    bos: str
    shuffle_documents: int | None
    """The seed documents were shuffled with; None: they are in the order of the input."""
    partition: str | None
    """"i/n": only that part of the input is in this corpus."""
    encoder: str
    """What encoded, and how it was checked."""
    tokenizer: TokenizerInfo
    sources: list[SourceInfo]
    files: dict[str, FileInfo]
    """Keys "bin" and "idx"."""
    versions: dict[str, str]
    command: str
    duration_seconds: float
    holdout: str | None = None
    """"train:SPLIT" or "holdout:SPLIT": the corpus is one side of a split (several after a merge: SPLIT,SPLIT). "asked:200":
    a partition of an input of which so much will be held out when its partitions are merged. None: all of the input."""
    origins: dict[str, list[str]] = field(default_factory=dict)
    """{a curation: raw files}: what the sources that were curated were made from, so far as their folder tells."""
    in_order: bool | None = None
    """Whether documents lie in the order of `sources`, but for `shuffle_documents`. None: in manifests of before."""
    format_version: int = FORMAT_VERSION


def size_of(manifest: CorpusManifest) -> str:
    """How large a corpus is, as in `80 documents, 4,012 tokens`."""
    return f"{counted(manifest.documents, 'document')}, {counted(manifest.tokens, 'token')}"


def installed_versions(libraries: Sequence[str]) -> dict[str, str]:
    """The versions of this package, Python and those of `libraries` that are installed."""
    found = {"megatron_cpt": __version__, "python": platform.python_version()}
    for library in libraries:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def manifest_path(prefix: str) -> Path:
    """Where the manifest of the corpus `prefix` lies."""
    return Path(prefix + ".json")


def write_manifest(path: Path, manifest: CorpusManifest) -> None:
    """Write a manifest to `path` atomically."""
    ordered = {"format_version": manifest.format_version, **asdict(manifest)}
    with atomic_file(path) as stream:
        stream.write(orjson.dumps(ordered, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_corpus_manifest(prefix: str) -> CorpusManifest:
    """The manifest of the corpus `prefix`. InputError: missing, not JSON, another version, a field missing or wrong."""
    path = manifest_path(prefix)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the manifest that preprocessing writes beside {prefix}.bin")
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected a corpus manifest") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION} (preprocess the corpus again)")
    manifest = _build(CorpusManifest, content, f"{path}: ")
    for name in ("bin", "idx"):
        if name not in manifest.files:
            raise InputError(f"{path}: files.{name} is missing")
    parse_partition(manifest.partition, f"{path}: ")
    _check_numbers(path, manifest)
    return manifest


def _check_numbers(path: Path, manifest: CorpusManifest) -> None:
    """Raise InputError for a seed or a number of documents that no corpus can have."""
    numbers = {"shuffle_documents": (manifest.shuffle_documents, 64)}
    for i, source in enumerate(manifest.sources):
        numbers[f"sources[{i}].documents"] = source.documents, 56
        numbers[f"sources[{i}].records"] = source.records, 56
    for name, (value, bits) in numbers.items():
        if value is not None and not 0 <= value < 1 << bits:
            raise InputError(f"{path}: {name} is {value}; expected a whole number from 0 to 2^{bits} - 1")


def _build(record: type[Record], values: Any, where: str) -> Record:
    """A dataclass from JSON values; `where` is "FILE: field." for messages. Fields we do not know are ignored."""
    if not isinstance(values, dict):
        raise InputError(f"{where.rstrip('. ')} is {type(values).__name__}; expected an object")
    hints = typing.get_type_hints(record)
    found = {}
    for one in fields(record):  # type: ignore[arg-type]
        if one.name not in values and (one.default is not MISSING or one.default_factory is not MISSING):
            continue  # manifests of before do not have it
        if one.name not in values:
            raise InputError(f"{where}{one.name} is missing")
        found[one.name] = _value(hints[one.name], values[one.name], where + one.name)
    return record(**found)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against a field's type: a dataclass, list[...], dict[str, ...] or plain types."""
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where + ".")
    wanted = typing.get_origin(hint) if typing.get_origin(hint) in (list, dict) else hint
    if wanted is float and isinstance(value, int):
        value = float(value)
    is_switch = bool in (hint, *typing.get_args(hint))
    if not isinstance(value, wanted) or (isinstance(value, bool) and not is_switch):
        raise InputError(f"{where} is {value!r}; expected {getattr(wanted, '__name__', wanted)}")
    if wanted is list:
        return [_value(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if wanted is dict:
        return {key: _value(typing.get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    return value
