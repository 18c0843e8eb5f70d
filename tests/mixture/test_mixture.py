"""The mixture file: what a good one means, and every way a bad one is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus, IndexedWriter
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.mixture.config import Entry
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.order.splitters import Group
from megatron_cpt.utils.errors import InputError, InputErrors
from megatron_cpt.utils.input_files import parse_yaml, shown

SENTENCES = {
    "en": "The quick brown fox number {} jumps over the lazy dog and runs away into the woods.",
    "code": "def function_{}(x): return x + 1",
    "zh": "第{}天，今天天气很好，我们去公园散步。",
    "zh_valid": "第{}句，持续预训练让语言模型学习一门新的语言。",
}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Path:
    """A folder with the corpora en, code, zh and zh_valid, and `short`, which has fewer tokens than a sample."""
    folder = tmp_path_factory.mktemp("corpora")
    documents = {name: [sentence.format(i) for i in range(40)] for name, sentence in SENTENCES.items()}
    for name, texts in (documents | {"short": ["one"]}).items():
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        language = "zh" if "zh" in name else "en"
        preprocess(PreprocessConfig(str(source), tiny_tokenizer_dir, str(folder / name), language, workers=1))
    return folder


@pytest.fixture
def folder(tmp_path: Path, corpora: Path) -> Path:
    """A copy of the corpora that a test may break."""
    for file in corpora.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


GOOD: dict[str, Any] = {
    "seq_length": 32,
    "seed": 1234,
    "almr": 0.1,
    "general": [{"prefix": "en"}, {"prefix": "code"}],
    "additional": [{"prefix": "zh"}],
    "validation": [{"prefix": "zh_valid"}],
}
MISSING = object()


def write(folder: Path, **changes: Any) -> str:
    fields = {name: value for name, value in (GOOD | changes).items() if value is not MISSING}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(fields))
    return str(folder / "mixture.yaml")


def load(folder: Path, **changes: Any) -> Mixture:
    return load_mixture(write(folder, **changes))


def as_read(value: Any) -> str:
    """A value as messages show it once it was written to a file."""
    return shown(parse_yaml(yaml.safe_dump(value), ""))


def refusal(folder: Path, **changes: Any) -> str:
    """The message that a mixture with these changes gets."""
    path = write(folder, **changes)
    with pytest.raises(InputError) as caught:
        load_mixture(path)
    assert str(folder) in str(caught.value)  # every message names a file
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_mixture(folder: Path) -> None:
    mixture = load(folder)
    assert (mixture.seq_length, mixture.seed) == (32, 1234)
    (stage,) = mixture.stages
    assert [(part.begin_tokens, part.first, part.last) for part in stage.almr_parts] == [
        (0, Fraction(1, 10), Fraction(1, 10))
    ]
    assert [corpus.group for corpus in mixture.corpora] == ["general", "general", "additional"]
    assert [corpus.name for corpus in mixture.corpora] == ["en", "code", "zh"]
    assert [corpus.language for corpus in mixture.corpora + mixture.validation] == ["en", "en", "zh", "zh"]
    assert [corpus.name for corpus in mixture.validation] == ["zh_valid"]
    assert mixture.manifest.tokenizer.vocab_size == 400
    assert mixture.schedule(1000).counts(1000)[2] == 100
    tokens = IndexedCorpus(str(folder / "en")).num_tokens
    assert mixture.corpora[0].num_samples(32) == (tokens - 1) // 32
    assert mixture.corpora[0].num_samples(tokens - 1) == 1
    assert mixture.corpora[0].num_samples(tokens) == 0


def test_weights_default_to_tokens(folder: Path) -> None:
    mixture = load(folder)
    english, code, _ = (corpus.data.num_tokens for corpus in mixture.corpora)
    assert mixture.group(mixture.stages[0].general) == Group((0, 1), (Fraction(english), Fraction(code)))
    assert abs(mixture.schedule(1000).counts(1000)[0] - 900 * Fraction(english, english + code)) <= 1


def test_weights_and_names_that_are_given(folder: Path) -> None:
    general = [{"prefix": "en", "weight": 0.3, "name": "english"}, {"prefix": "code", "weight": 0.1}]
    mixture = load(folder, general=general, almr=0.5)
    assert mixture.group(mixture.stages[0].general) == Group((0, 1), (Fraction(3, 10), Fraction(1, 10)))
    assert [corpus.name for corpus in mixture.corpora] == ["english", "code", "zh"]
    assert mixture.schedule(800).counts(800) == [300, 100, 400]


def test_prefixes_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    fields = GOOD | {"general": [{"prefix": "../en"}, {"prefix": str(folder / "code")}]}
    fields |= {"additional": [{"prefix": "../zh"}], "validation": []}
    (folder / "sub" / "m.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(folder / "sub")
    for path in ("m.yaml", "./m.yaml", str(folder / "sub" / "m.yaml")):
        assert [os.path.realpath(corpus.prefix) for corpus in load_mixture(path).corpora] == [
            os.path.realpath(folder / name) for name in ("en", "code", "zh")
        ]


def test_one_group_is_enough_when_it_has_all_the_share(folder: Path) -> None:
    assert [c.name for c in load(folder, almr=0, additional=MISSING).corpora] == ["en", "code"]
    assert [c.name for c in load(folder, almr=1.0, general=[]).corpora] == ["zh"]
    assert load(folder, almr=0).schedule(100).counts(100)[2] == 0  # listed, but not used
    assert load(folder, validation=MISSING).validation == ()


@pytest.mark.parametrize("almr", [-0.1, 1.5, float("nan"), float("inf"), True, "a third", None, [0.3], MISSING])
def test_almr(folder: Path, almr: Any) -> None:
    found = "missing" if almr in (MISSING, None) else as_read(almr)
    assert f"mixture.yaml: almr is {found}; expected a number from 0 to 1" in refusal(folder, almr=almr)


@pytest.mark.parametrize(
    ("field", "value", "minimum"),
    [
        ("seq_length", 0, 1),
        ("seq_length", -32, 1),
        ("seq_length", 32.5, 1),
        ("seq_length", "032", 1),
        ("seq_length", True, 1),
        ("seq_length", MISSING, 1),
        ("seed", -1, 0),
        ("seed", 0.5, 0),
        ("seed", MISSING, 0),
    ],
)
def test_whole_numbers(folder: Path, field: str, value: Any, minimum: int) -> None:
    found = "missing" if value is MISSING else as_read(value)
    wanted = f"mixture.yaml: {field} is {found}; expected a whole number, {minimum} or more"
    assert wanted in refusal(folder, **{field: value})


def test_unknown_fields(folder: Path) -> None:
    assert "mixture.yaml: sequence_length is unknown; expected seq_length" in refusal(folder, sequence_length=32)
    path = write(folder, zzz=1)
    with open(path, "a") as file:
        file.write("on: 2\n7: 2\n")  # two keys that do not compare
    with pytest.raises(InputError, match="7 is unknown"):
        load_mixture(path)
    entry = {"prefix": "en", "wieght": 2}
    assert "general[1].wieght is unknown; expected weight" in refusal(folder, general=[{"prefix": "code"}, entry])


@pytest.mark.parametrize("entry", [{"name": "en"}, {"prefix": [3]}, {"prefix": None}, "en", None])
@pytest.mark.parametrize("group", ["general", "additional", "validation"])
def test_an_entry_without_prefix(folder: Path, group: str, entry: Any) -> None:
    message = refusal(folder, **{group: [entry]})
    if isinstance(entry, str):
        assert f"mixture.yaml: {group}[0] is 'en'; expected a section with prefix, name" in message
    else:
        found = as_read(entry["prefix"]) if entry and "prefix" in entry else "missing"
        assert f"mixture.yaml: {group}[0].prefix is {found}; expected the path of a corpus" in message


@pytest.mark.parametrize("entries", ["en", {"prefix": "en"}, 3])
def test_a_group_that_is_not_a_list(folder: Path, entries: Any) -> None:
    assert f"mixture.yaml: general is {as_read(entries)}; expected a list" in refusal(folder, general=entries)


@pytest.mark.parametrize(
    ("almr", "group", "share"), [(0.25, "additional", "0.25"), (1, "additional", "1"), (0.25, "general", "0.75")]
)
def test_a_share_without_corpus(folder: Path, almr: float, group: str, share: str) -> None:
    wanted = f"mixture.yaml: almr gives the {group} group a share of {share} but it lists no corpus"
    assert wanted in refusal(folder, almr=almr, **{group: []})


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), True, "two"])
def test_weights(folder: Path, weight: Any) -> None:
    general = [{"prefix": "en", "weight": 1}, {"prefix": "code", "weight": weight}]
    assert f"mixture.yaml: general[1].weight is {as_read(weight)}; expected a number above 0" in refusal(
        folder, general=general
    )


def test_a_weight_with_more_digits_than_are_read(folder: Path) -> None:
    said = "expected a number above 0 or null (a number has at most 40 digits, and 2 of exponent)"
    for weight in ("1e300", "1e-100", "9" * 41):
        assert f"general[0].weight is {weight!r}; {said}" in refusal(folder, general=[{"prefix": "en", "weight": weight}])


def weights_of(mixture: Mixture, entries: list[Entry] | None) -> tuple[Fraction, ...]:
    group = mixture.group(entries)
    assert group is not None
    return group.weights


def test_weights_partly_given(folder: Path) -> None:
    general = [{"prefix": "en", "weight": 1}, {"prefix": "code"}]
    assert "mixture.yaml: general[1] has no weight but others in the group do" in refusal(folder, general=general)
    mixture = load(folder, general=[{**entry, "weight": 1} for entry in general])  # each group decides for itself
    (stage,) = mixture.stages
    assert weights_of(mixture, stage.general) == (1, 1)
    assert weights_of(mixture, stage.additional) == (mixture.corpora[2].data.num_tokens,)


def test_names_are_unique(folder: Path) -> None:
    """Run manifests and metrics know corpora by their names: general and additional ones together."""
    twice = [{"prefix": "en"}, {"prefix": "code", "name": "en"}]
    assert "mixture.yaml: two training corpora are named 'en'; set different names" in refusal(folder, general=twice)
    across = [{"prefix": "zh", "name": "code"}]
    assert "two training corpora are named 'code'" in refusal(folder, additional=across)
    validation = [{"prefix": "zh_valid", "name": "v"}, {"prefix": "short", "name": "v"}]
    assert "two validation sets are named 'v'" in refusal(folder, validation=validation, seq_length=1)
    assert load(folder, validation=[{"prefix": "zh_valid", "name": "zh"}]).validation[0].name == "zh"


def test_another_tokenizer(folder: Path) -> None:
    manifest = json.loads((folder / "zh.json").read_text())
    manifest["tokenizer"] |= {"fingerprint": "0" * 64, "name": "hf:other", "path": "/other", "vocab_size": 500}
    (folder / "zh.json").write_text(json.dumps(manifest))
    message = refusal(folder)
    assert f"{folder}/zh.json was made with tokenizer hf:other (/other, 500 tokens) but {folder}/en.json with" in message
    assert "400 tokens)" in message


@pytest.mark.parametrize("group", ["general", "additional", "validation"])
def test_a_corpus_shorter_than_a_sample(folder: Path, group: str) -> None:
    tokens = IndexedCorpus(str(folder / "short")).num_tokens
    message = refusal(folder, **{group: [{"prefix": "short"}]})
    assert f"seq_length is 32 but {folder}/short.bin has only {tokens} tokens; expected 33 or more" in message
    assert load(folder, seq_length=tokens - 1, **{group: [{"prefix": "short"}]}) is not None


@pytest.mark.parametrize("prefix", ["zh", "./zh", "sub/../zh", "link"])
def test_a_corpus_in_training_and_validation(folder: Path, prefix: str) -> None:
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder / "zh")
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"link{suffix}").symlink_to(folder / f"zh{suffix}")
    message = refusal(folder, validation=[{"prefix": prefix, "name": "valid"}])
    assert "is both a training corpus and a validation set" in message
    assert prefix in message


def test_a_truncated_bin(folder: Path) -> None:
    path = folder / "zh.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    assert f"{path}: found {size - 2} bytes; expected {size}" in refusal(folder)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_missing_file(folder: Path, suffix: str) -> None:
    (folder / f"zh{suffix}").unlink()
    assert f"{folder}/zh{suffix}: no such file" in refusal(folder)


def test_a_manifest_of_another_corpus(folder: Path) -> None:
    shutil.copy(folder / "en.json", folder / "zh.json")
    counts = {name: IndexedCorpus(str(folder / name)).num_tokens for name in ("en", "zh")}
    assert f"{folder}/zh.bin has {counts['zh']} tokens but {folder}/zh.json says {counts['en']}" in refusal(folder)


@pytest.mark.parametrize("content", [b"almr: [0.1", b"a: b: c", b"\tseq_length: 3"])
def test_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_mixture(str(path))
    assert str(caught.value).startswith(f"mixture file {path} is not YAML: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "found"), [("", "empty"), ("[1]", "[1]"), ("text", "'text'")])
def test_yaml_without_fields(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_mixture(str(path))
    assert f"mixture file {path} is {found}; expected fields (" in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mixture file .*nothing\.yaml: No such file"):
        load_mixture(str(tmp_path / "nothing.yaml"))
    with pytest.raises(InputError, match=r"mixture file .*: Is a directory"):
        load_mixture(str(tmp_path))


@pytest.mark.parametrize(("written", "almr"), [("0.1", Fraction(1, 10)), ("1e-1", Fraction(1, 10)), ("1", Fraction(1))])
def test_numbers_mean_what_is_written(folder: Path, written: str, almr: Fraction) -> None:
    # PyYAML reads 1e-1 as text and 0.1 as a binary fraction; both mean one tenth here.
    path = Path(write(folder))
    path.write_text(re.sub(r"almr: .*", f"almr: {written}", path.read_text()))
    (stage,) = load_mixture(str(path)).stages
    assert stage.almr == almr


@pytest.mark.parametrize(
    ("field", "written", "found"),
    [
        ("language", "no", "no"),
        ("name", "010", "010"),
        ("name", "1:04", "1:04"),
        ("name", "1e3", "1e3"),
        ("name", "1.50", "1.50"),
        ("name", "1_000", "1_000"),
        ("name", "2024-01-01", "2024-01-01"),
        ("name", "2024", "2024"),
        ("name", "true", "true"),
        ("name", "0x1F", "0x1F"),
        ("name", "~", "zh_valid"),
        ("language", "null", "zh"),
    ],
)
def test_text_is_what_is_written(folder: Path, field: str, written: str, found: str) -> None:
    """YAML 1.1 makes false, 8, 64, 1000.0, a date and the text None of some of these."""
    path = Path(write(folder, validation=[{"prefix": "zh_valid", field: "WRITTEN"}]))
    path.write_text(path.read_text().replace("WRITTEN", written))
    assert getattr(load_mixture(str(path)).validation[0], field) == found


@pytest.mark.parametrize(
    ("field", "written"),
    [
        ("seed", "0777"),
        ("seed", "1:04"),
        ("seed", "1" * 40),
        ("seed", "0x1F"),
        ("seq_length", "1e60"),
        ("almr", "1e999999999"),
        ("almr", "1e-999999999"),
        ("almr", "0." + "1" * 100_000),
        ("almr", "1:04"),
        ("almr", "00.25"),
        ("general[0].weight", "1e999999999"),
        ("general[0].weight", "010"),
        ("general[0].max_epochs", "1e999999999"),
        ("general[0].max_epochs", "9" * 5000),
        ("stages[0].tokens", "0640"),
        ("stages[0].tokens", "1e999999999"),
        ("stages[0].tokens", "1:04"),
        ("stages[0].fraction", "1e999999999"),
    ],
)
def test_numbers_that_are_none_or_too_large(folder: Path, field: str, written: str) -> None:
    """The first ones are read as other numbers by YAML 1.1; those that are large took hours."""
    name = field.rsplit(".", 1)[-1]
    changes: dict[str, Any] = {field: "WRITTEN"}
    if field.startswith("general"):
        changes = {"general": [{"prefix": "en", "weight": 1} | {name: "WRITTEN"}]}
    elif field.startswith("stages"):
        changes = {"stages": [{name: "WRITTEN"}, {}]}
    path = Path(write(folder, **changes))
    path.write_text(path.read_text().replace("WRITTEN", written))
    with pytest.raises(InputError) as caught:
        load_mixture(str(path))
    assert f"mixture.yaml: {field} is '{written[:90]}" in str(caught.value)
    assert len(str(caught.value)) < 600


# --- stages, sub-groups, limits ---

STAGES = [
    {"name": "warm", "tokens": 32 * 100, "almr": 0.2},
    {"tokens": 32 * 200, "almr": 0.33},
    {"almr": 0.5, "general": [{"prefix": "code"}]},
]


def test_stages(folder: Path) -> None:
    mixture = load(folder, almr=MISSING, stages=STAGES)
    assert [stage.name for stage in mixture.stages] == ["warm", "2", "3"]
    schedule = mixture.schedule(1000)
    assert schedule.starts == (0, 100, 300)
    assert [schedule.counts(n)[2] for n in (100, 300, 1000)] == [20, 86, 436]
    assert schedule.asked(1000) == 436
    assert schedule.counts(1000)[0] == schedule.counts(300)[0]  # en is not in the last stage


@pytest.mark.parametrize(
    ("written", "tokens"),
    [("2B", 2 * 10**9), ("1.7T", 17 * 10**11), ("500_000", 500_000), (64, 64), ("3k", 3000), ("2e3", 2000)],
)
def test_budgets(folder: Path, written: Any, tokens: int) -> None:
    mixture = load(folder, stages=[{"tokens": written}, {}])
    assert mixture.stages[0].tokens == tokens
    assert mixture.stages[1].tokens is None


@pytest.mark.parametrize("tokens", [0, -1, "2X", "B", "1.5", True, "0.3", [1]])
def test_bad_budgets(folder: Path, tokens: Any) -> None:
    assert f"stages[0].tokens is {as_read(tokens)}; expected a whole number of tokens" in refusal(
        folder, stages=[{"tokens": tokens}, {}]
    )


def test_fractions_of_the_run(folder: Path) -> None:
    mixture = load(folder, stages=[{"fraction": 0.3, "almr": 0}, {"fraction": 0.7, "almr": 1}])
    assert mixture.schedule(1000).starts == (0, 300)
    assert mixture.schedule(10).counts(10)[2] == 7
    for fraction in (0, 1.5, "half", True):
        message = refusal(folder, stages=[{"fraction": fraction}, {}])
        assert f"stages[0].fraction is {as_read(fraction)}; expected a part of the run" in message
    assert "stages[0].tokens and fraction are both given" in refusal(folder, stages=[{"fraction": 0.5, "tokens": 50}, {}])
    assert "stages[0].tokens is missing; only the last" in refusal(folder, stages=[{}, {}])


def test_a_run_longer_than_its_stages(folder: Path) -> None:
    mixture = load(folder, stages=[{"tokens": 3200}, {"tokens": 6400, "almr": 0.5}])
    assert mixture.schedule(300).counts(300)[2] == 110
    with pytest.raises(InputError, match=r"the stages have 300 samples \(9,600 tokens\) but the run takes 301"):
        mixture.schedule(301)
    for fractions in ([0.4, 0.5], [0.75, 0.75], [1, None]):
        message = refusal(folder, stages=[{} if fraction is None else {"fraction": fraction} for fraction in fractions])
        assert "the fractions of the stages sum to" in message
    assert load(folder, stages=[{"tokens": 3200}, {}]).schedule(50).counts(50)[2] == 5  # a run that ends in the first


def test_the_length_of_the_run_changes_nothing(folder: Path) -> None:
    """Unless stages are given as fractions of it."""
    mixture = load(folder, almr=MISSING, stages=STAGES)
    short, long = (mixture.sample_order(mixture.schedule(n), 8) for n in (400, 40_000))
    assert [short.lookup(n) for n in range(400)] == [long.lookup(n) for n in range(400)]


def test_schedules_of_almr(folder: Path) -> None:
    mixture = load(folder, almr={"from": 0.2, "to": 0.6})
    schedule = mixture.schedule(1000)  # over the whole run
    assert (schedule.counts(500)[2], schedule.counts(1000)[2]) == (150, 400)
    steps = {"steps": [[0, 0.1], ["3.2k", 0.5], [9600, 0.2]]}
    schedule = load(folder, almr=steps).schedule(1000)
    assert [schedule.counts(n)[2] for n in (100, 300, 1000)] == [10, 110, 250]
    message = refusal(folder, stages=[{"tokens": 6400, "almr": steps}, {"almr": 0}])
    assert "stage 1: almr.steps has a step at 9600 tokens; the stage ends at 6400" in message
    schedule = load(folder, stages=[{"tokens": 12800, "almr": steps}, {"almr": 0}]).schedule(1000)
    assert [schedule.counts(n)[2] for n in (100, 300, 400, 1000)] == [10, 110, 130, 130]


@pytest.mark.parametrize(
    ("almr", "message"),
    [
        ({"from": 0.1}, "almr.to is missing; expected a number from 0 to 1"),
        ({"form": 0.1, "from": 0, "to": 1}, "almr.form is unknown; expected from"),
        ({"from": 0.1, "to": 2}, "almr.to is 2; expected a number from 0 to 1"),
        ({"steps": []}, "almr.steps is []; expected [[0, almr]"),
        ({"steps": [[5, 0.1]]}, "almr.steps is [[5, 0.1]]; expected [[0, almr]"),
        ({"steps": [[0, 0.1], [9, 0.2], [9, 0.3]]}, "with rising tokens"),
        ({"steps": [[0, 0.1], [9, "x"]]}, "almr.steps[1][1] is 'x'; expected a number"),
    ],
)
def test_bad_schedules_of_almr(folder: Path, almr: Any, message: str) -> None:
    assert message in refusal(folder, almr=almr)
    assert "stages[0].almr" in refusal(folder, stages=[{"tokens": 64, "almr": almr}, {}])


def test_sub_groups(folder: Path) -> None:
    code = {"group": "code", "weight": 3, "corpora": [{"prefix": "code", "max_epochs": 2}]}
    mixture = load(folder, general=[{"prefix": "en", "weight": 1}, code], almr=0)
    assert [corpus.sub_group for corpus in mixture.corpora] == [None, "code", None]
    assert mixture.corpora[1].max_epochs == 2
    assert mixture.schedule(400).counts(400) == [100, 300, 0]
    both = {"group": "all", "corpora": [{"prefix": "en"}, {"prefix": "code"}]}
    assert load(folder, general=[both]).stages[0].general is not None
    assert "general[0].corpora is []; expected a list of" in refusal(folder, general=[{"group": "a", "corpora": []}])
    assert "general[0].group is missing; expected a name" in refusal(folder, general=[{"corpora": [{"prefix": "en"}]}])
    inside = {"group": "a", "corpora": [{"prefix": "en", "corpora": []}]}
    assert "general[0].corpora[0].corpora is unknown" in refusal(folder, general=[inside])
    assert "two training corpora are named 'en'" in refusal(folder, general=[both, {"prefix": "en"}])
    again = {"group": "all", "corpora": [{"prefix": "zh_valid"}]}
    assert "two sub-groups are named 'all'" in refusal(folder, general=[both, again], validation=[])


def test_a_corpus_is_one_in_all_stages(folder: Path) -> None:
    def stages(**second: Any) -> list[Any]:
        return [{"tokens": 320, "general": [{"prefix": "en"}]}, {"general": [{"prefix": "en"} | second]}]

    assert [corpus.name for corpus in load(folder, stages=stages()).corpora] == ["en", "zh"]
    assert "two training corpora are named 'en'" in refusal(folder, stages=stages(prefix="code", name="en"))
    assert "en has another max_epochs elsewhere" in refusal(folder, stages=stages(max_epochs=3))
    mixed = [{"tokens": 320}, {"additional": [{"prefix": "en"}]}]
    assert "en is in both groups" in refusal(folder, stages=mixed)
    for epochs in (0, -1, "many"):
        message = refusal(folder, general=[{"prefix": "en", "max_epochs": epochs}])
        assert f"general[0].max_epochs is {as_read(epochs)}; expected a number above 0" in message


@pytest.mark.parametrize("stages", [[], "en", {"tokens": 3}, [3], [{"budget": 3}]])
def test_stages_that_are_none(folder: Path, stages: Any) -> None:
    assert "mixture.yaml: stages" in refusal(folder, stages=stages)


def test_languages_of_validation_sets_can_be_said(folder: Path) -> None:
    mixture = load(folder, validation=[{"prefix": "zh_valid", "name": "news", "language": "zh-Hans"}])
    assert [(corpus.name, corpus.language) for corpus in mixture.validation] == [("news", "zh-Hans")]


def change_manifest(folder: Path, name: str, **changes: Any) -> None:
    manifest = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps(manifest | changes))


def test_training_and_validation_made_from_one_file(folder: Path) -> None:
    sources = json.loads((folder / "zh.json").read_text())["sources"]
    change_manifest(folder, "zh_valid", sources=sources)
    message = refusal(folder)
    assert "validation set zh_valid and training corpus zh have documents in common: both were made from" in message
    change_manifest(folder, "zh_valid", partition="0/10")
    change_manifest(folder, "zh", partition="1/10")
    assert load(folder)
    change_manifest(folder, "zh", partition="1/5")
    assert "documents in common" in refusal(folder)


def test_a_copy_of_a_training_corpus_as_validation_set(folder: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"zh{suffix}", folder / f"copy{suffix}")
    assert "copy.bin and " in refusal(folder, validation=[{"prefix": "copy"}])


def test_the_fingerprint_tells_mixtures_apart(folder: Path) -> None:
    same = load(folder).fingerprint()
    assert load(folder).fingerprint() == same
    json.dumps(same)
    others = [
        load(folder, seed=5),
        load(folder, seq_length=16),
        load(folder, almr=0.11),
        load(folder, almr={"from": 0.1, "to": 0.2}),
        load(folder, general=[{"prefix": "en"}]),
        load(folder, general=[{"prefix": "en", "weight": 1}, {"prefix": "code", "weight": 1}]),
        load(folder, stages=[{"tokens": 64}, {}]),
    ]
    prints = [json.dumps(mixture.fingerprint()) for mixture in others]
    assert len({json.dumps(same), *prints}) == 8


def test_stages_shorter_than_a_sample(folder: Path) -> None:
    assert "stage 1 has 31 tokens; one sample takes 32" in refusal(folder, stages=[{"tokens": 31}, {}])
    mixture = load(folder, stages=[{"fraction": 0.001}, {}])
    with pytest.raises(InputError, match="stage 1: in a run of 100 samples a part of it is shorter than one sample of 32"):
        mixture.schedule(100)


def test_one_text_under_two_names(folder: Path) -> None:
    twice = [{"prefix": "en"}, {"prefix": "en", "name": "again"}]
    assert "general[1]: again and en are one text; leave one out" in refusal(folder, general=twice)
    across = [{"prefix": "zh"}, {"prefix": "en", "name": "again"}]
    assert "additional[1]: again and en are one text" in refusal(folder, additional=across)


def test_a_field_given_twice(folder: Path) -> None:
    path = write(folder)
    for more, field in (("almr: 0.9\n", "almr"), ("general: []\n", "general")):
        Path(path).write_text(Path(write(folder)).read_text() + more)
        with pytest.raises(InputError, match=f"is not YAML: line [0-9]+: field '{field}' is given twice"):
            load_mixture(path)


@pytest.mark.parametrize("text", ["a: !!python/name:os.system", "a: !!binary x", "a: " + "[" * 3000])
def test_scalars_that_cannot_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(InputError, match="is not YAML"):
        load_mixture(str(tmp_path / "m.yaml"))


@pytest.mark.parametrize("value", [0, {}, "", False])
@pytest.mark.parametrize("group", ["general", "additional", "validation"])
def test_nothing_is_no_list(folder: Path, group: str, value: Any) -> None:
    assert f"mixture.yaml: {group} is {as_read(value)}; expected a list" in refusal(folder, **{group: value})


def test_almr_at_the_top_is_looked_at_in_any_case(folder: Path) -> None:
    assert "almr is 'banana'" in refusal(folder, almr="banana", stages=[{"almr": 0.3}])


def test_a_corpus_without_tokens(folder: Path) -> None:
    with IndexedWriter(str(folder / "empty"), np.uint16):
        pass
    shutil.copy(folder / "en.json", folder / "empty.json")
    change_manifest(
        folder, "empty", tokens=0, files={"bin": {"bytes": 0, "sha256": "0"}, "idx": {"bytes": 42, "sha256": "0"}}
    )
    assert "empty.bin has only 0 tokens; expected" in refusal(folder, general=[{"prefix": "en"}, {"prefix": "empty"}])


def test_a_pilot_run_may_end_before_the_last_stage_begins(folder: Path) -> None:
    stages = [{"tokens": 3200, "almr": 0.2}, {"almr": {"from": 0.2, "to": 0.5}}]
    mixture = load(folder, stages=stages)
    assert mixture.schedule(50).counts(50)[2] == 10
    assert mixture.schedule(100).counts(100)[2] == 20
    assert mixture.schedule(200).counts(200)[2] == 55


def test_names_and_sizes_of_stages(folder: Path) -> None:
    assert "two stages are named 'a'" in refusal(folder, stages=[{"name": "a", "tokens": 320}, {"name": "a"}])
    assert "two stages are named '2'" in refusal(folder, stages=[{"name": 2, "tokens": 320}, {}])
    assert "the stages have 9e+18 tokens; expected at most 2**62" in refusal(folder, stages=[{"tokens": "9e18"}, {}])
    assert "tokens is '1e25'; expected a whole number" in refusal(folder, stages=[{"tokens": "1e25"}, {}])


def test_megatrons_order_of_a_mixture(folder: Path) -> None:
    schedule = load(folder, almr=0.25).megatron_schedule(200)
    assert schedule.megatron is not None
    assert sum(schedule.counts(200)) == 200
    assert abs(schedule.counts(200)[2] - 50) <= 1
    for changes in ({"stages": [{"tokens": 320}, {}]}, {"almr": {"from": 0.1, "to": 0.2}}):
        with pytest.raises(InputError, match=r"data\.order megatron knows one almr for the whole run"):
            load(folder, **changes).megatron_schedule(200)
    with pytest.raises(InputError, match="a share above 0 for every corpus"):
        load(folder, almr=0).megatron_schedule(200)
    with pytest.raises(InputError, match=r"mixture\.yaml: data\.order megatron: seed"):
        load(folder, seed=2**40).megatron_schedule(200)


def test_a_stage_of_k_samples_has_k_wherever_it_begins(folder: Path) -> None:
    for before in range(32, 97):
        stages = [{"tokens": before}, {"tokens": 32}, {"tokens": 64}, {}]
        starts = load(folder, stages=stages).schedule(100).starts
        assert (starts[2] - starts[1], starts[3] - starts[2]) == (1, 2)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"dtype": "int16"}, "en.idx: dtype is uint16; expected int16, as "),
        ({"dtype": "int32"}, "en.idx: dtype is uint16; expected int32, as "),
        ({"files": {"bin": {"bytes": 3, "sha256": "0"}, "idx": {"bytes": 4, "sha256": "0"}}}, "bytes; expected 3, as "),
    ],
)
def test_files_that_are_not_those_of_the_manifest(folder: Path, change: dict[str, Any], wanted: str) -> None:
    change_manifest(folder, "en", **change)
    assert wanted in refusal(folder, general=[{"prefix": "en"}])


def test_all_mistakes_of_a_file_at_once(folder: Path) -> None:
    """One mistake does not hide those in other places of the file, and none is said twice."""
    (folder / "code.bin").write_bytes(b"")
    path = write(
        folder,
        seq_length="2k",
        seed=-1,
        almr=1.5,
        alrm=0.1,
        general=[{"prefix": "nowhere"}, {"prefix": "code", "weight": 0}, {"prefix": "en", "max_epochs": 0}],
        additional="zh",
        validation=[{"prefix": "zh_valid", "language": "zho"}, {"name": ""}],
        stages=[{"tokens": "some"}, {"fraction": 2, "almr": 0.5}, {"almr": {"form": 0}, "sead": 1}],
    )
    with pytest.raises(InputErrors) as caught:
        load_mixture(path)
    expected = [
        "seq_length is '2k'; expected a whole number without a unit, 1 or more",
        "seed is -1; expected",
        ": almr is 1.5",
        "alrm is unknown; expected almr",
        "general[1].weight is 0",
        "general[2].max_epochs is 0",
        "additional is 'zh'; expected a list",
        "validation[1].name is ''; expected a name",
        "stages[0].tokens is 'some'",
        "stages[1].fraction is 2",
        "stages[2].almr is {'form': 0}",
        "stages[2].sead is unknown",
        "validation[0].language is 'zho'; expected zh",
        "validation[1].prefix is missing",
        "general[0] has no weight but others in the group do",
        f"{folder}/nowhere.json: no such file",
        f"{folder}/code.bin",
    ]
    found = list(map(str, caught.value.errors))
    unsaid = [words for words in expected if not any(words in line for line in found)]
    assert not unsaid, "\n".join(found)
    assert len(found) == len(expected), "\n".join(found)


def test_mistakes_of_a_file_hide_none_of_its_entries_and_corpora(folder: Path) -> None:
    """Nor do several in one entry or stage hide each other, and what was refused is no mistake elsewhere."""
    manifest = json.loads((folder / "zh.json").read_text())
    (folder / "zh.json").write_text(json.dumps(manifest | {"tokenizer": manifest["tokenizer"] | {"fingerprint": "0" * 64}}))
    (folder / "code.json").write_text("{")
    (folder / "code.idx").write_bytes(b"index")
    path = write(
        folder,
        seed="x",
        general=[
            {"prefix": "en", "nmae": 1, "max_epochs": -1, "name": [1]},
            {"group": None, "size": 2, "corpora": [{"prefix": "gone", "max_epochs": 0}, {"prefix": "code"}]},
        ],
        additional=[{"prefix": "zh"}, {"prefix": "short"}],
        validation=[{"prefix": "nowhere", "language": "zho", "weight": 1}, {"prefix": "zh_valid"}],
        stages=[
            3,
            {"tokens": -1, "name": [2], "almr": {"from": 2, "to": "x"}},
            {"almr": {"steps": [[0, 7], [9, 8]]}, "a": 1},
        ],
    )
    with pytest.raises(InputErrors) as caught:
        load_mixture(path)
    expected = [
        "seed is 'x'",
        "stages[0] is 3; expected a section",
        "stages[2].a is unknown",
        "general[0].nmae is unknown; expected name",
        "general[0].name is [1]",
        "general[0].max_epochs is -1",
        "general[1].size is unknown",
        "general[1].group is null",
        "gone.json: no such file",
        "general[1].corpora[0].max_epochs is 0",
        "code.json: not valid JSON",
        "code.idx: begins with",
        "stages[1].name is [2]",
        "stages[1].tokens is -1",
        "stages[1].almr.from is 2",
        "stages[1].almr.to is 'x'",
        "stages[2].almr.steps[0][1] is 7",
        "stages[2].almr.steps[1][1] is 8",
        "validation[0].weight is unknown",
        "nowhere.json: no such file",
        "validation[0].language is 'zho'",
        "short.bin has only",
        "zh.json was made with tokenizer",  # it, not each of the others
    ]
    found = list(map(str, caught.value.errors))
    unsaid = [words for words in expected if not any(words in line for line in found)]
    assert not unsaid, "\n".join(found)
    assert len(found) == len(expected), "\n".join(found)


def test_all_mistakes_that_only_the_corpora_show(folder: Path) -> None:
    manifest = json.loads((folder / "zh.json").read_text())
    (folder / "zh.json").write_text(json.dumps(manifest | {"tokenizer": manifest["tokenizer"] | {"fingerprint": "0" * 64}}))
    path = write(folder, validation=[{"prefix": "en"}, {"prefix": "short"}], stages=[{"tokens": 1}, {}])
    with pytest.raises(InputErrors) as caught:
        load_mixture(path)
    words = ["stage 1 has 1 token;", "zh.json was made with tokenizer", "short.bin has only", "both a training corpus"]
    assert [word in str(error) for word, error in zip(words, caught.value.errors, strict=True)] == [True] * 4
