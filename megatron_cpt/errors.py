"""The one error a user is meant to see without a traceback."""


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
