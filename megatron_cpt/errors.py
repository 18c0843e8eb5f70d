"""The one error a user is meant to see without a traceback."""

import re
import reprlib


def if_on_the_hub(path: str) -> str:
    """What to do about a folder that is not there whose name could be that of a model on the Hugging Face hub; or ""."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        return ""
    folder = path.split("/")[1]
    return f"; if it is a model on the Hugging Face hub, get it first: hf download {path} --local-dir {folder}"


class InputError(ValueError):
    """Something the user gave (a file, a field, a layout) is wrong.

    The message names the file or field, the value found and the value wanted. Tools print it as one line on stderr and
    exit with status 2; it is raised before any process group starts.
    """


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
