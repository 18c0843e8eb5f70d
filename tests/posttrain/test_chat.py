"""A conversation as typed: history, commands, an answer that is broken off, questions that are too long."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fork_server import ENVIRONMENT
from rigged_models import make_reciter, set_json, tokens_of
from tiny_models import ROOT, command_of, make_tiny_llama

from megatron_cpt.convert.vocabulary import load_hf_tokenizer
from megatron_cpt.posttrain.chat import Chat, Speaker, chat
from megatron_cpt.posttrain.conversations import Message
from megatron_cpt.posttrain.run_files import check_chat
from megatron_cpt.posttrain.settings import ChatConfig
from megatron_cpt.posttrain.template_files import CHATML
from megatron_cpt.utils.errors import InputError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> ChatConfig:
    model = make_tiny_llama(tmp_path_factory.mktemp("chat") / "hf", chat_tokenizer_dir, vocab_size=406)
    return ChatConfig(model, chat_template="chatml", max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def speaker(config: ChatConfig) -> Speaker:
    return Speaker(config)


def test_an_answer_is_what_transformers_generates(speaker: Speaker, config: ChatConfig) -> None:
    from transformers import AutoModelForCausalLM

    messages = [Message("system", "Be kind."), Message("user", "Hello?")]
    pieces = list(speaker.answer(messages))
    assert speaker.tokens == 12
    assert speaker.seconds > 0
    tokenizer, model = speaker.template.tokenizer, AutoModelForCausalLM.from_pretrained(config.model)
    prompt = tokenizer(speaker.template.prompt(messages), add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_ends_with_its_turn(
    chat_tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cut: bool
) -> None:
    """Though generation_config has other things to say, and beams; nothing of the end is shown."""
    folder, plain = str(tmp_path / "hf"), tmp_path / "plain.jinja"
    plain.write_text(
        "{% for m in messages %}{{ ('Q> ' if m['role'] == 'user' else 'A:') + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    make_reciter(tmp_path / "hf", chat_tokenizer_dir, tokens_of(chat_tokenizer_dir, ":狗\nQ> quick brown fox"))
    set_json(tmp_path / "hf" / "generation_config.json", num_beams=2, stop_strings=["no such text"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("狗？\n"))
    chat(ChatConfig(folder, chat_template=str(plain), max_new_tokens=2 if cut else 12, temperature=0))
    said = capfd.readouterr()
    assert said.out == ("\ufffd\n" if cut else "狗\n")
    assert ("[2 tokens" in said.err, "; cut off at max_new_tokens]" in said.err) == (cut, cut)  # not of "32 tokens/s"


def test_completion_ends_with_a_turn(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    chain = [*tokens_of(chat_tokenizer_dir, ":狗"), 401, *tokens_of(chat_tokenizer_dir, " quick brown fox")]
    make_reciter(tmp_path / "hf", chat_tokenizer_dir, chain)
    set_json(tmp_path / "hf" / "tokenizer_config.json", chat_template=CHATML)
    assert chat(ChatConfig(str(tmp_path / "hf"), prompt="A:", max_new_tokens=12)) == "A:狗"


def test_seeds_repeat_answers(config: ChatConfig) -> None:
    from dataclasses import replace

    def told(seed: int | None) -> list[str]:
        speaker = Speaker(replace(config, temperature=2.0, top_p=1.0, seed=seed))
        return ["".join(speaker.answer([Message("user", "Hello?")])) for _ in range(2)]

    assert told(1) == told(1)
    assert told(1) != told(2)
    assert told(1)[0] != told(1)[1]


def test_an_answer_can_be_broken_off(speaker: Speaker) -> None:
    stream = speaker.answer([Message("user", "Hello?")])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert 1 <= speaker.tokens <= 12


def test_history_and_commands(speaker: Speaker, capfd: pytest.CaptureFixture[str]) -> None:
    talk = Chat(speaker, "Be kind.")
    talk.say("one")
    talk.say("two")
    assert [message.role for message in talk.messages()] == ["system", "user", "assistant", "user", "assistant"]
    said = capfd.readouterr()
    assert said.err.count("[12 tokens, ") == 2
    assert talk.turns[1].content in said.out
    assert talk.command("/undo")
    assert [message.content for message in talk.turns if message.role == "user"] == ["one"]
    assert talk.command("/system Be short.")
    assert (talk.system, talk.turns) == ("Be short.", [])
    assert talk.command("/system")
    assert talk.system is None
    talk.turns = [Message("user", "x")]
    assert talk.command("/new")
    assert talk.turns == []
    assert talk.command("/what")
    assert "/undo" in capfd.readouterr().err
    assert not talk.command("/quit")


def test_what_no_longer_fits(speaker: Speaker, capfd: pytest.CaptureFixture[str]) -> None:
    """The model has 256 positions, 12 of them for the answer."""
    talk = Chat(speaker, None)
    for i in range(8):
        talk.turns += [Message("user", f"dog {i} " * 5), Message("assistant", "fox " * 5)]
    talk.turns.append(Message("user", "last"))
    kept = talk.messages()
    assert kept[-1].content == "last"
    assert kept[0].role == "user"
    assert len(kept) < len(talk.turns)
    assert "no longer fit and are left out" in capfd.readouterr().err
    talk.say("dog " * 300)
    assert "the question has more than 244 tokens" in capfd.readouterr().err
    assert talk.turns[-1].content == "last"


def test_the_tool_reads_lines(config: ChatConfig) -> None:
    command = [*command_of("chat.py"), config.model, "--chat_template", "chatml"]
    lines = "one\n\n/new\ntwo\n/quit\nthree\n"
    result = subprocess.run(
        [*command, "--max_new_tokens", "3", "--temperature", "0"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ | ENVIRONMENT,
    )
    assert result.stderr.count("[3 tokens, ") == 2


def test_text_is_completed(config: ChatConfig) -> None:
    completed = chat(replace(config, chat_template=None, prompt=["The dog", "狗"]))
    assert completed is not None
    assert completed.startswith("The dog")
    assert "\n\n狗" in completed


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature is -1.0"), ({"top_p": 0.0}, "top_p is 0.0"), ({"max_new_tokens": 0}, "max_new")],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatConfig("x", **options)  # type: ignore[arg-type]


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which has no config\.json"):
        Speaker(ChatConfig(str(tmp_path)))


def test_an_answer_needs_room(config: ChatConfig) -> None:
    with pytest.raises(InputError, match="max_new_tokens is 256; expected less than 256"):
        Speaker(replace(config, max_new_tokens=256))


def test_what_a_template_refuses_is_told(config: ChatConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as the system prompt, which some models have no place for."""
    path = tmp_path / "strict.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    path.write_text(refusal + CHATML)
    talk = Chat(Speaker(replace(config, chat_template=str(path))), "Be kind.")
    talk.say("one")
    assert "error: the chat template refuses it: no system prompt" in capfd.readouterr().err
    assert talk.turns == []


