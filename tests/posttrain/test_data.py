"""Every row is used or counted; groups are mixed by ALMR; what is too long is cut, skipped or refused as asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_cpt.posttrain.data import Prepared, SourceConfig, prepare_dpo, prepare_sft
from megatron_cpt.posttrain.models import check_fit
from megatron_cpt.posttrain.report import show_report, write_report
from megatron_cpt.posttrain.settings import LoraSettings, TuningDataConfig
from megatron_cpt.posttrain.template_files import CHATML
from megatron_cpt.posttrain.templates import IGNORED, Example, Template, load_template
from megatron_cpt.utils.errors import InputError


@pytest.fixture(scope="module")
def template(chat_tokenizer_dir: str) -> Template:
    return load_template(chat_tokenizer_dir, "chatml")


def rows(number: int, words: int = 5, word: str = "dog") -> list[dict[str, Any]]:
    return [{"instruction": f"Say {i}.", "output": " ".join([word] * (words + i % 3))} for i in range(number)]


def write(path: Path, content: list[Any]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(content, ensure_ascii=False))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in content))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(content), path)
    return str(path)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_all_files_give_the_same(template: Template, tmp_path: Path, ending: str) -> None:
    source = SourceConfig(write(tmp_path / f"rows{ending}", rows(20)), "en")
    found = prepare_sft(TuningDataConfig([source], validation_share=0.1), template, 1)
    assert len(found.train) == 18
    assert {language: len(examples) for language, examples in found.validation.items()} == {"en": 2}
    assert (found.counts[0].rows, found.counts[0].used, found.counts[0].validation) == (20, 18, 2)
    again = prepare_sft(TuningDataConfig([source], validation_share=0.1), template, 1)
    assert again.train == found.train
    other = prepare_sft(TuningDataConfig([source], validation_share=0.1), template, 2)
    assert other.train != found.train


@pytest.mark.parametrize("almr", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_groups_are_mixed_by_tokens(template: Template, tmp_path: Path, almr: float) -> None:
    """Within one conversation, using all of the group of which there is too little."""
    general = SourceConfig(write(tmp_path / "en.json", rows(60)), "en")
    additional = SourceConfig(write(tmp_path / "zh.json", rows(80, 20, "狗")), "zh", "additional")
    config = TuningDataConfig([general, additional], validation_share=0, almr=almr)
    found = prepare_sft(config, template, 3)
    longest = max(len(example.input_ids) for example in found.train)
    total = sum(len(example.input_ids) for example in found.train)
    assert abs(found.almr - almr) <= longest / total
    used = {counts.source.group: counts.used for counts in found.counts}
    assert (used["general"] == 60) or (used["additional"] == 80)
    assert all(counts.used + counts.left_out == counts.rows for counts in found.counts)
    everything = prepare_sft(replace(config, almr=None), template, 3)
    assert len(everything.train) == 140


def test_an_almr_needs_its_group(template: Template, tmp_path: Path) -> None:
    source = SourceConfig(write(tmp_path / "en.json", rows(5)), "en")
    with pytest.raises(InputError, match=r"almr is 0\.5, but no source has the group additional; expected one"):
        TuningDataConfig([source], almr=0.5)
    unusable = SourceConfig(write(tmp_path / "zh.json", [{"text": "x"}]), "zh", "additional")
    with pytest.raises(InputError, match=r"data\.almr is 0\.5, but no row of a source with group additional can be used"):
        prepare_sft(TuningDataConfig([source, unusable], validation_share=0, almr=0.5, on_error="skip"), template, 1)


BROKEN: list[Any] = [
    "{not json",
    {"instruction": "a", "output": ""},
    {"instruction": "a<|im_end|>", "output": "b"},
    {"text": "no conversation"},
    {"instruction": "b", "output": ""},
]


def test_broken_rows_are_counted_and_named(template: Template, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = SourceConfig(write(tmp_path / "rows.jsonl", [*rows(10), *BROKEN]), "en")
    with pytest.raises(InputError, match=r"rows\.jsonl, row 11: unexpected character.*; data\.on_error: skip goes on"):
        prepare_sft(TuningDataConfig([source]), template, 1)
    found = prepare_sft(TuningDataConfig([source], on_error="skip", validation_share=0), template, 1)
    report = json.loads(Path(write_report(str(tmp_path), found)).read_text())
    (counts,) = report["sources"]
    assert (counts["rows"], counts["used"], report["train"]) == (15, 10, 10)
    kinds = {kind: (facts["rows"], facts["first"]) for kind, facts in counts["broken"].items()}
    assert kinds == {
        "not JSON": (1, [11]),
        "empty answer": (2, [12, 15]),
        "special token in a text": (1, [13]),
        "unknown style": (1, [14]),
    }
    assert counts["tokens"] == sum(len(example.input_ids) for example in found.train)
    show_report(found)
    said = capfd.readouterr().err
    assert "rows.jsonl: 2 rows left out (empty answer): 12, 15; message 2 is empty" in said
    assert "data: 10 examples, ALMR 0.000" in said


def test_what_rows_say_of_themselves_is_heeded_or_counted(
    template: Template, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Answers that are not to be learned, fields that nothing uses, what a model of texts cannot be shown."""
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Dog?"), ("assistant", "Fox.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    silent = [messages[0] | {"name": "ann"}, messages[1] | {"weight": 0}, *messages[2:]]
    content = [{"messages": messages}, {"messages": silent}, {"messages": messages, "images": ["1.png"]}]
    source = SourceConfig(write(tmp_path / "rows.jsonl", content), "en")
    with pytest.raises(InputError, match=r"rows\.jsonl, row 3: it has images; expected a conversation in text alone"):
        prepare_sft(TuningDataConfig([source]), template, 1)
    found = prepare_sft(TuningDataConfig([source], validation_share=0, on_error="skip"), template, 1)
    learned = {sum(label != IGNORED for label in example.labels) for example in found.train}
    assert learned == {len(template.tokenizer.encode(t + "<|im_end|>")) for t in ("Fox.",)} | {
        sum(len(template.tokenizer.encode(t + "<|im_end|>")) for t in ("Hello", "Fox."))
    }
    (counts,) = json.loads(Path(write_report(str(tmp_path), found)).read_text())["sources"]
    assert (counts["not_learned"], counts["unused_fields"]) == (1, {"name": 1})
    assert counts["broken"]["images, videos or sounds"]["rows"] == 1
    show_report(found)
    said = capfd.readouterr().err
    assert "rows.jsonl: 1 answer not learned, as they say" in said
    assert "rows.jsonl: 1 row with name, which is not used" in said


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"trainable": 0}])
@pytest.mark.parametrize("prepare", [prepare_sft, prepare_dpo])
def test_rows_that_are_not_to_be_learned_are_left_out_and_counted(
    template: Template, tmp_path: Path, capfd: pytest.CaptureFixture[str], flag: dict[str, Any], prepare: Any
) -> None:
    """Said beside the messages, of all answers. Fields there that nothing uses are counted, too."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"messages": messages} if prepare is prepare_sft else {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    used = row | {"source": "web", "weight": 1, "train": True, "id": 3, "system": "", "tools": []}
    source = SourceConfig(write(tmp_path / "rows.jsonl", [used, row | flag, row]), "en")
    found = prepare(TuningDataConfig([source], validation_share=0, on_error="skip"), template, 1)
    assert len(found.train) == 2
    (counts,) = json.loads(Path(write_report(str(tmp_path), found)).read_text())["sources"]
    assert {kind: facts["first"] for kind, facts in counts["broken"].items()} == {"nothing to learn": [2]}
    assert (counts["used"], counts["unused_fields"]) == (2, {"source": 1})
    show_report(found)
    said = capfd.readouterr().err
    assert "rows.jsonl: 1 row left out (nothing to learn): 2; it says that it is not to be learned" in said
    assert "rows.jsonl: 1 row with source, which is not used" in said


@pytest.mark.parametrize(("field", "value"), [("weight", 0.5), ("train", "no"), ("loss", 2)])
def test_a_row_that_is_to_be_learned_a_little_is_refused(template: Template, tmp_path: Path, field: str, value: Any) -> None:
    row = {"instruction": "Hi", "output": "Hello"}
    source = SourceConfig(write(tmp_path / "rows.jsonl", [row, row | {field: value}]), "en")
    with pytest.raises(InputError, match=rf"rows\.jsonl, row 2: it has {field} {value!r}; expected 0 or 1"):
        prepare_sft(TuningDataConfig([source]), template, 1)


def test_texts_that_the_template_leaves_out_are_named(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
    )
    without_system = load_template(chat_tokenizer_dir, str(tmp_path / "own.jinja"))
    for make, content, prepare in ((rows, rows(2), prepare_sft), (pairs, pairs(2), prepare_dpo)):
        content[1]["system"] = "Be kind."
        source = SourceConfig(write(tmp_path / f"{make.__name__}.json", content), "en")
        with pytest.raises(
            InputError, match=rf"{make.__name__}\.json, row 2: the chat template leaves out the content of message 1"
        ):
            prepare(TuningDataConfig([source]), without_system, 1)  # type: ignore[operator]


def test_what_is_too_long(template: Template, tmp_path: Path) -> None:
    """Cut at its end; a prompt that leaves no room for an answer is skipped and counted."""
    long_answer = {"instruction": "a", "output": "dog " * 100}
    long_prompt = {"instruction": "dog " * 100, "output": "b"}
    source = SourceConfig(write(tmp_path / "rows.json", [*rows(3), long_answer, long_prompt]), "en")
    config = TuningDataConfig([source], validation_share=0, max_length=64)
    found = prepare_sft(config, template, 1)
    (counts,) = found.counts
    assert (counts.used, counts.truncated) == (4, 1)
    assert counts.broken["too long"][0] == [5]
    (cut,) = (example for example in found.train if len(example.input_ids) == 64)
    assert cut.labels[-1] != IGNORED
    assert max(counts.lengths) > 64
    skipped = prepare_sft(replace(config, on_overlength="skip"), template, 1)
    assert skipped.counts[0].broken["too long"][0] == [4, 5]
    with pytest.raises(InputError, match=r"row 4: it has \d+ tokens; max_length is 64; data\.on_overlength: skip goes on"):
        prepare_sft(replace(config, on_overlength="refuse"), template, 1)


def pairs(number: int) -> list[dict[str, Any]]:
    return [{"instruction": f"Say {i}.", "chosen": "狗" * (2 + i % 3), "rejected": "dog"} for i in range(number)]


def test_groups_are_mixed_with_each_other(template: Template, tmp_path: Path) -> None:
    """In the order of training: neither the first nor the last quarter is of one group."""
    general = SourceConfig(write(tmp_path / "en.json", rows(40)), "en")
    additional = SourceConfig(write(tmp_path / "zh.json", rows(40, 5, "狗")), "zh", "additional")
    found = prepare_sft(TuningDataConfig([general, additional], validation_share=0), template, 3)
    groups = ["狗" in example.origin.messages[1].content for example in found.train]
    assert sum(groups) == 40
    for quarter in range(0, 80, 20):
        assert 0 < sum(groups[quarter : quarter + 20]) < 20, quarter


def test_pairs(template: Template, tmp_path: Path) -> None:
    same = {"instruction": "a", "chosen": "b", "rejected": "b"}
    differ_late = {"instruction": "a", "chosen": "dog " * 50 + "x", "rejected": "dog " * 50 + "y"}
    source = SourceConfig(write(tmp_path / "pairs.json", [*pairs(8), same, differ_late]), "zh", "additional")
    config = TuningDataConfig([source], validation_share=0.2, max_length=48, on_error="skip")
    found = prepare_dpo(config, template, 1)
    (counts,) = found.counts
    assert (len(found.train), len(found.validation["zh"]), counts.truncated) == (6, 2, 0)
    assert {kind: numbers for kind, (numbers, _) in counts.broken.items()} == {"identical answers": [9], "too long": [10]}
    assert found.almr == 1.0


@pytest.mark.parametrize("left_out", ["max_rows", "validation_share"])
def test_which_rows_are_left_out_is_chosen_at_random(template: Template, tmp_path: Path, left_out: str) -> None:
    """By the seed, and from the whole file: it may be sorted."""
    words = ["dog", "fox", "cat", "cow", "hen", "bee", "ant", "owl", "elk", "yak"]
    source = SourceConfig(write(tmp_path / "rows.json", [row for word in words for row in rows(1, word=word)]), "en")
    config = TuningDataConfig([replace(source, max_rows=5)], validation_share=0)
    if left_out == "validation_share":
        config = TuningDataConfig([source], validation_share=0.5)
    used = [{tuple(example.input_ids) for example in prepare_sft(config, template, seed).train} for seed in range(4)]
    whole = prepare_sft(TuningDataConfig([source], validation_share=0), template, 0).train
    assert all(len(rows) == 5 for rows in used)
    assert len(set(map(frozenset, used))) > 1
    assert set().union(*used) <= {tuple(example.input_ids) for example in whole}


def test_validation_files(template: Template, tmp_path: Path) -> None:
    train = SourceConfig(write(tmp_path / "train.json", rows(10)), "en")
    valid = SourceConfig(write(tmp_path / "valid.json", rows(6)), "zh", max_rows=4)
    found = prepare_sft(TuningDataConfig([train], [valid]), template, 1)
    assert (len(found.train), {k: len(v) for k, v in found.validation.items()}) == (10, {"zh": 4})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "holds a JSON dict; expected a list of rows"),
        ("a.json", "{", r"is not JSON: .*; files with an object on each line end in \.jsonl"),
        ("a.parquet", "x", "is not Parquet"),
        ("a.csv", "x", r"ends in \.csv; expected one of \.json, \.jsonl, \.parquet"),
        ("a.jsonl", "\n\n", "no row of data.sources is left to train on"),
    ],
)
def test_files_that_hold_no_rows(template: Template, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        prepare_sft(TuningDataConfig([SourceConfig(str(tmp_path / name), "en")]), template, 1)


def test_reports_of_nothing(template: Template, tmp_path: Path) -> None:
    found: Prepared[Example] = Prepared([], {}, [], 0.0)
    assert json.loads(Path(write_report(str(tmp_path), found)).read_text())["sources"] == []


def test_a_validation_file_without_usable_rows_is_named(template: Template, tmp_path: Path) -> None:
    source = SourceConfig(write(tmp_path / "rows.json", rows(5)), "en")
    broken = SourceConfig(write(tmp_path / "broken.json", [{"instruction": "x", "output": ""}]), "zh")
    config = TuningDataConfig([source], validation=[broken], on_error="skip")
    with pytest.raises(InputError, match=r"broken\.json: no row is left to evaluate on; 1 row, 1 empty answer"):
        prepare_sft(config, template, 1)
    with pytest.raises(InputError, match=r"left to train on: .*broken\.json: 1 row, 1 empty answer \(message 2 is empty\)"):
        prepare_sft(TuningDataConfig([broken], on_error="skip"), template, 1)


def test_validation_rows_that_are_not_used_are_counted(template: Template, tmp_path: Path) -> None:
    source = SourceConfig(write(tmp_path / "rows.json", rows(5)), "en")
    found = prepare_sft(TuningDataConfig([source], validation=[replace(source, max_rows=2)]), template, 1)
    assert (found.counts[1].validation, found.counts[1].left_out) == (2, 3)


@pytest.mark.parametrize("language", ["", "../en", "en/zh"])
def test_a_language_can_name_files(language: str) -> None:
    with pytest.raises(InputError, match="expected a code such as en or zh"):
        SourceConfig("en.json", language)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_byte_order_mark_is_no_text(template: Template, tmp_path: Path, ending: str) -> None:
    path = Path(write(tmp_path / f"rows{ending}", rows(5)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(prepare_sft(TuningDataConfig([SourceConfig(str(path), "en")], validation_share=0), template, 1).train) == 5


def test_a_damaged_parquet_file_is_named(template: Template, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "rows.parquet", rows(500)))
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.parquet is not Parquet, or damaged"):
        prepare_sft(TuningDataConfig([SourceConfig(str(path), "en")]), template, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"vocab_size": 9}, "and the model's vocab_size is 9"), ({"max_position_embeddings": 4}, "and the model 4 positions")],
)
def test_a_model_that_is_too_small_for_the_data(
    template: Template, tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    found = prepare_sft(TuningDataConfig([SourceConfig(write(tmp_path / "rows.json", rows(5)), "en")]), template, 1)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000, "max_position_embeddings": 1000}))
    check_fit(str(tmp_path), found)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        check_fit(str(tmp_path), found)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        check_fit(str(tmp_path), found)


@pytest.mark.parametrize("options", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_adapters_that_there_are_none_of(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        LoraSettings(**options)
