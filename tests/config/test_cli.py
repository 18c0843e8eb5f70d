"""The command-line contract: what may be typed, what comes back, and how mistakes are reported."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import cli
from megatron_cpt.config.cli import normalise, run_subcommands, run_tool
from megatron_cpt.config.run import RunConfig
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class Inner:
    """Part of a configuration."""

    lr: float = 1e-5
    """Learning rate."""
    steps: int | None = None
    """Steps."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"inner.lr is {self.lr}; expected a number above 0")


@dataclass(frozen=True)
class Config:
    """A tool's configuration."""

    output_prefix: str
    """Where to write."""
    input: list[str] | str = "default"
    """What to read."""
    overwrite: bool = False
    """Replace what is there."""
    inner: Inner = field(default_factory=Inner)


def run(argv: Sequence[str]) -> Config:
    """The configuration that a tool's main function gets."""
    received: list[Config] = []
    run_tool(received.append, Config, "A tool.", argv)
    (config,) = received
    return config


def fail(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a tool that must refuse its command line."""
    with pytest.raises(SystemExit) as stopped:
        run(argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ([], []),
        (["--output-prefix", "p"], ["--output_prefix=p"]),
        (["--output_prefix", "p"], ["--output_prefix=p"]),
        (["--output-prefix=a-b"], ["--output_prefix=a-b"]),
        (["--a-b.c-d", "x-y"], ["--a_b.c_d=x-y"]),
        (["--input", "a", "b"], ["--input=a\0b"]),
        (["--input", "a b", 'c"d'], ['--input=a b\0c"d']),
        (["--overwrite"], ["--overwrite=true"]),
        (["--overwrite", "--x", "1"], ["--overwrite=true", "--x=1"]),
        (["--overwrite", "false"], ["--overwrite=false"]),
        (["--lr", "-1e-5"], ["--lr=-1e-5"]),
        (["--lr", "-inf", "--x", "-3"], ["--lr=-inf", "--x=-3"]),
        (["--range", "-1", "-.5"], ["--range=-1\0-.5"]),
        (["--x=1=2"], ["--x=1=2"]),
        (["--x", "a=b"], ["--x=a=b"]),
        (["--x="], ["--x="]),
        (["--x", ""], ["--x="]),
        (["--input=a", "--y", "b"], ["--input=a", "--y=b"]),
        (["--help"], ["--help"]),
        (["-h"], ["-h"]),
        (["--x", "-h"], ["--x", "-h"]),
        (["--overwrite", "-h"], ["--overwrite=true", "-h"]),
        (["--x", "--y", "1"], ["--x", "--y=1"]),  # left for the parser to refuse
        (["--print-config"], ["--print_config"]),
        (["--print_config", "--x", "1"], ["--print_config", "--x=1"]),
        (["--print_config=skip_default"], ["--print_config=skip_default"]),
        (["hf-to-megatron", "--hf", "a-b"], ["hf-to-megatron", "--hf=a-b"]),
    ],
)
def test_normalise(typed: list[str], wanted: list[str]) -> None:
    assert normalise(typed, {"--overwrite"}) == wanted


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda word: not word.startswith("-")
)


@given(values=st.lists(st.lists(st.one_of(WORDS, st.floats(allow_nan=False).map(str)), max_size=4), max_size=4))
def test_values_survive(values: list[list[str]]) -> None:
    argv = [word for i, words in enumerate(values) for word in (f"--option-{i}", *words)]
    switches = [f"--option_{i}" for i in range(len(values))]
    parsed = dict(word.split("=", 1) for word in normalise(argv, switches))
    assert list(parsed) == [f"--option_{i}" for i in range(len(values))]
    for words, found in zip(values, parsed.values(), strict=True):
        if len(words) > 1:
            assert found.split("\0") == words
        else:
            assert found == (words[0] if words else "true")


def test_defaults() -> None:
    assert run(["--output_prefix", "p"]) == Config("p")


def test_types_of_values() -> None:
    argv = ["--output-prefix", "5", "--input", "a", "b", "--overwrite", "--inner.lr", "1e-3", "--inner.steps", "7"]
    assert run(argv) == Config("5", ["a", "b"], True, Inner(1e-3, 7))
    assert run(["--output-prefix", "p", "--input", "one", "--inner.steps", "null"]) == Config("p", "one")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("[a, b]", ["a", "b"]),
        ("[]", []),
        ("[ab]*.jsonl", "[ab]*.jsonl"),
        ("[1].jsonl", "[1].jsonl"),
        ("[a]: b", "[a]: b"),
        ("{a,b}.jsonl", "{a,b}.jsonl"),
        ("{a: b}", "{a: b}"),
        ("[a", "[a"),
    ],
)
def test_names_that_begin_as_a_list(typed: str, found: list[str] | str) -> None:
    """A glob may begin so."""
    assert run(["--output-prefix", "p", "--input", typed]).input == found


def test_several_values_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(["--output-prefix", "a", "b"], capsys) == "error: output_prefix is ['a', 'b']; expected text\n"


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output_prefix: from_file\ninput: [x, y]\ninner:\n  lr: 1e-4\n  steps: 3\n")
    assert run(["--config", str(file)]) == Config("from_file", ["x", "y"], False, Inner(1e-4, 3))
    changed = run(["--config", str(file), "--inner.lr", "2e-4", "--overwrite"])
    assert changed == Config("from_file", ["x", "y"], True, Inner(2e-4, 3))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output_prefix", "p", "--nonsense", "3"], ["--nonsense is unknown"]),
        (["--output_prefix", "p", "--inner.learning-rate", "3"], ["learning_rate"]),
        ([], ["output_prefix is missing; expected text"]),
        (["--output_prefix", "p", "--inner.lr", "fast"], ["inner.lr", "fast"]),
        (["--output_prefix", "p", "--inner.steps", "1.5"], ["inner.steps", "1.5"]),
        (["--output_prefix", "p", "--overwrite", "maybe"], ["overwrite", "maybe"]),
        (["--config", "/not/there.yaml"], ["config", "/not/there.yaml"]),
        (["stray", "--output_prefix", "p"], ["stray"]),
        (["--output_prefix", "p", "--inner.lr", "-1"], ["inner.lr is -1.0; expected a number above 0"]),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail(argv, capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "word"),
    [("output_prefix: p\nnonsense: 3\n", "nonsense"), ("a: b: c\n", "config"), ("output_prefix: p\ninner: {lr: x}\n", "lr")],
)
def test_mistakes_in_the_file(tmp_path: Path, content: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert word in fail(["--config", str(file)], capsys)


def refuse(config: Config) -> None:
    raise InputError(f"{config.output_prefix} is\nnot good")


def test_an_input_error_of_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_tool(refuse, Config, "A tool.", ["--output_prefix", "p"])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "error: p is not good\n")


@pytest.mark.parametrize("argv", [["--output_prefix", "p"], ["--output_prefix"]])
def test_other_ranks_leave_it_to_the_first(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends all processes when one exits: were it a silent one, nobody would learn why."""

    def ended(seconds: float) -> None:
        assert seconds >= 10
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", ended)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(KeyboardInterrupt):
        run_tool(refuse, Config, "A tool.", argv)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        run_tool(refuse, Config, "A tool.", argv)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_that_only_another_rank_finds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        run_tool(refuse, Config, "A tool.", ["--output_prefix", "p"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: p is not good\n"


ADDRESS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = ADDRESS | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@dataclass(frozen=True)
class Joining:
    """Settings of a tool that joins other processes."""

    check_only: bool = False


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a tool that joins others in an environment, and says what the tool's own code returned."""

    def run(environment: dict[str, str], *words: str) -> str:
        for name in (*cli.LAUNCHER, *cli.RENDEZVOUS):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cli.time, "sleep", lambda seconds: pytest.fail("waited for the first rank"))
        run_tool(lambda config: "ran", Joining, "A tool.", list(words), joins=True)
        return "ran"

    return run


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"RANK": "2"}, ["RANK is 2 with WORLD_SIZE 2; expected at most 1"]),
        ({"RANK": "two", "WORLD_SIZE": "0"}, ["RANK is 'two'; expected a whole", "WORLD_SIZE is '0'; expected a whole"]),
        ({"RANK": "-1"}, ["RANK is '-1'; expected a whole number, 0 to"]),
        ({"RANK": "\u0661"}, ["RANK is '\u0661'; expected a whole number, 0 to"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE is ''; expected a whole number, 1 to"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK is 2 with LOCAL_WORLD_SIZE 2; expected at most 1"]),
        ({"LOCAL_RANK": "abc"}, ["LOCAL_RANK is 'abc'; expected a whole number, 0 to"]),
        ({"LOCAL_WORLD_SIZE": "3"}, ["LOCAL_WORLD_SIZE is 3 with WORLD_SIZE 2; expected at most 2"]),
        ({"MASTER_PORT": "abc"}, ["MASTER_PORT is 'abc'; expected a whole number, 1 to 65535"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT is '65536'; expected a whole number, 1 to 65535"]),
        ({"MASTER_PORT": None}, ["MASTER_PORT is missing with WORLD_SIZE 2; expected a free port there, or none"]),
        ({"MASTER_ADDR": "a b"}, ["MASTER_ADDR is 'a b' with WORLD_SIZE 2; expected name or address"]),
        ({"RANK": None, "MASTER_ADDR": None}, ["RANK is missing with WORLD_SIZE 2", "MASTER_ADDR is missing"]),
    ],
)
def test_what_a_launcher_says_is_checked(
    changes: dict[str, str | None], lines: list[str], launched: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by torch, after half a minute and with a traceback."""
    environment = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(SystemExit) as stopped:
        launched(environment)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == len(lines)
    for found, said in zip(captured.err.splitlines(), lines, strict=True):
        assert found.startswith(f"error: environment: {said}")


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "LOCAL_RANK": "0"}, ADDRESS, TORCHRUN])
def test_environments_that_will_do(environment: dict[str, str], launched: Callable[..., str]) -> None:
    assert launched(environment) == "ran"


def test_a_check_joins_nobody(launched: Callable[..., str]) -> None:
    assert launched({"WORLD_SIZE": "8"}, "--check_only") == "ran"


def test_the_tools_that_join_others_say_so() -> None:
    tools = Path(__file__).parents[2] / "tools"
    joining = {path.stem for path in tools.glob("*.py") if "joins=True" in path.read_text()}
    assert joining == {"pretrain_cpt", "finetune_sft", "finetune_dpo", "check_cluster"}


def test_other_errors_keep_their_traceback() -> None:
    """A ValueError that is not an InputError is our mistake, not the user's."""
    with pytest.raises(ValueError, match="bug"):
        run_tool(lambda config: (_ for _ in ()).throw(ValueError("bug")), Config, "A tool.", ["--output_prefix", "p"])


def test_the_result_is_printed_last(capsys: pytest.CaptureFixture[str]) -> None:
    run_tool(lambda config: config.output_prefix + ".json", Config, "A tool.", ["--output_prefix", "p"])
    assert capsys.readouterr().out == "p.json\n"
    run_tool(lambda config: None, Config, "A tool.", ["--output_prefix", "p"])
    assert capsys.readouterr().out == ""


def printed_config(config_class: type, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_tool(lambda config: pytest.fail("ran"), config_class, "A tool.", [*argv, "--print_config"])
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_print_config_feeds_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--output-prefix", "p", "--input", "a", "b", "--inner.lr", "3e-7", "--overwrite"]
    file = tmp_path / "printed.yaml"
    file.write_text(printed_config(Config, argv, capsys))
    assert run(["--config", str(file)]) == run(argv) == Config("p", ["a", "b"], True, Inner(3e-7))


def test_print_config_of_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--mixture", "m.yaml", "--checkpoint.load", "a", "--checkpoint.save", "b", "--training.train_iters", "9"]
    argv += ["--parallel.tensor-model-parallel-size", "2", "--parallel.sequence_parallel", "--optimizer.lr", "1e-5"]
    file = tmp_path / "printed.yaml"
    file.write_text(printed_config(RunConfig, argv, capsys))
    received: list[RunConfig] = []
    for arguments in (argv, ["--config", str(file)]):
        run_tool(received.append, RunConfig, "A tool.", arguments)
    assert received[0] == received[1]
    assert received[0].parallel.sequence_parallel
    assert yaml.safe_load(file.read_text())["optimizer"]["weight_decay"] == received[0].optimizer.weight_decay


def test_help_has_the_texts_under_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for text in ("A tool.", "--output_prefix", "Where to write.", "--inner.lr", "Learning rate."):
        assert text in out


@dataclass(frozen=True)
class Add:
    """Add something.

    More about it.
    """

    amount: int
    """How much."""

    def __post_init__(self) -> None:
        if self.amount < 0:
            raise InputError(f"amount is {self.amount}; expected 0 or more")


def subcommand(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool.py", *argv])
    commands = {"add-up": (lambda config: config.amount * 2, Add), "other": (lambda config: None, Config)}
    run_subcommands({name: (*command, lambda config: None) for name, command in commands.items()}, "A tool.")


def test_subcommands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    subcommand(["add-up", "--amount", "21"], monkeypatch)
    assert capsys.readouterr().out == "42\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["add-up", "other"]),
        (["add"], ["add", "add-up", "other"]),
        (["add-up"], ["amount is missing; expected a whole number"]),
        (["add-up", "--amount", "much"], ["amount", "much"]),
        (["add-up", "--amount", "-1"], ["amount is -1; expected 0 or more"]),
        (["add-up", "--amount", "1", "--nonsense", "2"], ["--nonsense is unknown"]),
    ],
)
def test_mistakes_with_subcommands(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        subcommand(argv, monkeypatch)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert all(word in captured.err for word in words), captured.err


def test_a_setting_within_one_that_has_none() -> None:
    tool = Path(__file__).parents[2] / "tools" / "finetune_sft.py"
    words = ["--data.sources.0.path", "a.json", "--model", "m", "--save", "s"]
    result = subprocess.run([sys.executable, str(tool), *words], capture_output=True, text=True, timeout=120)
    wanted = "error: --data.sources.0.path: data.sources has no settings within it; expected --data.sources VALUE"
    assert wanted in result.stderr.splitlines()


def test_a_null_character_in_a_text(tmp_path: Path) -> None:
    """As YAML writes it; a name of a file with one was a traceback."""
    tool = Path(__file__).parents[2] / "tools" / "finetune_sft.py"
    (tmp_path / "sft.yaml").write_text('model: m\nsave: s\ndata: {sources: [{path: "a\\0b", language: en}]}\n')
    words = ["--config", "sft.yaml", "--optimizer.lr", "3"]
    result = subprocess.run([sys.executable, str(tool), *words], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 2
    assert r"error: sft.yaml: data.sources[0].path is 'a\x00b'; expected text" in result.stderr.splitlines()


def test_a_tool_in_its_own_process() -> None:
    """`argv` is sys.argv by default, and the shell sees the exit status."""
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    result = subprocess.run([sys.executable, str(tool), "--nonsense", "1"], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    unknown, *missing = result.stderr.splitlines()
    assert unknown.startswith("error: --nonsense is unknown; expected one of input, ")
    names = ("input", "tokenizer", "output_prefix", "language")
    assert [line.split(";")[0] for line in missing] == [f"error: {name} is missing" for name in names]


@pytest.mark.parametrize("options", [[], ["-W", "default"]])
def test_what_libraries_say_to_programmers_is_hidden(options: list[str]) -> None:
    """As transformers does of its next version; whoever asks Python for warnings gets them."""
    code = (
        "import dataclasses, warnings\nfrom megatron_cpt.config.cli import run_tool\n"
        "Config = dataclasses.make_dataclass('Config', [('x', int, 1)], frozen=True)\n"
        "run_tool(lambda config: warnings.warn('gone in version 6', FutureWarning), Config, 'A tool.', [])"
    )
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ("gone in version 6" in done.stderr) == bool(options)


def test_a_result_whose_name_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are printed, as ls does: Python refuses in most locales."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", "strict"))
    run_tool(lambda config: config.output_prefix, Config, "A tool.", ["--output_prefix", os.fsdecode(b"a\xff")])
    sys.stdout.flush()
    assert printed.getvalue() == b"a\xff\n"
