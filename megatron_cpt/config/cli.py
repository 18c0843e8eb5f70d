"""The command-line contract every tool keeps, in one place.

A tool's arguments are the fields of one frozen dataclass: `--config FILE.yaml`, dotted overrides (`--optimizer.lr 1e-5`),
`--print_config` and, by jsonargparse, `--help`; beside them `--log_level` and `--log_file` (utils/logs.py). Exit status:
0 done, 1 something went wrong by itself, 2 wrong usage or wrong input, 130 interrupted (Ctrl-C or SIGTERM).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import yaml

from megatron_cpt.config.fields import ConfigReader
from megatron_cpt.config.renamed import old_names, print_notes
from megatron_cpt.config.values import SEPARATOR
from megatron_cpt.utils.errors import InputError, InputErrors, ProcessDiedError, Refusals, RefusedValueError, RunError
from megatron_cpt.utils.input_files import shown
from megatron_cpt.utils.logs import LEVELS, ON_SCREEN, record_traceback, start_logs
from megatron_cpt.utils.redaction import redacted, secrets_of
from megatron_cpt.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Config = TypeVar("Config")
logger = logging.getLogger(__name__)

# Options that take no value.
SWITCHES = ("--help", "--print_config")
# Options of every tool that are no settings of what it does: they stand on the command line only, as `--print_config`.
LOG_OPTIONS = ("--log_level", "--log_file")
LONGEST_LINE = 2000  # of an error
LAUNCHER = {"RANK": (0, 10**9), "LOCAL_RANK": (0, 10**9), "WORLD_SIZE": (1, 10**9), "LOCAL_WORLD_SIZE": (1, 10**9)}
LAUNCHER |= {"MASTER_PORT": (1, 65535)}
PARTS_OF = (("RANK", "WORLD_SIZE", 1), ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", "WORLD_SIZE", 0))
RENDEZVOUS = {
    "RANK": "the number of this process",
    "MASTER_ADDR": "name or address of the first process's machine",
    "MASTER_PORT": "a free port there",
}
SECONDS_FOR_FIRST_RANK = 20.0  # processes of one node may differ by some seconds in their imports


def normalise(argv: Sequence[str], switches: Collection[str] = ()) -> list[str]:
    """Accept what Megatron users type: `--output-prefix P` (for `--output_prefix`), `--input a b`, a bare `--overwrite`.

    Several values after an option are joined with SEPARATOR. One of `switches` (options that are true or false) without a
    value becomes true; any other option without a value is left for the parser to refuse.
    """
    normalised: list[str] = []
    i = 0
    while i < len(argv):
        name, equals, value = argv[i].partition("=")
        i += 1
        if not name.startswith("--"):
            normalised.append(name + equals + value)
            continue
        name = "--" + name[2:].replace("-", "_")
        if equals or name + value in SWITCHES:
            normalised.append(name + equals + value)
            continue
        values = list(itertools.takewhile(is_value, argv[i:]))
        i += len(values)
        if len(values) > 1:
            normalised.append(f"{name}={SEPARATOR.join(values)}")
        elif values:
            normalised.append(f"{name}={values[0]}")
        else:
            normalised.append(f"{name}=true" if name in switches else name)
    return normalised


def switches_of(config_class: type, prefix: str = "--") -> set[str]:
    """The options of a configuration that are true or false, such as `--parallel.sequence_parallel`; by old names, too."""
    switches: set[str] = set()
    hints = get_type_hints(config_class)
    for name, kind in [*hints.items(), *((old, hints[name]) for old, name in old_names(config_class).items())]:
        if kind is bool:
            switches.add(prefix + name)
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            switches |= switches_of(kind, f"{prefix}{name}.")
    return switches


def is_value(word: str) -> bool:
    """Whether a word is no option: `-1`, `-inf` and `---` are values."""
    return re.match(r"--?[A-Za-z]", word) is None or re.fullmatch(r"-(inf|nan|infinity)", word, re.IGNORECASE) is not None


def read_arguments(
    config_class: type[Config], words: Sequence[str], description: str = "", check: Callable[[Config], object] | None = None
) -> Config:
    """The configuration that the words of a command line ask for, `--config FILE` among them; later ones win.

    `check`: gets it, whatever is wrong with it (see config/partial.py), to raise InputError for what is wrong with the files
    that it names.

    Raises:
        InputError: naming every field that is wrong or missing, the value found and the value expected
        SystemExit: with --help or --print_config, after what they print
    """
    words = normalise(words, switches_of(config_class))
    if "-h" in words or "--help" in words:
        make_parser(config_class, description).print_help()
        raise SystemExit(0)
    log_options, settings = apart(words)
    reader, only_shown = collect_arguments(config_class, settings), "--print_config" in words
    if not only_shown:
        with reader.refusals.noted():
            start_logs_as_asked(log_options)
    print_notes(reader.notes)
    if only_shown:
        print(yaml.safe_dump(reader.plain(), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    config: Config = reader.config()
    if check is not None:
        with reader.refusals.noted(), reader.located():
            check(config)
    reader.refusals.raise_any()
    return config


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words (see `normalise`) that say where messages go, and those that are settings."""
    log_options = [word for word in words if word.partition("=")[0] in LOG_OPTIONS]
    return log_options, [word for word in words if word not in log_options and word != "--print_config"]


