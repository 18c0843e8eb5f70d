"""Looking at a mixture: its table, samples at any number, and documents that are in twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_corpora import write_lines

from megatron_cpt.corpus import indexed_dataset
from megatron_cpt.corpus.import_megatron import ImportCorpusConfig, import_corpora
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus, IndexedWriter
from megatron_cpt.corpus.merge import MergeConfig, merge_datasets
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.inspect_data import InspectConfig, inspect_data
from megatron_cpt.mixture.inspection import overlapping
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.errors import InputError


@pytest.fixture
def mixture(tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    """Two stages of [b]en (general) and zh; valid has documents of its own and two of zh's."""
    documents = {
        "[b]en": [f"The quick brown fox number {i} jumps over the lazy dog." for i in range(60)],
        "zh": [f"第{i}天，今天天气很好，我们去公园散步。" for i in range(60)],
        "valid": [f"第{i}句，持续预训练。" for i in range(20)],
        "leaky": ["第7天，今天天气很好，我们去公园散步。", "新的", "第59天，今天天气很好，我们去公园散步。"] * 2,
    }
    for name, texts in documents.items():
        source = write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        language = "en" if "en" in name else "zh"
        preprocess(PreprocessConfig(source, tiny_tokenizer_dir, str(tmp_path / name), language, workers=1))
    fields = {
        "seq_length": 16,
        "seed": 1,
        "general": [{"group": "web", "corpora": [{"prefix": "[b]en"}]}],
        "additional": [{"prefix": "zh", "max_epochs": 2}],
        "stages": [{"name": "[red]warm", "tokens": 320, "almr": 0.2}, {"tokens": 640, "almr": {"from": 0.2, "to": 0.5}}],
        "validation": [{"prefix": "valid"}],
    }
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def change(path: Path, **fields: object) -> str:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))
    return str(path)


