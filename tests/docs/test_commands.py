"""Every command of the documentation: run here, run by another test, or marked with the reason why not; and all its options
exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, REASONS, SHELL, Block, blocks, prose
from tiny_models import ROOT, make_tiny_llama

from megatron_cpt.config.cli import LOG_OPTIONS

BASH = [block for page in PAGES for block in blocks(page) if block.language == "bash"]


@pytest.mark.parametrize("block", BASH, ids=str)
def test_every_block_of_commands_is_marked(block: Block) -> None:
    if block.mark.startswith("run by "):
        check_run_by(block)
    elif block.mark != "test":
        wanted = f"a mark above it: test, run by FILE, or not run: one of {', '.join(REASONS)}"
        assert block.mark.startswith(tuple(f"not run: {reason}" for reason in REASONS)), wanted
    for name in re.findall(r"tests/[\w/]+\.py", block.mark):
        assert (ROOT / name).exists()


def check_run_by(block: Block) -> None:
    """Each command's tool, or what that tool imports from us, is named in one of the tests."""
    tests = [(ROOT / name).read_text() for name in block.mark.removeprefix("run by ").split()]
    for command in block.commands():
        module = re.search(r"-m (megatron_cpt[\w.]+)", command)
        tool = re.search(r"tools/\w+\.py", command)
        assert module or tool, command
        names = [module[1]] if module else [Path(tool[0]).name, *imported(ROOT / tool[0])] if tool else []
        assert any(name in test for name in names for test in tests), f"{command}: none of {names}"


def imported(tool: Path) -> list[str]:
    """Functions and classes of ours that a tool imports or names (`"module:name"`), `run_tool` and the like left out."""
    nodes = [*ast.walk(ast.parse(tool.read_text()))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module != "megatron_cpt.config.cli"]
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    named = [match[1] for text in texts if (match := re.fullmatch(r"megatron_cpt[\w.]+:(\w+)", text))]
    return [f"{name}(" for name in [*(alias.name for node in imports for alias in node.names), *named]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fenced_blocks_that_say_bash(page: Path) -> None:
    for block in blocks(page):
        assert block.language, f"{block}: a block of no language"
        if block.language not in ("bash", "text"):
            assert not any(SHELL.match(line) for line in block.text.splitlines()), f"{block}: commands in {block.language}"
    for line in prose(page).splitlines():
        assert not (line.startswith("    ") and SHELL.match(line.strip())), f"{page.name}: {line}"


def test_the_yaml_and_json_of_the_pages_can_be_read() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language in ("yaml", "json")]
    for block in found:
        assert yaml.safe_load(block.text) is not None, str(block)


