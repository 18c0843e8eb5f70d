"""Every setting of chat.py, given on its command line, arrives where it acts; a setting without a row here is an error."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from every_setting import settings_of

from megatron_cpt.config.cli import run_tool
from megatron_cpt.posttrain import chat as chat_room
from megatron_cpt.posttrain.chat import chat
from megatron_cpt.posttrain.settings import ChatConfig

# setting -> what is given, and what the stand-in for transformers has to have seen of it
ROWS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "model": ([], {"folder": "MODEL"}),
    "system": (["--system", "Be kind."], {"prompt": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi"}),
    "chat_template": (["--chat_template", "llama3"], {"prompt": "<|start_header_id|>user<|end_header_id|>\n\nHi"}),
    "prompt": (["--prompt", "The dog"], {"completed": ["The dog"], "temperature": 0.0, "repetition_penalty": 1.2}),
    "max_new_tokens": (["--max_new_tokens", "7"], {"max_new_tokens": 7}),
    "temperature": (["--temperature", "0.3"], {"temperature": 0.3, "do_sample": True, "top_k": 0}),
    "top_p": (["--top_p", "0.4"], {"top_p": 0.4}),
    "repetition_penalty": (["--repetition_penalty", "1.5"], {"repetition_penalty": 1.5}),
    "seed": (["--seed", "5"], {"seeds": [5, 6]}),
    "dtype": (["--dtype", "bfloat16"], {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("setting", sorted(settings_of(ChatConfig)))
def test_a_setting_arrives(setting: str, chat_tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = ROWS[setting]
    seen = stand_in(monkeypatch)
    folder = tmp_path / "MODEL"
    shutil.copytree(chat_tokenizer_dir, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    template = [] if {"--chat_template", "--prompt"} & {*given} else ["--chat_template", "chatml"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nHi\n"))
    run_tool(chat, ChatConfig, "", [str(folder), *template, *given], positional="model")
    found = {name: seen[name] for name in expected}
    if "prompt" in found:
        assert expected["prompt"] in found.pop("prompt")
        expected = {name: value for name, value in expected.items() if name != "prompt"}
    assert found == expected


WITH_PROMPT = {  # setting -> what is given, and what completes the text
    "max_new_tokens": (["--max_new_tokens", "7"], 7),
    "temperature": (["--temperature", "0.3"], 0.3),
    "top_p": (["--top_p", "0.4"], 0.4),
    "repetition_penalty": (["--repetition_penalty", "1.0"], 1.0),
    "seed": (["--seed", "5"], 5),
    "dtype": (["--dtype", "bfloat16"], torch.bfloat16),
}


@pytest.mark.parametrize("setting", sorted(settings_of(ChatConfig) - {"model", "prompt"}))
def test_a_setting_acts_on_a_prompt_or_is_refused(
    setting: str,
    chat_tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = stand_in(monkeypatch)
    shutil.copytree(chat_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    given, expected = WITH_PROMPT.get(setting, (ROWS[setting][0], None))
    options = [str(tmp_path), "--prompt", "The dog", *given]
    if setting in WITH_PROMPT:
        run_tool(chat, ChatConfig, "", options, positional="model")
        assert (seen["completed"], seen[setting]) == (["The dog"], expected)
        return
    with pytest.raises(SystemExit) as end:
        run_tool(chat, ChatConfig, "", options, positional="model")
    assert end.value.code == 2
    said = f"error: {setting} is {given[1]}; expected nothing with prompt, a text to go on with as it is"
    assert capsys.readouterr().err.splitlines()[-1] == said


TEXTS = ["[INST] hi [/INST]", '{"name": "Bob"}', "[1, 2]", "[x]", "[]", "null", '["a", "b"]', "{"]


@pytest.mark.parametrize("texts", [*([text] for text in TEXTS), ["[a]", "null"]], ids=str)
def test_a_text_is_a_text(
    texts: list[str], chat_tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it looks like in YAML."""
    seen = stand_in(monkeypatch)
    shutil.copytree(chat_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    run_tool(chat, ChatConfig, "", [str(tmp_path), "--prompt", *texts], positional="model")
    assert seen["completed"] == texts


@pytest.mark.parametrize(
    ("option", "found"),
    [
        (["--prompt", "\udcff"], "prompt is '\\udcff'; expected a list (text in UTF-8 each) or text in UTF-8 or null"),
        (["--prompt", "a", "\udcff"], "prompt[1] is '\\udcff'; expected text in UTF-8"),
        (["--system", "\udcff"], "system is '\\udcff'; expected text in UTF-8 or null"),
        (["--system", "Be", "kind."], "system is ['Be', 'kind.']; expected text in UTF-8 or null"),
    ],
)
def test_what_is_no_text(option: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8, which no tokenizer takes, and words that are not one text."""
    with pytest.raises(SystemExit) as end:
        run_tool(chat, ChatConfig, "", ["model", *option], positional="model")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {found}\n"


def test_temperature_0_is_greedy(chat_tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stand_in(monkeypatch)
    shutil.copytree(chat_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    options = [str(tmp_path), "--chat_template", "chatml", "--temperature", "0"]
    run_tool(chat, ChatConfig, "", options, positional="model")
    assert seen["do_sample"] is False


def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model that answers nothing, and what it has seen."""
    seen: dict[str, Any] = {"seeds": []}

    class Model(SimpleNamespace):
        def generate(self, streamer: Any, **options: Any) -> None:
            seen.update(options)
            seen["prompt"] = streamer.tokenizer.decode(options["input_ids"][0])
            streamer.end()

        def to(self, device: Any) -> Model:
            return self

        def eval(self) -> Model:
            return self

    def load(folder: str, dtype: Any, **_: Any) -> tuple[Model, dict[str, list[str]]]:
        seen.update(folder=Path(folder).name, dtype=dtype)
        limits = SimpleNamespace(max_position_embeddings=2048)
        model = Model(config=limits, generation_config=transformers.GenerationConfig(), device="cpu")
        model.named_parameters = dict
        return model, {"missing_keys": [], "mismatched_keys": []}

    def completed(folder: str, prompts: list[str], number: int | None, **options: Any) -> list[str]:
        seen.update(options, completed=prompts, max_new_tokens=number)
        return [""] * len(prompts)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(chat_room, "complete_text", completed)
    monkeypatch.setattr(torch, "manual_seed", seen["seeds"].append)
    return seen
