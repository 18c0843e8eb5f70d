"""The documented command serves what fine-tuning writes, to OpenAI's client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_models import ROOT

from megatron_cpt.posttrain.chat import Speaker
from megatron_cpt.posttrain.conversations import Message
from megatron_cpt.posttrain.settings import ChatConfig
from megatron_cpt.posttrain.templates import load_template


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_transformers_serve(chat_model: str, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    model = tmp_path / "hf"
    shutil.copytree(chat_model, model)
    load_template(chat_model, "chatml").tokenizer.save_pretrained(model)
    port, executable = free_port(), Path(sys.executable).parent / "transformers"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [executable, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
        stream = client.chat.completions.create(
            model=str(model), messages=[{"role": "user", "content": "Hello?"}], max_tokens=40, temperature=0, stream=True
        )
        pieces = [part.choices[0].delta.content for part in stream if part.choices and part.choices[0].delta.content]
        speaker = Speaker(ChatConfig(str(model), max_new_tokens=40, temperature=0))
        ours, theirs = "".join(speaker.answer([Message("user", "Hello?")])), "".join(pieces)
        assert len(theirs) > 20
        assert theirs[: len(ours)] == ours[: len(theirs)]  # the server may stop a token earlier or later
    finally:
        process.terminate()
        process.wait(timeout=30)
