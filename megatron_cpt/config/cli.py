"""The command-line contract every tool keeps, in one place.

A tool's arguments are the fields of one frozen dataclass. jsonargparse gives `--help`, `--config FILE.yaml`, dotted
overrides (`--optimizer.lr 1e-5`) and `--print_config` from it. Exit status:
0 done, 1 something went wrong by itself, 2 wrong usage or wrong input, 130 interrupted (Ctrl-C or SIGTERM).
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from megatron_cpt.errors import InputError, ProcessDiedError, RunError
from megatron_cpt.redaction import redacted, secrets_of

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the text under a field is its --help


# Options that take no value.
SWITCHES = ("--help", "--print_config", "--print_config=comments")
SECONDS_FOR_FIRST_RANK = 20.0  # processes of one node may differ by some seconds in their imports


def normalise(argv: Sequence[str], switches: Collection[str] = ()) -> list[str]:
    """Accept what Megatron users type: `--output-prefix P` (for `--output_prefix`), `--input a b`, a bare `--overwrite`.

    Several values after an option become a list. One of `switches` (options that are true or false) without a value
    becomes true; any other option without a value is left for the parser to refuse.
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
            normalised.append(f"{name}={json.dumps(values)}")
        elif values:
            normalised.append(f"{name}={values[0]}")
        else:
            normalised.append(f"{name}=true" if name in switches else name)
    return normalised


def switches_of(config_class: type, prefix: str = "--") -> set[str]:
    """The options of a configuration that are true or false, such as `--parallel.sequence_parallel`."""
    switches: set[str] = set()
    for name, kind in get_type_hints(config_class).items():
        if kind is bool:
            switches.add(prefix + name)
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            switches |= switches_of(kind, f"{prefix}{name}.")
    return switches


def is_value(word: str) -> bool:
    """Whether a word is no option: `-1`, `-inf` and `---` are values."""
    return re.match(r"--?[A-Za-z]", word) is None or re.fullmatch(r"-(inf|nan|infinity)", word, re.IGNORECASE) is not None


def make_parser(config_class: type, description: str) -> ArgumentParser:
    """A parser whose arguments are the fields of `config_class`."""
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def build(parser: ArgumentParser, config_class: type[Config], namespace: Namespace) -> Config:
    """Parsed arguments -> an instance of `config_class`."""
    values = parser.instantiate_classes(namespace).as_dict()
    return config_class(**{name: value for name, value in values.items() if name != "config"})


def exit_on_input_error(call: Callable[[], Any]) -> None:
    """Call, print what comes back (the result's path); a usage or input error becomes one line on stderr and exit status 2
    (1 for what went wrong by itself: losses that are not finite, a process that was killed).

    Under torchrun every rank finds the same mistake at about the same time, and all are ended as soon as one exits. So the
    first rank of a node reports it, and the others wait to be ended; one that is not has found something of its own.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, io.StringIO())
    if not sys.warnoptions:  # what libraries say to those who call them is nothing that a user can change
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
    try:
        result = call()
    except (InputError, ArgumentError, OSError, RunError, ProcessDiedError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_FOR_FIRST_RANK)
        print(f"error: {redacted(' '.join(str(error).split()), secrets_of(os.environ))}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, (RunError, ProcessDiedError)) else 2)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr, flush=True)
        sys.exit(130)
    if result is not None:
        print(result)


def run_tool(
    main: Callable[[Any], Any],
    config_class: type,
    description: str,
    argv: Sequence[str] | None = None,
    positional: str | None = None,
) -> None:
    """Parse the command line, call `main(config)` and keep the contract of exit statuses.

    `positional`: the option that words before any option belong to.
    """

    def call() -> Any:
        parser = make_parser(config_class, description)
        words = list(sys.argv[1:] if argv is None else argv)
        if positional and words and is_value(words[0]):
            words.insert(0, f"--{positional}")
        namespace = parser.parse_args(normalise(words, switches_of(config_class)))
        return main(build(parser, config_class, namespace))

    exit_on_input_error(call)


def run_subcommands(commands: dict[str, tuple[Callable[[Any], Any], type]], description: str) -> None:
    """`run_tool` for a tool with several commands: {name: (function, class of its configuration)}."""

    def call() -> Any:
        parser = ArgumentParser(description=description, exit_on_error=False)
        subcommands = parser.add_subcommands(dest="command")
        parsers = {
            name: make_parser(config_class, str(config_class.__doc__).split("\n", 1)[0])
            for name, (_, config_class) in commands.items()
        }
        for name, subparser in parsers.items():
            subcommands.add_subcommand(name, subparser, help=subparser.description)
        switches = set().union(*(switches_of(config_class) for _, config_class in commands.values()))
        namespace = parser.parse_args(normalise(sys.argv[1:], switches))
        main, config_class = commands[namespace.command]
        return main(build(parsers[namespace.command], config_class, namespace[namespace.command]))

    exit_on_input_error(call)
