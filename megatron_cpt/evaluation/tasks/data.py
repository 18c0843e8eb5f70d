"""The data of this folder's tasks: files as they are published, in a folder of the user's, or else from where lm-eval's
own tasks have theirs, the Hugging Face hub. Each function returns the rows that are asked (test) and the examples (fewshot).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import lxml.etree
import orjson

from megatron_cpt.utils.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class Hub:
    """A dataset of the hub.

    Attributes:
        name: configuration of it, if it has some
        splits: ours -> the hub's
    """

    path: str
    name: str | None
    splits: Mapping[str, str]


@dataclass(frozen=True)
class PublishedSource:
    """Where a task has its rows from.

    Attributes:
        folder: in the user's folder of data
        files: split -> file of it
        fields: of a row, with their types
        hub: None: there is no copy that is known to be the same
    """

    folder: str
    files: Mapping[str, str]
    fields: Mapping[str, type]
    hub: Hub | None = None


TEXTS = {"context": str, "question": str, "answers": dict}
LCSTS = PublishedSource(
    "lcsts",
    {"test": "test.jsonl", "fewshot": "valid.jsonl"},
    {"text": str, "summary": str},
    Hub("hugcyp/LCSTS", None, {"test": "test", "fewshot": "validation"}),
)
CLUEWSC = PublishedSource(
    "cluewsc2020",
    {"test": "dev.json", "fewshot": "train.json"},  # the test set's answers are not public
    {"text": str, "target": dict, "label": str},
    Hub("clue/clue", "cluewsc2020", {"test": "validation", "fewshot": "train"}),
)
CMRC2018 = PublishedSource(
    "cmrc2018",
    {"test": "cmrc2018_dev.json", "fewshot": "cmrc2018_train.json"},  # the test set's answers are not public
    TEXTS,
    Hub("hfl/cmrc2018", None, {"test": "validation", "fewshot": "train"}),
)
DRCD = PublishedSource(
    "drcd",
    {"test": "DRCD_test.json", "fewshot": "DRCD_training.json"},
    TEXTS,
    Hub("clue/clue", "drcd", {"test": "test", "fewshot": "train"}),
)
EPRSTMT = PublishedSource(
    "eprstmt", {"test": "test_public.json", "fewshot": "train_few_all.json"}, {"sentence": str, "label": str}
)
BELLE = PublishedSource("belle", {"test": "eval_set.json"}, {"question": str, "class": str, "std_answer": str})
HUMANEVAL = PublishedSource(
    "humaneval",
    {"test": "HumanEval.jsonl.gz"},
    {"task_id": str, "prompt": str, "test": str, "entry_point": str},
    Hub("openai/openai_humaneval", None, {"test": "test"}),
)
# Function of this module -> its folder in the user's folder of data.
FOLDERS = {
    "lcsts": LCSTS.folder,
    "cluewsc": CLUEWSC.folder,
    "cmrc2018": CMRC2018.folder,
    "drcd": DRCD.folder,
    "eprstmt": EPRSTMT.folder,
    "belle": BELLE.folder,
    "humaneval": HUMANEVAL.folder,
    "wmt22": "wmt22",
}


def lcsts(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Short texts of microblogs, with their summaries."""
    return load_splits(LCSTS, data_folder, json_lines)