def test_the_table(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(InspectConfig(str(mixture)))
    shown = capsys.readouterr().out
    assert "60 samples of 16 tokens; ALMR asked 0.3000, realised 0.3000" in shown
    for wanted in ("[red]warm", "ALMR 0.2000, asked 0.2000", "ALMR 0.3500, asked 0.3500", "[b]en", "general/web"):
        assert wanted in shown
    assert "by language: en 0.7000, zh 0.3000" in shown


def test_stages_that_the_run_does_not_reach(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are missing in the table, as if they were not in the file."""
    stages = [{"tokens": "20B", "almr": 0.2}, {"name": "late", "tokens": "1M", "almr": 0.5}, {"name": "last", "almr": 1}]
    path = change(mixture, stages=stages)
    inspect_data(InspectConfig(path, run_samples=100))
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert note.startswith(f"note: {path}: the run ends after 100 samples, and stage late, last would begin at sample ")
    assert "sample 1,250,000,000: never reached; give the stages before it less, or train longer" in note
    path = change(mixture, stages=[{"tokens": 320, "almr": 0.2}, {"almr": 0.5}])
    for samples, said in ((20, True), (21, False), (100, False)):
        inspect_data(InspectConfig(path, run_samples=samples))
        assert ("never reached" in capsys.readouterr().out) == said, samples


def test_a_limit_that_breaks_is_said_after_the_table(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(mixture, almr=0.9, stages=[{}])
    with pytest.raises(InputError, match=r"would read corpus zh \([\d,]+ tokens\) [\d.]+ times; its max_epochs is 2"):
        inspect_data(InspectConfig(path, run_samples=100_000))
    assert "100,000 samples" in capsys.readouterr().out


def test_samples_are_those_of_the_run(mixture: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(InspectConfig(str(mixture), samples=3, at=[50], global_batch_size=4))
    shown = capsys.readouterr().out
    assert "60 samples" in shown
    assert [f"sample {n}:" in shown for n in (0, 1, 2, 3, 50)] == [True, True, True, False, True]
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    first = shown[shown.index("sample 0: ") :].split("\n", 1)
    name, begin = first[0].split()[2].rstrip(","), int(first[0].split("tokens from ")[1].split()[0].replace(",", ""))
    tokens = IndexedCorpus(str(mixture.parent / name)).tokens[begin : begin + 17]
    assert first[1].startswith(tokenizer.decode(tokens.tolist()))


def test_any_number_at_once(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(mixture, almr=0.33, stages=[{}])
    inspect_data(InspectConfig(path, at=10**12))
    assert "sample 1,000,000,000,000: " in capsys.readouterr().out
    with pytest.raises(InputError, match="sample -1: expected a number from 0 to"):
        inspect_data(InspectConfig(path, at=-1))


def test_samples_after_the_last_stage(mixture: Path) -> None:
    with pytest.raises(InputError, match="the stages have 60 samples"):
        inspect_data(InspectConfig(str(mixture), at=60))


def test_samples_do_not_depend_on_what_else_is_asked(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(mixture, almr={"from": 0.0, "to": 1.0}, stages=[{}])
    inspect_data(InspectConfig(path, at=5))
    alone = capsys.readouterr().out
    inspect_data(InspectConfig(path, at=[50, 5]))
    assert alone in capsys.readouterr().out
    with pytest.raises(InputError, match=r"sample 10000: .* depend on the length of the run; expected run_samples"):
        inspect_data(InspectConfig(path, at=[5, 10_000]))
    inspect_data(InspectConfig(path, at=[5, 10_000], run_samples=20_000))


def test_what_is_asked_of_corpora(mixture: Path) -> None:
    corpus = str(mixture.parent / "zh")
    for config in (InspectConfig(corpus, samples=3), InspectConfig(corpus, at=3), InspectConfig(corpus, overlap=True)):
        with pytest.raises(InputError, match="overlap are for a mixture file"):
            inspect_data(config)
    with pytest.raises(InputError, match="lists no validation sets"):
        inspect_data(InspectConfig(change(mixture, validation=[]), overlap=True))


def test_documents_in_both(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(InspectConfig(str(mixture), overlap=True))
    assert "valid, zh: 0 documents in common" in capsys.readouterr().out
    path = change(mixture, validation=[{"prefix": "valid"}, {"prefix": "leaky"}])
    with pytest.raises(InputError, match=r"2 documents of leaky in zh \(0 = 7, 2 = 59\); expected none"):
        inspect_data(InspectConfig(path, overlap=True))


def test_overlap_of_other_widths_and_empty_documents(tmp_path: Path) -> None:
    for name, dtype, documents in (
        ("a", np.uint16, [[1, 2, 3], [], [5], [9, 9]]),
        ("b", np.int32, [[], [3, 2, 1], [5], [9, 9], [5], [1, 2, 3, 4]]),
    ):
        with IndexedWriter(str(tmp_path / name), dtype) as writer:
            for document in documents:
                writer.add_document(np.array(document, dtype))
    a, b = (IndexedCorpus(str(tmp_path / name)) for name in "ab")
    assert sorted(overlapping(a, b)) == [(2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": ["{m}", "{m}"]}, "found a mixture among 2 inputs"),
        ({"check": True}, "check and document are for corpora"),
        ({"document": 3}, "check and document are for corpora"),
        ({"run_samples": 0}, "run_samples is 0; expected 1 or more"),
        ({"global_batch_size": 0}, "global_batch_size is 0; expected 1 or more"),
        ({"global_batch_size": 10**20}, "global_batch_size is 100000000000000000000; expected at most"),
        ({"at": 2**62}, "expected a number from 0 to 2"),
        ({"samples": -1}, "samples is -1; expected 0 or more"),
    ],
)
def test_questions_that_cannot_be_asked(mixture: Path, fields: dict[str, object], message: str) -> None:
    found = {"input": str(mixture)} | fields
    if isinstance(found["input"], list):
        found["input"] = [str(mixture)] * 2
    with pytest.raises(InputError, match=message):
        inspect_data(InspectConfig(**found))  # type: ignore[arg-type]


def test_no_tool_maps_files_that_others_may_cut(
    mixture: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that touches a map of what is gone is killed by SIGBUS."""
    monkeypatch.setattr(indexed_dataset, "_map", lambda path, *_: pytest.fail(f"{path} is mapped"))
    folder = mixture.parent
    inspect_data(InspectConfig([str(folder / "zh"), str(folder / "valid")], document=[3, -1]))
    inspect_data(InspectConfig(str(folder / "zh"), check=True))
    inspect_data(InspectConfig(str(mixture), samples=2, overlap=False))
    inspect_data(InspectConfig(str(mixture), overlap=True))
    merge_datasets(MergeConfig([str(folder / "zh"), str(folder / "valid")], str(folder / "both"), shuffle_documents=1))
    (folder / "zh.json").unlink()
    import_corpora(ImportCorpusConfig(str(folder / "zh"), tiny_tokenizer_dir, "zh"))
    change(mixture, stages=[{}], almr=0.5, validation=[])
    load_mixture(str(mixture)).megatron_schedule(100).counts(50)