def start_logs_as_asked(words: Sequence[str]) -> None:
    """`start_logs` with what the options say; without any it stays as it is.

    Raises:
        InputError: one has no value, or not one that it can have
    """
    if not words:
        return
    values, refusals = dict[str, str](), Refusals()
    for word in words:
        name, _, value = word.partition("=")
        if value:
            values[name] = value
        else:
            wanted = f"one of {', '.join(LEVELS)}" if name == "--log_level" else "a file to append to"
            refusals.add(InputError(f"{name} has no value; expected {wanted}"))
    with refusals.noted():
        start_logs(values.get("--log_level", "info"), values.get("--log_file"))
        command = redacted(shlex.join(sys.argv), secrets_of(os.environ))
        logger.info(f"megatron-cpt {__version__}: {command}", extra={ON_SCREEN: ""})  # which the user sees
    refusals.raise_any()


def collect_arguments(config_class: type, words: Sequence[str]) -> ConfigReader:
    """What the words (see `normalise`) give, with what is wrong in them, before sections and files are checked."""
    reader = ConfigReader(config_class)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            reader.refusals.add(InputError(f"{word} is no option; expected --NAME VALUE"))
        elif name == "--config":
            reader.file(value)
        else:
            reader.option(name[2:], value if equals else None)
    return reader