def cluewsc(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Sentences with a pronoun, and what it may stand for."""
    return load_splits(CLUEWSC, data_folder, json_lines)


def cmrc2018(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Passages of Wikipedia in simplified characters, with questions."""
    return load_splits(CMRC2018, data_folder, squad)


def drcd(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Passages of Wikipedia in traditional characters, with questions."""
    return load_splits(DRCD, data_folder, squad)


def eprstmt(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Reviews of goods."""
    return load_splits(EPRSTMT, data_folder, json_lines)


def belle(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Questions that have an answer to compare with; those of brainstorming, generation and rewriting have none."""
    found = load_splits(BELLE, data_folder, json_lines)
    return found.filter(lambda row: bool(row["std_answer"].strip()))


def humaneval(data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Heads of Python functions, with tests."""
    return load_splits(HUMANEVAL, data_folder, json_lines)


def wmt22(pair: str, data_folder: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Sentences of many kinds of text with a translation: those that sacrebleu scores, and the reference that it uses."""
    from sacrebleu.dataset import DATASETS
    from sacrebleu.dataset.wmt_xml import WMTXMLDataset

    path = file_of(data_folder, FOLDERS["wmt22"], f"wmttest2022.{pair}.all.xml")
    if path is None:
        sources = list(DATASETS["wmt22"].source(pair))
        targets = [references[0] for references in DATASETS["wmt22"].references(pair)]
    else:
        try:
            fields = WMTXMLDataset._unwrap_wmt21_or_later(path)
            sources, targets = fields["src"], fields["ref:A"]
        except (lxml.etree.XMLSyntaxError, AssertionError, KeyError) as error:
            raise InputError(f"{path} is not as WMT22 has it: {error}; expected: sources and translator A's") from error
    rows = [{"source": one_line(s), "target": one_line(t)} for s, t in zip(sources, targets, strict=True)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def one_line(text: str) -> str:
    """As sacrebleu cleans it."""
    return " ".join(text.split())


def load_splits(
    source: PublishedSource, data_folder: str | None, read: Callable[[str], Iterable[Row]]
) -> datasets.DatasetDict:
    """All splits of a source.

    Raises:
        InputError: there are no data, or they are not what they should be
    """
    found = {}
    for split, name in source.files.items():
        path = file_of(data_folder, source.folder, name)
        if path is not None:
            found[split] = checked(read(path), source.fields, path)
        elif source.hub is not None:
            found[split] = checked(hub_rows(source.hub, split), source.fields, source.hub.path)
        else:
            raise InputError(f"there is no {source.folder}/{name}; expected: data_folder, a folder that has it")
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in found.items()})


def file_of(data_folder: str | None, folder: str, name: str) -> str | None:
    """Path of a file; None if the user has no data of this task.

    Raises:
        InputError: the user has others of it, but not this file
    """
    if data_folder is None or not os.path.isdir(os.path.join(data_folder, folder)):
        return None
    path = os.path.join(data_folder, folder, name)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    return path


def json_lines(path: str) -> Iterable[Row]:
    """Rows of a file with an object on each line, whatever its name ends in; compressed, if in .gz."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}; expected an object on each line") from error


def squad(path: str) -> Iterable[Row]:
    """Questions of a file in SQuAD's format, as the hub has them."""
    with open(path, "rb") as file:
        try:
            passages = [passage for article in orjson.loads(file.read())["data"] for passage in article["paragraphs"]]
            for passage in passages:
                for asked in passage["qas"]:
                    answers = {"text": [answer["text"] for answer in asked["answers"]]}
                    yield {"context": passage["context"], "question": asked["question"], "answers": answers}
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not in SQuAD's format: {error!r}; expected data, paragraphs, qas, answers"
            ) from error


def hub_rows(hub: Hub, split: str) -> Iterable[Row]:
    """Rows of the hub, with the names of labels for their numbers, as the published files have them."""
    rows = datasets.load_dataset(hub.path, hub.name, split=hub.splits[split])
    labels = {name: feature for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)}
    for row in rows:
        yield row | {name: feature.int2str(row[name]) for name, feature in labels.items()}


def checked(rows: Iterable[Row], fields: Mapping[str, type], origin: str) -> list[Row]:
    """The fields that a task uses, of all rows.

    Raises:
        InputError: a row lacks one, or there are no rows
    """
    found = []
    for number, row in enumerate(rows, 1):
        for name, kind in fields.items():
            value = row.get(name) if isinstance(row, dict) else row
            if not isinstance(value, kind):
                raise InputError(f"{origin}, row {number}: {name} is {value!r}; expected a {kind.__name__}")
        found.append({name: row[name] for name in fields})
    if not found:
        raise InputError(f"{origin} has no rows; expected some")
    return found
