"""What is exported is what is trained on here, in files that LLaMA-Factory reads."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from chats import dpo_config, sft_config

from megatron_cpt.posttrain.conversations import Conversation, Message, Preference, parse_conversation, parse_preference
from megatron_cpt.posttrain.data import prepare_dpo, prepare_sft
from megatron_cpt.posttrain.dpo import finetune_dpo
from megatron_cpt.posttrain.llamafactory import check_messages
from megatron_cpt.posttrain.settings import LoraSettings, OptimizerSettings
from megatron_cpt.posttrain.sft import finetune_sft
from megatron_cpt.posttrain.templates import load_template
from megatron_cpt.utils.errors import InputError


def test_conversations(chat_model: str, tmp_path: Path) -> None:
    config = sft_config(chat_model, tmp_path, export_to=str(tmp_path / "lf"), lora=LoraSettings(r=8))
    settings = yaml.safe_load(Path(finetune_sft(config)).read_text())
    assert not Path(config.save).exists()
    rows = json.loads((tmp_path / "lf" / "train.json").read_text())
    prepared = prepare_sft(config.data, load_template(chat_model, "chatml"), config.training.seed)
    assert [parse_conversation(row) for row in rows] == [example.origin for example in prepared.train]
    info = json.loads((tmp_path / "lf" / "dataset_info.json").read_text())
    assert set(info) == {"train", "validation"}
    assert (settings["stage"], settings["template"], settings["cutoff_len"]) == ("sft", "chatml", 160)
    assert (settings["finetuning_type"], settings["lora_rank"], settings["lora_target"]) == ("lora", 8, "all")
    assert (settings["packing"], settings["neat_packing"], settings["max_steps"]) == (True, True, 6)
    assert (settings["gradient_accumulation_steps"], settings["warmup_steps"]) == (2, 1)


def test_pairs(chat_model: str, tmp_path: Path) -> None:
    config = dpo_config(chat_model, tmp_path, export_to=str(tmp_path / "lf"))
    settings = yaml.safe_load(Path(finetune_dpo(config)).read_text())
    rows = json.loads((tmp_path / "lf" / "train.json").read_text())
    prepared = prepare_dpo(config.data, load_template(chat_model, "chatml"), config.training.seed)
    assert [parse_preference(row) for row in rows] == [pair.origin for pair in prepared.train]
    assert json.loads((tmp_path / "lf" / "dataset_info.json").read_text())["train"]["ranking"] is True
    assert (settings["stage"], settings["pref_beta"], settings["pref_loss"]) == ("dpo", 0.1, "sigmoid")
    assert (settings["dpo_label_smoothing"], settings["disable_gradient_checkpointing"]) == (0.0, True)
    with pytest.raises(InputError, match="which is not empty; use another folder"):
        finetune_dpo(config)


def test_the_folder_of_a_finished_run_is_no_hindrance(chat_model: str, tmp_path: Path) -> None:
    """Nothing is written there. What is printed, and the folder of the data, are names of what is there."""
    config = sft_config(chat_model, tmp_path, export_to=str(tmp_path / "lost" / ".." / "lf"))
    (Path(config.save) / "hf").mkdir(parents=True)
    path = finetune_sft(config)
    assert yaml.safe_load(Path(path).read_text())["dataset_dir"] == str(tmp_path / "lf")


@pytest.mark.parametrize("loss", ["apo_zero", "robust"])
def test_losses_that_only_one_knows(chat_model: str, tmp_path: Path, loss: str) -> None:
    with pytest.raises(InputError, match=f"loss_type is {loss}, which LLaMA-Factory does not have; expected one of sigmoid"):
        finetune_dpo(dpo_config(chat_model, tmp_path, export_to=str(tmp_path / "lf"), loss_type=loss))
    assert not (tmp_path / "lf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned": False}, "an answer is not to be learned, which LLaMA-Factory's rows cannot say"),
        ({"reasoning": ("thinking", "x")}, "a message has thinking, for which LLaMA-Factory's rows have no field"),
    ],
)
def test_answers_that_its_rows_have_no_place_for(changes: dict[str, Any], message: str) -> None:
    answer = Message("assistant", "b", **changes)
    with pytest.raises(InputError, match=message):
        check_messages(Conversation((Message("user", "a"), answer)), "a.json, row 3")
    if answer.reasoning is not None:
        with pytest.raises(InputError, match=message):
            check_messages(Preference((Message("user", "a"),), Message("assistant", "c"), answer), "a.json, row 3")


def test_the_optimizer_is_the_same(chat_model: str, tmp_path: Path) -> None:
    optimizer = OptimizerSettings(decay_style="constant", warmup_fraction=0.5, adam_eps=1e-6)
    config = sft_config(chat_model, tmp_path, export_to=str(tmp_path / "lf"), optimizer=optimizer)
    settings = yaml.safe_load(Path(finetune_sft(config)).read_text())
    found = [settings[name] for name in ("lr_scheduler_type", "warmup_steps", "adam_epsilon")]
    assert found == ["constant_with_warmup", 3, 1e-6]


def test_a_template_that_both_know_is_needed(chat_model: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    config = sft_config(chat_model, tmp_path, export_to=str(tmp_path / "lf"))
    with pytest.raises(InputError, match="LLaMA-Factory has templates of its own, of which llama3 and chatml"):
        finetune_sft(replace(config, data=replace(config.data, chat_template=str(path))))


@pytest.mark.skipif("LLAMAFACTORY_PYTHON" not in os.environ, reason="make test-llamafactory, which installs it elsewhere")
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_llamafactory_reads_it(chat_model: str, tmp_path: Path, stage: str) -> None:
    """Its own parsers of arguments and of dataset_info.json, and its converter of rows."""
    made = (sft_config if stage == "sft" else dpo_config)(chat_model, tmp_path, export_to=str(tmp_path / "lf"))
    path = (finetune_sft if stage == "sft" else finetune_dpo)(made)  # type: ignore[arg-type]
    script = Path(__file__).parent / "read_with_llamafactory.py"
    command = [os.environ["LLAMAFACTORY_PYTHON"], str(script), str(tmp_path / "lf"), path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["formatting"], found["messages"], found["ranking"]) == ("sharegpt", "conversations", stage == "dpo")
    assert found["cutoff_len"] in (159, 160)  # with packing it takes one off
    assert found["learning_rate"] == made.optimizer.lr
    assert found["model"] == made.model
    rows = json.loads((tmp_path / "lf" / "train.json").read_text())
    assert len(found["rows"]) == len(rows)
    for ours, theirs in zip(rows, found["rows"], strict=True):
        turns = [turn["value"] for turn in ours["conversations"] if turn["from"] != "system"]
        answers = [ours["chosen"]["value"], ours["rejected"]["value"]] if stage == "dpo" else turns[-1:]
        assert [turn["content"] for turn in theirs["_prompt"]] == (turns if stage == "dpo" else turns[:-1])
        assert [turn["content"] for turn in theirs["_response"]] == answers


def test_the_row_that_cannot_be_written_is_named(chat_model: str, tmp_path: Path) -> None:
    """Truncated ones as well; with its file and number."""
    config = sft_config(chat_model, tmp_path, export_to=str(tmp_path / "lf"))
    path = Path(config.data.sources[1].path)
    rows = json.loads(path.read_text())
    rows[4]["messages"] = [*rows[4]["messages"], {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows[4]["messages"][1] |= {"weight": 0, "content": "dog"}
    rows[4]["messages"][-1]["content"] = "dog " * 300
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=rf"^{path}, row 5: an answer is not to be learned, which LLaMA-Factory's rows"):
        finetune_sft(config)
