"""Limits for what a chat template does: it is a program of whoever made the model."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_cpt.utils.errors import InputError

# What a template may raise: Jinja's errors, or those of its expressions
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, SyntaxError)
MOST_SECONDS = 10.0  # of processor time, for one conversation
MOST_BYTES = 1 << 30  # beyond what the process has


class _OutOfTimeError(Exception):
    """A block took more time than it may."""


class _Generation(Extension):
    """{% generation %}, with which templates mark answers for transformers: a block of what is in it."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_jinja(where: str, text: str) -> None:
    """Raise InputError unless a chat template's text is one that transformers can render, whatever it makes of messages.

    Args:
        where: names its file
        text: Jinja with the tags that transformers knows
    """
    if not text.strip():
        raise InputError(f"{where} is empty; expected a Jinja template")
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    with within_limits(f"the chat template of {where}", text):
        try:
            environment.compile(text)
        except REFUSALS as error:
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            said = " ".join(str(getattr(error, "message", None) or error).split())[:300]
            raise InputError(f"{where} is no Jinja template: {line}{said}") from error


def limited(tokenizer: Any) -> contextlib.AbstractContextManager[None]:
    """`within_limits`, for the chat template that a tokenizer has."""
    return within_limits(f"the chat template of {tokenizer.name_or_path}", tokenizer.chat_template)


@contextlib.contextmanager
def within_limits(what: str, template: Any) -> Iterator[None]:
    """Let a block that reads or renders a chat template use MOST_SECONDS (in the main thread) and MOST_BYTES.

    Raises:
        InputError: it wanted more, or the template has powers, which can take hours where nothing can end them
    """
    if has_powers(template):
        raise InputError(f"{what} has the operator **; expected one without")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + MOST_BYTES
    allowed = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _out_of_time) if timed else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
        yield
    except _OutOfTimeError as error:
        raise InputError(f"{what} takes more than {MOST_SECONDS:g} seconds; expected one that ends") from error
    except MemoryError as error:
        raise InputError(f"{what} takes more than {MOST_BYTES >> 20} MiB of memory; expected one that takes less") from error
    except RecursionError as error:
        raise InputError(f"{what} has more blocks within each other than can be followed; expected fewer") from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def has_powers(template: Any) -> bool:
    """Whether a template's text uses the operator `**`."""
    return has_word(template, "operator", "**")


def has_word(template: Any, kind: str, word: str) -> bool:
    """Whether a template's text has an operator or a name outside of its comments and of what it writes as it is."""
    if not isinstance(template, str) or word not in template:
        return False
    try:
        return any((found, text) == (kind, word) for _, found, text in Environment().lex(template))
    except TemplateError:  # it will be refused where it is rendered
        return False


def _out_of_time(number: int, frame: Any) -> None:
    raise _OutOfTimeError


def _address_space() -> int:
    """Bytes of addresses that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