def make_parser(config_class: type, description: str) -> ArgumentParser:
    """What prints the help of a tool: the fields of `config_class` with the texts under them."""
    from jsonargparse import ArgumentParser, set_parsing_settings  # takes long to import, and only --help needs it

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument("--log_level", choices=LEVELS, default="info", help="Show messages of this level and above.")
    parser.add_argument("--log_file", metavar="FILE", help="Append messages to this file; rank N > 0 appends to FILE.rankN.")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise InputError for variables of a launcher (torchrun, srun) that are no numbers, or do not go together."""
    refusals, numbers = Refusals(), dict[str, int]()
    for name, (least, most) in LAUNCHER.items():
        value = environment.get(name)
        if value is None:
            continue
        if re.fullmatch(r"\d{1,9}", value, re.ASCII) and least <= int(value) <= most:
            numbers[name] = int(value)
        else:
            refusals.add(InputError(f"environment: {name} is {shown(value)}; expected a whole number, {least} to {most}"))
    for part, whole, least in PARTS_OF:
        if part in numbers and whole in numbers and numbers[part] + least > numbers[whole]:
            found = f"{part} is {numbers[part]} with {whole} {numbers[whole]}"
            refusals.add(InputError(f"environment: {found}; expected at most {numbers[whole] - least}"))
    refusals.raise_any()


def launched_world_size() -> int:
    """Number of processes that torchrun (or srun with its variables) started; 1 without a launcher."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:  # `check_environment` names it
        raise RefusedValueError from None


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Raise InputError where a process is one of several (WORLD_SIZE is given) but lacks its number, or where they meet."""
    if not environment.get("WORLD_SIZE"):
        return
    refusals = Refusals()
    for name, meaning in RENDEZVOUS.items():
        value = environment.get(name, "")
        # What is no number is named by `check_environment`
        if not value or (name == "MASTER_ADDR" and not re.fullmatch(r"[\w.:%-]+", value, re.ASCII)):
            found = f"is {shown(value)}" if value else "is missing"
            given = f"with WORLD_SIZE {environment['WORLD_SIZE']}"
            refusals.add(
                InputError(f"environment: {name} {found} {given}; expected {meaning}, or none of torchrun's variables")
            )
    refusals.raise_any()


def exit_on_input_error(call: Callable[[], Any]) -> None:
    """Call, print what comes back (the result's path). A usage or input error becomes exit status 2, with one line on stderr
    for each mistake (1 for what went wrong by itself: losses that are not finite, a process that was killed).

    Under torchrun every rank finds the same mistake at about the same time, and all are ended as soon as one exits. So the
    first rank of a node reports it, and the others wait to be ended; one that is not has found something of its own.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # the result's path, whatever bytes it is of
    if not sys.warnoptions:  # what libraries say to those who call them is nothing that a user can change
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
    start_logs()
    try:
        result = call()
    except (InputError, OSError, RunError, ProcessDiedError) as error:
        if _is_reported_by_another():
            time.sleep(SECONDS_FOR_FIRST_RANK)
        _exit_with(error)
    except KeyboardInterrupt as interrupt:
        logger.info(f"interrupted{f': {interrupt}' if str(interrupt) else ''}")
        sys.exit(130)
    except Exception:
        record_traceback(logger)
        raise
    if result is not None:
        print(result)


def _is_reported_by_another() -> bool:
    """Whether the first process of this node finds the same; not where the environment of this one is wrong."""
    try:
        check_environment(os.environ)
    except InputError:
        return False
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


def _exit_with(error: Exception) -> NoReturn:
    """End the process with a line for each mistake."""
    errors: Sequence[Exception] = error.errors if isinstance(error, InputErrors) else (error,)
    secrets = secrets_of(os.environ)
    lines = [_cut(redacted(" ".join(str(one).split()), secrets)) for one in errors]
    for line in lines:
        logger.error(line)
    tell_torchrun([f"error: {line}" for line in lines])
    sys.exit(1 if isinstance(error, (RunError, ProcessDiedError)) else 2)


def _cut(line: str) -> str:
    """A line as it may be shown: of a length, and without characters that would move the cursor of a terminal."""
    shown_line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return shown_line if len(shown_line) <= LONGEST_LINE else f"{shown_line[: LONGEST_LINE - 3]}..."


def tell_torchrun(lines: Sequence[str]) -> None:
    """Leave the lines where torchrun looks for the reason of a failure: its report then ends with them."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        facts = {"py_callstack": "\n".join(lines), "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": " ".join(lines), "extraInfo": facts}}, file)


Loaded = Callable[[Any], Any] | type | str
"""A function or class, or where it is: `module:name`, to be imported when it is needed."""


def load(what: Loaded) -> Any:
    """A function or class; while its modules are imported, which takes seconds where torch is among them, a line says so."""
    if not isinstance(what, str):
        return what
    module, name = what.split(":")
    with loading():
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Show a line on a terminal (a log has the tool's own lines soon) while the block runs."""
    shown_to = sys.stderr if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0" else None
    words = "loading ..."
    if shown_to:
        print(words, end="\r", file=shown_to, flush=True)
    try:
        yield
    finally:
        if shown_to:
            print(" " * len(words), end="\r", file=shown_to, flush=True)


def run_tool(
    main: Loaded,
    config_class: Loaded,
    description: str,
    argv: Sequence[str] | None = None,
    positional: str | None = None,
    joins: bool = False,
    check: Loaded | None = None,
) -> None:
    """Parse the command line, call `main(config)` and keep the contract of exit statuses.

    `positional`: the option that words before any option belong to. `joins`: the tool joins the processes that a launcher
    has started, unless it is told `check_only`. `check`: raises InputError for what is wrong with the files that a
    configuration names, before `main` is imported; it imports no torch, and gets a configuration with whatever is wrong with
    it (see config/partial.py), so that everything is named at once.
    """

    def call() -> Any:
        words = list(sys.argv[1:] if argv is None else argv)
        if positional and words and is_value(words[0]):
            words.insert(0, f"--{positional}")
        config = read_arguments(load(config_class), words, description, start_check(check, joins))
        return load(main)(config)

    exit_on_input_error(call)


def run_subcommands(commands: Mapping[str, tuple[Loaded, Loaded, Loaded]], description: str) -> None:
    """`run_tool` for a tool with several commands: {name: (function, class of its configuration, check)}."""

    def call() -> Any:
        words = sys.argv[1:]
        if words and words[0] in ("-h", "--help"):
            print(commands_help(commands, description))
            return None
        if not words or words[0] not in commands:
            found = f"command is {shown(words[0])}" if words else "the command is missing"
            raise InputError(f"{found}; expected {', '.join(commands)}")
        main, config_class, check = commands[words[0]]
        kind = load(config_class)
        config = read_arguments(kind, words[1:], first_line(kind), start_check(check))
        return load(main)(config)  # which may import torch

    exit_on_input_error(call)


def start_check(check: Loaded | None, joins: bool = False) -> Callable[[Any], None]:
    """The check of a start: what the launcher says, and what `check` (see `run_tool`) says of a configuration."""

    def checked(config: Any) -> None:
        refusals = Refusals()
        with refusals.noted():
            check_environment(os.environ)
        with refusals.noted():
            if joins and not getattr(config, "check_only", False):
                check_rendezvous(os.environ)
        with refusals.noted():
            if check is not None:
                load(check)(config)
        refusals.raise_any()

    return checked


def first_line(kind: type) -> str:
    """What a configuration says it is of."""
    return str(kind.__doc__).split("\n", 1)[0]


def commands_help(commands: Mapping[str, tuple[Loaded, Loaded, Loaded]], description: str) -> str:
    """What --help prints of a tool with several commands."""
    width = max(map(len, commands))
    lines = [f"{name:<{width}}  {first_line(load(kind))}" for name, (_, kind, _) in commands.items()]
    tool = os.path.basename(sys.argv[0])
    usage = f"usage: {tool} COMMAND OPTION..., and {tool} COMMAND --help for the options of a command"
    return "\n".join([usage, "", description, "", *(f"  {line}" for line in lines)])
