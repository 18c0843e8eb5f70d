"""The errors a user is meant to see without a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
from collections.abc import Iterator, Sequence


def if_on_the_hub(path: str) -> str:
    """What to do about a folder that is not there whose name could be that of a model on the Hugging Face hub; or ""."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        return ""
    folder = path.split("/")[1]
    return f"; if it is a model on the Hugging Face hub, get it first: hf download {path} --local-dir {folder}"


def said_by_system(error: Exception) -> str:
    """The file that an OSError is about, and what is wrong with it; of other errors their text."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


class InputError(ValueError):
    """Something the user gave (a file, a field, a layout) is wrong.

    The message names the file or field, the value found and the value expected. Tools print it as one line on stderr and
    exit with status 2; it is raised before any process group starts.
    """


class FieldError(InputError):
    """The value of one field is wrong whatever the others are: nothing that depends on it can be checked."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class InputErrors(InputError):
    """Several things are wrong with what the user gave. Tools print one line for each."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = tuple(errors)


class RefusedValueError(Exception):
    """Somebody reads a value that was refused already (see config/partial.py): what it is for cannot be checked."""


class Refusals:
    """Collects what is wrong in checks that do not depend on each other, so that a user learns of all of it at once."""

    def __init__(self) -> None:
        self.errors: list[InputError] = []

    def add(self, error: InputError) -> None:
        """One more; of several each counts, and what is known already does not."""
        for one in error.errors if isinstance(error, InputErrors) else (error,):
            if str(one) not in map(str, self.errors):
                self.errors.append(one)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note an InputError of the block, and go on behind it; so with what the system says of a file (no rights to it).

        A block that reads a value which was refused ends there: nothing can be said, and the value was named already.
        """
        try:
            yield
        except RefusedValueError:
            pass
        except InputError as error:
            self.add(error)
        except OSError as error:
            self.add(InputError(said_by_system(error)))

    def raise_any(self) -> None:
        """Raise what was noted, if anything was."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise InputErrors(self.errors)


class SharedInputError(InputError):
    """An InputError that all ranks of a run raise together, when the process groups are there: a damaged checkpoint."""


class ProcessDiedError(RuntimeError):
    """A helper process ended by itself: killed, or out of memory. Tools print it as one line and exit with status 1."""


class StopRequestedError(Exception):
    """The run is asked to stop and what was under way has been given up; nothing has changed."""


class RunError(RuntimeError):
    """A run cannot go on, though nothing is wrong with its input; all ranks know. One line, exit status 1."""


def brief(value: object) -> str:
    """A value from somebody's file for a message: short and at once, whatever it is (10^400, a list in a list in a list)."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 120
    return shortened.repr(value)
