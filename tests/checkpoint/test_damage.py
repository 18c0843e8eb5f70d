"""Damaged files of a model are named in one line; what goes wrong by itself while they are read keeps its traceback."""

from __future__ import annotations

import errno
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import ROOT, VARIANTS, make_tiny_llama, write_yaml

from megatron_cpt.checkpoint.damage import is_damage, reading_hf_model
from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.utils.errors import InputError

NOT_DAMAGE = [
    MemoryError("broken on purpose"),
    torch.OutOfMemoryError("broken on purpose"),
    AttributeError("broken on purpose"),
    RuntimeError("CUDA error: broken on purpose"),
    torch.distributed.DistBackendError("NCCL error: broken on purpose"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> str:
    return make_tiny_llama(tmp_path_factory.mktemp("hf"), chat_tokenizer_dir, **VARIANTS["tied"])


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> None:
    """A tool, in this process."""
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")


def arguments_of(tool: str, model: str, folder: Path) -> list[str]:
    """A command that loads the model, and its tokenizer first."""
    if tool == "chat.py":
        return ["--model", model, "--prompt", "The"]
    if tool == "convert_checkpoint.py":
        return ["verify", "--a", model, "--b", model, "--tensors=false", "--logits=true"]
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "Who are you?"}\n' * 2)
    config = {
        "models": {"base": model},
        "prompts": [{"path": str(prompts), "language": "zh"}],
        "output": str(folder / "scores"),
    }
    return ["--config", write_yaml(folder / "evaluate.yaml", config)]


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("tool", ["chat.py", "convert_checkpoint.py", "evaluate.py"])
def test_other_errors_of_loading_a_model_keep_their_traceback(
    model: str, tool: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    for name in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    with pytest.raises(type(error), match="broken on purpose") as raised:
        run(monkeypatch, tool, *arguments_of(tool, model, tmp_path))
    assert not isinstance(raised.value, InputError)


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=lambda error: type(error).__name__)
def test_other_errors_of_loading_what_is_trained_and_a_tokenizer(
    model: str, error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", fail)
    with pytest.raises(type(error), match="broken on purpose"):
        load_trainable_model(model)
    more = ["--megatron", str(tmp_path / "megatron"), "--extend_tokenizer", model]
    with pytest.raises(type(error), match="broken on purpose"):
        run(monkeypatch, "convert_checkpoint.py", "hf-to-megatron", "--hf", model, *more)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "id2label": 5}'),
        ("config.json", b'{"model_type": "llama", "num_hidden_layers": "x"}'),
        ("config.json", b"\xff"),
        ("generation_config.json", b"[" * 100_000),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[]"),
    ],
)
@pytest.mark.parametrize("tool", ["chat.py"])
def test_damaged_files_are_named_in_one_line(
    model: str,
    tool: str,
    name: str,
    content: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tool, *arguments_of(tool, str(folder), tmp_path))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert str(folder) in said
    assert "Traceback" not in said


def test_a_machine_without_memory_is_no_damage() -> None:
    assert not is_damage(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_damage(OSError(errno.EIO, "Input/output error"))


def test_weights_of_another_size_are_damage(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": ', '"intermediate_size": 1'))
    with pytest.raises(InputError, match="other cannot be read: "), reading_hf_model(f"model {folder}", str(folder)):
        transformers.AutoModelForCausalLM.from_pretrained(str(folder))