def test_stdin_that_is_closed_or_no_text(config: ChatConfig) -> None:
    options = ["--chat_template", "chatml", "--max_new_tokens", "3"]
    command = [sys.executable, str(ROOT / "tools" / "chat.py"), config.model, *options]
    closed = subprocess.run(["bash", "-c", '"$@" <&-', "-", *command], capture_output=True, text=True, timeout=300)
    assert closed.returncode == 2
    assert closed.stderr.splitlines()[-1] == "error: stdin is closed; expected a terminal, or questions on it"
    command += ["--max_new_tokens", "3"]
    odd = subprocess.run(command, input="\ud83d \x00 狗".encode("utf-8", "surrogatepass") + b"\xff\n", capture_output=True)
    assert odd.returncode == 0, odd.stderr
    assert odd.stderr.count(b"[3 tokens, ") == 1


def test_a_model_goes_on_with_a_token_or_more(config: ChatConfig) -> None:
    with pytest.raises(InputError, match=r"prompt is '', of which the tokenizer .* makes no token; expected a text"):
        chat(replace(config, chat_template=None, prompt=["The dog", ""]))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: str) -> str:
    """A model whose config.json has n_positions, with 64 of them, which it cannot go beyond."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(shutil.copytree(chat_tokenizer_dir, tmp_path_factory.mktemp("gpt2") / "hf"))
    torch.manual_seed(0)
    shape = {"vocab_size": 406, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return str(folder)


def test_an_answer_has_half_of_few_positions(
    gpt2: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody says how long it may be; what was said is not changed."""
    config = ChatConfig(gpt2, chat_template="chatml", temperature=0)
    check_chat(config)
    talk = Chat(Speaker(config), None)
    assert talk.speaker.room() == 32
    talk.say("Hi")
    assert "[32 tokens" in capfd.readouterr().err
    talk.say("dog " * 60)
    assert "error: the question has more than 32 tokens" in capfd.readouterr().err
    for check in (check_chat, Speaker):
        with pytest.raises(InputError, match="max_new_tokens is 64; expected less than 64, the positions of"):
            check(replace(config, max_new_tokens=64))


@pytest.mark.parametrize("early", [True, False])
def test_a_text_to_complete_fits_with_what_completes_it(config: ChatConfig, gpt2: str, early: bool) -> None:
    """In the positions of a model that cannot go beyond them, and of one that gets lost there."""
    asks = check_chat if early else chat
    for model, positions in ((gpt2, 64), (config.model, 256)):
        text, new_tokens = "x" * (positions - 8), 9
        said = f"has {len(text)} tokens, and max_new_tokens is {new_tokens}; expected at most {positions} together"
        with pytest.raises(InputError, match=said):
            asks(ChatConfig(model, prompt=["The", text], max_new_tokens=new_tokens))
        asks(ChatConfig(model, prompt=["The", text], max_new_tokens=8))


def test_completion_is_as_it_was_asked_for(config: ChatConfig) -> None:
    """By default greedy with a penalty; else as transformers does what is said."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(config.model), load_hf_tokenizer(config.model)
    ids = tokenizer("The dog", return_tensors="pt")
    for penalty in (None, 1.0, 1.2):
        output = model.generate(**ids, max_new_tokens=24, do_sample=False, repetition_penalty=penalty or 1.2)
        expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        asked = ChatConfig(config.model, prompt="The dog", max_new_tokens=24, repetition_penalty=penalty)
        assert chat(asked) == "The dog" + expected
    hot = replace(asked, temperature=3.0, top_p=1.0, seed=5)
    assert chat(hot) == chat(hot)
    assert len({chat(hot), chat(replace(hot, seed=6)), chat(asked)}) == 3
