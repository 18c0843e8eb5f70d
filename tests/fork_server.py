"""The server of forked_python.py: imports what a kind of tools needs, then forks a process for each client that calls."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from forked_python import IMPORTS, kind_of
from forked_python import __file__ as CLIENT

TESTS = Path(__file__).parent
# What is forked has these; a test that wants others runs the real Python.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@cache
def forked_python(tool: str) -> str:
    """The executable to call instead of `sys.executable` for this tool (or module); its server is started with the first."""
    folder = folder_of_servers()
    start_server(kind_of(tool), folder)
    return str(folder / "python")


@cache
def folder_of_servers() -> Path:
    """The executable, what the servers' environment is, and their sockets."""
    folder = Path(tempfile.mkdtemp(prefix="forks-", dir="/tmp"))  # a socket's path has 107 characters at most
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "environment.json").write_text(json.dumps(os.environ | ENVIRONMENT))
    executable = folder / "python"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ISs "{CLIENT}" "{folder}" "{sys.executable}" "$@"\n')
    executable.chmod(0o755)
    return folder


@cache
def start_server(kind: str, folder: Path) -> None:
    """Begin a server of this kind, which ends with this process: it is no child of it, but reads from its pipe."""
    command = [sys.executable, __file__, kind, str(folder)]
    environment = os.environ | ENVIRONMENT
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, start_new_session=True, **piped)
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.stdin.close)
    assert server.stdout.readline() == "ready\n", f"the server of {kind} tools did not start"
    server.wait()


def serve(kind: str, folder: Path) -> None:
    """Answer clients until the process that started this one ends."""
    for name in IMPORTS[kind].split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each collection in a forked process writes to, and so copies, all that was imported
    selector = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / kind))
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ, ("call", None, 0))
        selector.register(0, selectors.EVENT_READ, ("end", None, 0))
        print("ready", flush=True)
        while True:
            (key, _), *_ = selector.select()  # one at a time: it may undo what another is about
            what, client, pid = key.data
            if what == "end":
                end_all(selector)
                return
            if what == "call":
                client = listener.accept()[0]
                pid = fork(client, folder)
                if pid is not None:
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, ("ended", client, pid))
                    selector.register(client, selectors.EVENT_READ, ("gone", client, pid))
            elif what == "gone":  # somebody has killed the client
                selector.unregister(client)
                os.kill(pid, signal.SIGKILL)
            elif what == "ended":
                finish(selector, key.fd, client, pid)


def finish(selector: selectors.BaseSelector, pidfd: int, client: socket.socket, pid: int) -> None:
    """Tell the client how its process has ended."""
    selector.unregister(pidfd)
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if client in selector.get_map():
        selector.unregister(client)
        client.sendall(f"{status}\n".encode())
    client.close()


def end_all(selector: selectors.BaseSelector) -> None:
    """Kill what still runs."""
    for key in selector.get_map().values():
        what, _, pid = key.data
        if what == "ended":
            os.kill(pid, signal.SIGKILL)


def fork(client: socket.socket, folder: Path) -> int | None:
    """Start what a client asks for; gives the process, None if the client was killed meanwhile."""
    head, files, *_ = socket.recv_fds(client, 8, 3)
    size, text = int.from_bytes(head, "little"), b""
    while len(text) < size and (more := client.recv(size - len(text))):
        text += more
    if not text or len(text) < size:
        client.close()
        return None
    wish = json.loads(text)
    pid = os.fork()
    if pid == 0:
        live(wish, files, folder)
    for number in files:
        os.close(number)
    client.sendall(f"{pid}\n".encode())
    return pid


def live(wish: dict[str, Any], files: list[int], folder: Path) -> None:
    """The life of a forked process, as Python's own from the command line on."""
    status = 1
    try:
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 1024)  # the server's connections; a tool has opened nothing yet
        os.chdir(wish["folder"])
        os.environ.clear()
        os.environ.update(wish["environment"])
        sys.executable = str(folder / "python")
        status = run(wish["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def run(words: list[str]) -> int:
    """A tool or a module, after what a folder of PYTHONPATH customizes; its exit status."""
    sys.orig_argv = [sys.executable, *words]
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in folders if folder not in ("", *sys.path)]
    try:
        for customized in (Path(folder, "sitecustomize.py") for folder in folders if folder):
            if customized.exists():
                runpy.run_path(str(customized))
        if words[0] == "-m":
            sys.path[0], sys.argv = os.getcwd(), words[1:]
            if not hasattr(sys.modules.get(words[1]), "__path__"):
                sys.modules.pop(words[1], None)  # or runpy warns that it is there already; of a package, __main__ is run
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = os.path.dirname(os.path.abspath(words[0])), words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


if __name__ == "__main__":
    if os.fork() == 0:
        serve(sys.argv[1], Path(sys.argv[2]))
