"""A Python that has imported everything before: an executable for `[python, "tools/x.py", ...]`, in tests of whole tools.

A tool of the engine or of post-training imports for 4 to 10 s of CPU time before its first line. Here a server imports once
and forks; what is called is a small client, which gives the server its command line, folder, environment and open files,
passes signals on, and ends as the forked process ends (killed by the same signal, too). Killed itself, it takes that process
with it. A tool finds this executable as its own `sys.executable`, so that what it starts is forked as well.

What is not a tool of this repository or torchrun, or has other settings for Python or threads in its environment than the
server, is run by the real Python. So are tests of what is imported, and when: they call `sys.executable` themselves.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

# What the same import brings; megatron-core changes torch on a machine without a GPU, so the two are apart.
IMPORTS = {
    "engine": "torch._dynamo megatron_cpt.training.pretrain megatron_cpt.training.report megatron_cpt.training.step"
    " megatron_cpt.convert.convert megatron_cpt.convert.verify megatron_cpt.tokenizer torch.distributed.run"
    " megatron_cpt.study.figures megatron_cpt.study.choose optuna",
    "posttrain": "torch._dynamo transformers.models.llama.modeling_llama megatron_cpt.posttrain.trainers trl peft lm_eval"
    " lm_eval.models.huggingface datasets torch.distributed.run",
}
OF_POSTTRAIN = ("finetune_sft.py", "finetune_dpo.py", "evaluate.py", "chat.py", "lm_eval")
TOOLS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools")


def kind_of(tool: str) -> str:
    """Which server has what this tool imports."""
    return "posttrain" if tool in OF_POSTTRAIN else "engine"


def is_same_python(environment: dict[str, str], server: dict[str, str]) -> bool:
    """Whether what Python and OpenMP read at their start is as it was at the server's."""
    names = {name for name in environment | server if name.startswith(("PYTHON", "OMP_", "CUDA_VISIBLE"))} - {"PYTHONPATH"}
    return all(environment.get(name) == server.get(name) for name in names)


def tool_of(words: list[str]) -> str | None:
    """What a command line starts, if it is a tool, by itself or under torchrun, or a module that takes long to import."""
    if words[:2] == ["-m", "torch.distributed.run"]:
        words = [word for word in words if os.path.dirname(word) == TOOLS]
    if words[:1] == ["-m"]:
        return words[1] if words[1].startswith(("lm_eval", "megatron_cpt.")) else None
    folder, name = os.path.split(os.path.abspath(words[0])) if words else ("", "")
    return name if folder == TOOLS else None


def call(folder: str, python: str, words: list[str]) -> None:
    """The client's life: `folder` has the servers' sockets, `python` is the real one."""
    tool = tool_of(words)
    with open(os.path.join(folder, "environment.json"), encoding="utf-8") as file:
        same = is_same_python(dict(os.environ), json.load(file))
    place = os.path.join(folder, kind_of(tool or ""))
    if tool is None or not same or not os.path.exists(place):  # no server of this kind was started
        os.execv(python, [python, *words])
    wish = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        text = json.dumps(wish).encode()
        socket.send_fds(server, [len(text).to_bytes(8, "little")], [0, 1, 2])
        server.sendall(text)
        answers = server.makefile("r", encoding="ascii")
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    call(sys.argv[1], sys.argv[2], sys.argv[3:])