@pytest.fixture(scope="module")
def options() -> dict[str, list[str]]:
    """Of every tool, and every command of a tool that has some."""
    program = str(Path(__file__).with_name("options.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


GENERAL = {"config", "help", "print_config", *(name.removeprefix("--") for name in LOG_OPTIONS)}


def test_all_tools_and_options_in_commands_exist(options: dict[str, list[str]]) -> None:
    checked = 0
    for block in BASH:
        for command in block.commands():
            for words in re.findall(r"tools/(\w+\.py[^;|&']*(?:'[^']*'[^;|&']*)*)", command):
                tool, *rest = words.split()
                commands = [name.split()[1] for name in options if name.startswith(f"{tool} ")]
                key = f"{tool} {rest[0]}" if commands else tool
                assert key in options, f"{block}: {tool} has no command {rest[0]}; it has {', '.join(commands)}"
                for word in re.findall(r"(?<= )--([A-Za-z][\w.-]*)", " " + words):
                    assert word.replace("-", "_") in {*options[key], *GENERAL}, f"{block}: {key} has no option --{word}"
                    checked += 1
    assert checked > 50


# Options of other programs that the text speaks of.
OTHERS = {
    "num_processes",
    "num_machines",
    "nproc_per_node",
    "append_eod",  # Megatron-LM
    "no_build_isolation",  # pip
    "NAME",  # of the message that says what an option looks like
    "split_sentences",
    "requeue",  # sbatch
    "include_path",
    "model",
    "model_args",
    "index_url",
    "exit_signal_handler",
    "editable",
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "migrating.md"], ids=lambda page: page.name)
def test_all_options_in_the_text_exist_in_some_tool(page: Path, options: dict[str, list[str]]) -> None:
    known = {name for names in options.values() for name in names} | OTHERS | GENERAL
    megatron = {"train_data_path", "data_path", "split", "train_samples", "train_iters", "global_batch_size"}
    if page.name == "sampling.md":
        known |= megatron  # of Megatron-LM
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", code):
            assert word.replace("-", "_") in known, f"{page.name}: `{code}`"


def fields(content: Any, prefix: str, known: list[str]) -> list[str]:
    """Dotted names of the fields of YAML, down to those that have no fields of their own."""
    if isinstance(content, list):
        return [name for item in content for name in fields(item, prefix, known)]
    if not isinstance(content, dict) or (prefix and not any(name.startswith(prefix) for name in known)):
        return []  # a value, or a dictionary with names of the user's
    return [name for key, value in content.items() for name in (f"{prefix}{key}", *fields(value, f"{prefix}{key}.", known))]


SETTINGS = [block for page in PAGES for block in blocks(page) if block.language == "yaml" and page.parent != ROOT]


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_settings_in_yaml_exist(block: Block, options: dict[str, list[str]]) -> None:
    if block.mark != "a mixture":  # the commands of that page read it
        assert block.mark.startswith("settings of "), "wanted a mark above it: settings of TOOL, or a mixture"
        known = options[block.mark.removeprefix("settings of ")]
        found = fields(yaml.safe_load(block.text), "", known)
        assert found
        assert set(found) <= set(known)


def lines_of(language: str, count: int, seed: int = 0) -> str:
    """JSON lines; documents that filters of web text keep are not needed here."""
    text = {"en": "The quick brown fox jumps over the lazy dog. ", "zh": "今天天气很好，我们去公园散步。"}[language]
    rows = ({"text": f"{seed + i} " + text * (20 + (seed + i) % 7)} for i in range(count))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def preprocess(folder: Path, name: str, language: str, seed: int) -> None:
    """A corpus data/NAME of some 10,000 tokens."""
    from megatron_cpt.corpus.preprocess import PreprocessConfig
    from megatron_cpt.corpus.preprocess import preprocess as run

    source = folder / "sources" / f"{name}.jsonl"
    source.parent.mkdir(exist_ok=True)
    source.write_text(lines_of(language, 40, seed), encoding="utf-8")
    tokenizer = str(folder / "Meta-Llama-3-8B")
    run(
        PreprocessConfig(
            input=str(source), tokenizer=tokenizer, output_prefix=f"{folder}/data/{name}", language=language, workers=1
        )
    )


def prepare_preprocessing(folder: Path, tokenizer: str) -> None:
    import zstandard

    (folder / "raw/zh").mkdir(parents=True)
    for i in range(2):
        content = lines_of("zh", 200, 1000 * i).encode()
        (folder / f"raw/zh/{i}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    preprocess(folder, "code", "en", 0)


def prepare_curation(folder: Path, tokenizer: str) -> None:
    pytest.importorskip("datatrove", reason="needs the extra `curate`")
    from curated_texts import CHINESE, ENGLISH, document

    (folder / "raw").mkdir()
    rows = [{"text": document(words, seed)} for words in (ENGLISH, CHINESE) for seed in range(4)]
    (folder / "raw/web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_conversion(folder: Path, tokenizer: str) -> None:
    from transformers import AutoTokenizer

    make_tiny_llama(folder / "Llama-3.1-8B", tokenizer)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/run").symlink_to("start")
    larger = AutoTokenizer.from_pretrained(tokenizer)
    larger.add_tokens(["公园"])
    larger.save_pretrained(folder / "larger_tokenizer")
    (folder / "tokens.txt").write_text("散步\n", encoding="utf-8")


def prepare_mixture(folder: Path, tokenizer: str) -> None:
    languages = ("en", "en", "en", "zh", "zh", "zh", "en")
    names = ("en_wiki", "python", "cpp", "zh_news", "zh_web", "zh_valid", "en_valid")
    for seed, (name, language) in enumerate(zip(names, languages, strict=True)):
        preprocess(folder, name, language, 1000 * seed)
    text = next(block.text for block in blocks(ROOT / "docs/mixture.md") if block.language == "yaml")
    # Corpora of a test are small: budgets of thousands of tokens instead of billions.
    small = text.replace("2B", "20k").replace("tokens: 20B", "tokens: 50k").replace("max_epochs: 4", "max_epochs: 1_000_000")
    (folder / "mixture.yaml").write_text(small.replace("seq_length: 2048", "seq_length: 256"), encoding="utf-8")


PREPARE: dict[str, Callable[[Path, str], None]] = {
    "preprocessing.md": prepare_preprocessing,
    "curation.md": prepare_curation,
    "conversion.md": prepare_conversion,
    "mixture.md": prepare_mixture,
}
RUN = sorted(
    {block.page.name for block in BASH if block.mark == "test"} - {"getting_started.md"}
)  # which has a test of its own


@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page(name: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "Meta-Llama-3-8B")
    PREPARE.get(name, lambda folder, tokenizer: None)(tmp_path, tiny_tokenizer_dir)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    for block in BASH:
        if block.page.name == name and block.mark == "test":
            for command in block.commands():
                result = subprocess.run(
                    ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
                )
                assert result.returncode == 0, f"{block}: {command}\n{result.stderr[-4000:]}"
