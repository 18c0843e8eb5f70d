"""A few rows of each benchmark, written by hand in the format in which it is published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

SUMMARIES = [
    {
        "summary": "可穿戴技术十大设计原则",
        "text": "本文总结了十个可穿戴产品的设计原则，这些原则也是这个行业最吸引人的地方。",
    },
    {"summary": "公园今天免费开放", "text": "今天天气很好，市里的公园全部免费开放，很多人去散步。"},
    {"summary": "新地铁线开通", "text": "本市第十条地铁线今天开通，全长二十公里，设十六个车站。"},
    {"summary": "大学生创业增多", "text": "调查显示，去年毕业的大学生里选择创业的人比前年多了一成。"},
]
PRONOUNS = [
    {
        "target": {"span2_index": 13, "span1_index": 2, "span1_text": "床", "span2_text": "它"},
        "idx": 0,
        "label": label,
        "text": "我把床搬到窗边，第二天发现它被雨淋湿了。",
    }
    for label in ("true", "false", "true")
]
REVIEWS = [
    {"id": 23, "sentence": "外包装上有点磨损，试听后感觉不错", "label": "Positive"},
    {"id": 25, "sentence": "不是快充，被坑了", "label": "Negative"},
    {"id": 19, "sentence": "挺不错的，值得买", "label": "Positive"},
]
QUESTIONS = [
    {"question": "将这句话翻译成英语：今天天气很好。", "class": "translation", "std_answer": "The weather is nice today."},
    {"question": "如何提高销售额？", "class": "brainstorming", "std_answer": ""},
    {"question": "水的化学式是什么？", "class": "open qa", "std_answer": "水的化学式是H2O。"},
]
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a: int, b: int) -> int:\n    """The sum.\n    >>> add(2, 3)\n    5\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(0, 0) == 0",
}
XML = """<?xml version='1.0' encoding='utf-8'?>
<dataset id="wmttest2022">
<collection id="general">
<doc origlang="{source}" id="a" domain="news">
<src lang="{source}"><p><seg id="1">{first}</seg><seg id="2">{second}</seg></p></src>
<ref lang="{target}" translator="A"><p><seg id="1">{one}</seg><seg id="2">{two}</seg></p></ref>
<ref lang="{target}" translator="B"><p><seg id="1">other</seg><seg id="2">other</seg></p></ref>
</doc>
<doc origlang="{source}" id="b" testsuite="terms">
<src lang="{source}"><p><seg id="1">not asked</seg></p></src>
</doc>
</collection>
</dataset>
"""
CHINESE, ENGLISH = ("今天天气很好。", "我们去公园散步。"), ("The weather is nice today.", "We take a walk in the park.")


def squad(answers: list[str]) -> dict[str, Any]:
    """A file with one passage and two questions."""
    asked = [
        {
            "id": f"DEV_0_QUERY_{i}",
            "question": f"问题{i}？",
            "answers": [{"text": text, "answer_start": 0} for text in answers],
        }
        for i in range(2)
    ]
    return {"version": "v1.0", "data": [{"title": "范廷颂", "paragraphs": [{"context": "范廷颂是枢机。", "qas": asked}]}]}


def write(path: Path, content: Any) -> None:
    """JSON Lines of a list, JSON of a dict, else text; compressed, if in .gz."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    elif isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_all(folder: Path) -> str:
    """A folder with data of every task of the package."""
    files: dict[str, Any] = {
        "lcsts/test.jsonl": SUMMARIES[:2],
        "lcsts/valid.jsonl": SUMMARIES * 2,
        "cluewsc2020/dev.json": PRONOUNS[:2],
        "cluewsc2020/train.json": PRONOUNS * 2,
        "cmrc2018/cmrc2018_dev.json": squad(["范廷颂", "范廷颂枢机"]),
        "cmrc2018/cmrc2018_train.json": squad(["枢机"]),
        "drcd/DRCD_test.json": squad(["枢機"]),
        "drcd/DRCD_training.json": squad(["枢機"]),
        "eprstmt/test_public.json": REVIEWS[:2],
        "eprstmt/train_few_all.json": REVIEWS * 2,
        "belle/eval_set.json": QUESTIONS,
        "humaneval/HumanEval.jsonl.gz": [PROBLEM],
        "wmt22/wmttest2022.zh-en.all.xml": xml("zh", CHINESE, "en", ENGLISH),
        "wmt22/wmttest2022.en-zh.all.xml": xml("en", ENGLISH, "zh", CHINESE),
    }
    for name, content in files.items():
        write(folder / name, content)
    return str(folder)


def xml(source: str, sources: tuple[str, str], target: str, targets: tuple[str, str]) -> str:
    """Of WMT22."""
    return XML.format(source=source, first=sources[0], second=sources[1], target=target, one=targets[0], two=targets[1])
