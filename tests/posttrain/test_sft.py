"""Packed conversations do not see each other, prompts do not count, runs go on where they were killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import read_metrics, sft_config, write_config
from fork_server import ENVIRONMENT
from safetensors.torch import load_file, save_file
from tiny_models import command_of, run_tool
from trl import SFTConfig as TrlConfig

from megatron_cpt.posttrain.data import SourceConfig, prepare_sft
from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.posttrain.run_files import accumulation
from megatron_cpt.posttrain.settings import LoraSettings, RunSettings, TrainingSettings
from megatron_cpt.posttrain.sft import AnswerLossTrainer, SftConfig, examples_dataset, finetune_sft
from megatron_cpt.posttrain.templates import IGNORED, load_template
from megatron_cpt.utils.errors import InputError, InputErrors


def losses_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Of every token that counts, in order."""
    labels = inputs["labels"][:, 1:]
    with torch.no_grad():
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses[labels.flatten() != IGNORED]


def trainer_of(config: SftConfig, packing: bool, folder: Path) -> AnswerLossTrainer:
    template = load_template(config.model, "chatml")
    template.tokenizer.pad_token = template.tokenizer.eos_token
    examples = prepare_sft(config.data, template, 1).train
    return AnswerLossTrainer(
        model=load_trainable_model(config.model),
        args=TrlConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, packing=packing, max_length=160, report_to=[],
            per_device_train_batch_size=2, gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": not packing},
        ),
        train_dataset=examples_dataset(examples),
        processing_class=template.tokenizer,
    )  # fmt: skip


def test_packed_conversations_do_not_see_each_other(chat_model: str, tmp_path: Path) -> None:
    """Every token's loss is that of its conversation alone, unpadded, within 1e-5."""
    config = sft_config(chat_model, tmp_path)
    trainer = trainer_of(config, True, tmp_path / "out")
    examples = prepare_sft(config.data, load_template(chat_model, "chatml"), 1).train
    alone = {tuple(example.input_ids): example for example in examples}
    found = 0
    for batch in trainer.get_train_dataloader():
        assert "attention_mask" not in batch
        packed = losses_of(trainer.model, batch)
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        assert len(starts) > 2
        expected = []
        for begin, end in pairwise(starts):
            example = alone[tuple(batch["input_ids"][0, begin:end].tolist())]
            inputs = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
            expected.append(losses_of(trainer.model, inputs))
            found += 1
        assert torch.allclose(packed, torch.cat(expected), rtol=0, atol=1e-5)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)
    assert found == len(examples), "no conversation is left out"


def test_padded_batches_have_the_same_losses(chat_model: str, tmp_path: Path) -> None:
    config = sft_config(chat_model, tmp_path)
    trainer = trainer_of(config, False, tmp_path / "out")
    for batch in trainer.get_train_dataloader():
        together = losses_of(trainer.model, batch)
        alone = []
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            alone.append(losses_of(trainer.model, {"input_ids": ids[None, :length], "labels": labels[None, :length]}))
        assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_the_prompt_counts_nothing(chat_model: str, tmp_path: Path) -> None:
    """The loss that is trained is the mean over the answers' tokens; the logits of the prompt get no gradient."""
    config = sft_config(chat_model, tmp_path)
    trainer = trainer_of(config, True, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][0, 1:]
    outputs = trainer.model(**{name: value for name, value in batch.items() if name != "labels"})
    outputs.logits.retain_grad()
    losses = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels, ignore_index=IGNORED)
    losses.backward()
    gradients = outputs.logits.grad[0, :-1].abs().sum(dim=-1)
    assert (gradients[labels == IGNORED] == 0).all()
    assert (gradients[labels != IGNORED] > 0).all()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(losses.item(), abs=1e-5)


@pytest.fixture(scope="module")
def whole(chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SftConfig, Path]:
    """An undisturbed run."""
    config = sft_config(chat_model, tmp_path_factory.mktemp("sft"))
    return config, Path(finetune_sft(config))


def test_a_run_learns_to_answer_and_says_how(whole: tuple[SftConfig, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, result = whole
    rows = read_metrics(Path(config.save))
    evaluations = [row for row in rows if "eval_zh_loss" in row]
    assert [row["iteration"] for row in evaluations] == [0, 6]
    for language in ("en", "zh"):
        assert evaluations[1][f"eval_{language}_loss"] < evaluations[0][f"eval_{language}_loss"] - 0.5
    assert [row["iteration"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert json.loads((Path(config.save) / "status.json").read_text())["state"] == "finished"
    assert json.loads((result / "manifest.json").read_text())["config"]["optimizer"]["lr"] == 3e-3
    tokenizer, model = AutoTokenizer.from_pretrained(result), AutoModelForCausalLM.from_pretrained(result)
    assert model.generation_config.eos_token_id == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "dog 1?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_evaluation_is_the_mean_over_all_answer_tokens(whole: tuple[SftConfig, Path]) -> None:
    config, result = whole
    template = load_template(str(result), None)
    examples = prepare_sft(config.data, template, config.training.seed).validation["zh"]
    model = load_trainable_model(str(result))
    losses = torch.cat(
        [losses_of(model, {"input_ids": torch.tensor([e.input_ids]), "labels": torch.tensor([e.labels])}) for e in examples]
    )
    last = [row for row in read_metrics(Path(config.save)) if "eval_zh_loss" in row][-1]
    assert last["eval_zh_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert last["eval_zh_tokens"] == len(losses)


@pytest.mark.parametrize(("interval", "steps"), [(2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_an_evaluation_after_some_steps_and_one_after_the_last(
    whole: tuple[SftConfig, Path], tmp_path: Path, interval: int, steps: list[int]
) -> None:
    """Where the interval divides the last step, that is one; looking changes nothing."""
    config = replace(whole[0], save=str(tmp_path / "run"), run=RunSettings(eval_interval=interval))
    finetune_sft(config)
    rows, before = (read_metrics(Path(run.save)) for run in (config, whole[0]))
    assert [row["iteration"] for row in rows if "eval_zh_loss" in row] == steps
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in before if "loss" in row]


def test_a_finished_run_is_not_begun_again(whole: tuple[SftConfig, Path]) -> None:
    with pytest.raises(InputError, match="holds a finished run; use another folder"):
        finetune_sft(whole[0])


def start(config: str) -> subprocess.Popen[str]:
    command = [*command_of("finetune_sft.py"), "--config", config]
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_goes_on_where_it_was_ended(whole: tuple[SftConfig, Path], tmp_path: Path, number: signal.Signals) -> None:
    """The weights in the end are those of the undisturbed run, bit by bit."""
    folder = tmp_path / "run"
    config = write_config(replace(whole[0], save=str(folder)), tmp_path / "sft.yaml")
    process = start(config)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-2" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate()
    if number is signal.SIGTERM and "stopped by SIGTERM" in said:
        assert process.returncode == 0
        assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    result = run_tool("finetune_sft.py", "--config", config)
    assert Path(result.stdout.strip()) == folder / "hf"
    weights, expected = (load_file(path / "model.safetensors") for path in (folder / "hf", whole[1]))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    steps = [row["iteration"] for row in read_metrics(folder) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"epochs": 1}])
@pytest.mark.parametrize("interval", [None, 3])
def test_a_run_that_was_killed_after_its_last_step(
    whole: tuple[SftConfig, Path], tmp_path: Path, length: dict[str, int], interval: int | None
) -> None:
    """No further step is made, nothing is written down twice, and the same weights and numbers are the result."""
    training = TrainingSettings(micro_batch_size=1, global_batch_size=2, **length)
    optimizer = replace(whole[0].optimizer, decay_style="constant")
    run = RunSettings(save_interval=1, eval_interval=interval)
    config = replace(whole[0], save=str(tmp_path / "run"), training=training, optimizer=optimizer, run=run)
    results = []
    for _ in range(2):
        finetune_sft(config)
        rows = [row for row in read_metrics(tmp_path / "run") if "train_runtime" not in row]
        clockless = [{name: value for name, value in row.items() if "per_second" not in name} for row in rows]
        status = json.loads((tmp_path / "run/status.json").read_text())
        results.append((clockless, status, load_file(tmp_path / "run/hf/model.safetensors")))
        shutil.rmtree(tmp_path / "run/hf")
    (rows, status, weights), (rows_again, status_again, weights_again) = results
    assert (rows_again, status_again) == (rows, status)
    assert status["loss"] == [row["loss"] for row in rows if "loss" in row][-1]
    assert all(torch.equal(weights_again[name], tensor) for name, tensor in weights.items())


def test_another_configuration_does_not_go_on(whole: tuple[SftConfig, Path], tmp_path: Path) -> None:
    config = replace(whole[0], save=str(tmp_path / "run"))
    finetune_sft(config)
    (tmp_path / "run" / "hf").rename(tmp_path / "moved")
    other = replace(config, packing=False)
    with pytest.raises(InputError, match="has begun with packing True, now it is False; use another folder as save"):
        finetune_sft(other)


def test_two_processes_do_what_one_does(whole: tuple[SftConfig, Path], tmp_path: Path) -> None:
    """The same batches: losses equal but for rounding."""
    config = write_config(replace(whole[0], save=str(tmp_path / "two")), tmp_path / "sft.yaml")
    run_tool("finetune_sft.py", "--config", config, processes=2)
    mine, theirs = (
        [row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (tmp_path / "two", Path(whole[0].save))
    )
    assert mine[0] == pytest.approx(theirs[0], rel=1e-4)
    last = [
        [row for row in read_metrics(folder) if "eval_zh_loss" in row][-1]
        for folder in (tmp_path / "two", Path(whole[0].save))
    ]
    assert last[0]["eval_zh_tokens"] == last[1]["eval_zh_tokens"]
    assert last[0]["eval_zh_loss"] == pytest.approx(last[1]["eval_zh_loss"], abs=0.05)


@pytest.mark.parametrize("merge", [True, False])
def test_adapters(chat_model: str, tmp_path: Path, merge: bool) -> None:
    config = sft_config(chat_model, tmp_path, lora=LoraSettings(r=4, alpha=8, merge=merge), run=RunSettings())
    result = Path(finetune_sft(config))
    before = load_file(Path(chat_model) / "model.safetensors")
    if merge:
        after = load_file(result / "model.safetensors")
        assert after.keys() == before.keys()
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    else:
        assert (result / "adapter_model.safetensors").exists()
        assert not (result / "model.safetensors").exists()
    evaluations = [row for row in read_metrics(Path(config.save)) if "eval_zh_loss" in row]
    assert evaluations[1]["eval_zh_loss"] < evaluations[0]["eval_zh_loss"]


def test_a_folder_as_others_leave_it(chat_model: str, tmp_path: Path) -> None:
    """With the generation settings of Llama-2-chat, and the adapter that was merged into its weights still there."""
    model = tmp_path / "model"
    shutil.copytree(chat_model, model)
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(settings))
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}))
    (model / "adapter_model.safetensors").write_bytes(b"no weights")
    training = TrainingSettings(max_steps=1, micro_batch_size=1, global_batch_size=2)
    config = sft_config(str(model), tmp_path, training=training, run=RunSettings(save_interval=1))
    config = replace(config, data=replace(config.data, validation_share=0))
    result = Path(finetune_sft(config))
    written = json.loads((result / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.9, 0.6)
    assert not list(result.glob("adapter*"))
    assert not list(Path(config.save).glob(".rehearsal*"))


def test_what_the_end_needs_is_tried_before_the_first_step(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    config = sft_config(chat_model, tmp_path)

    def refuse() -> None:
        with pytest.raises(InputError) as caught:
            finetune_sft(config)
        said.append(str(caught.value))
        assert not list(Path(config.save).glob("checkpoint*"))
        assert not (Path(config.save) / "run.json").exists()  # it never began
        (Path(config.save) / "metrics.jsonl").touch()
        assert not any("loss" in row for row in read_metrics(Path(config.save)))

    said: list[str] = []
    with monkeypatch.context() as patch:
        # 0.4 million numbers of 4 bytes in the result, three times as many in a checkpoint with AdamW's
        usage = type("Usage", (), {"free": 2_000_000})
        patch.setattr("megatron_cpt.posttrain.runner.shutil.disk_usage", lambda folder: usage)
        refuse()
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("cannot be saved")

        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        refuse()
    assert "GB are free; expected" in said[0]
    assert "could not be written in the end: cannot be saved" in said[1]


def test_adapters_of_layers_that_there_are_none_of(chat_model: str, tmp_path: Path) -> None:
    for names in (["q_proj", "query"], "query"):
        config = sft_config(chat_model, tmp_path, lora=LoraSettings(target_modules=names))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"lora\.target_modules has query, and the model no such layer"):
            finetune_sft(config)


def test_all_missing_files_at_once(chat_model: str, tmp_path: Path) -> None:
    config = sft_config(chat_model, tmp_path)
    sources = [SourceConfig(f"{name}.jsonl", "en") for name in "ab"]
    with pytest.raises(InputErrors) as caught:
        finetune_sft(replace(config, model="nowhere", data=replace(config.data, sources=sources)))
    model, *files = map(str, caught.value.errors)
    assert model.startswith("model is nowhere, which has no config.json")
    assert files == [
        f"data.sources[{i}].path is {name}.jsonl; expected a file (no such file)" for i, name in enumerate("ab")
    ]


def test_batches_that_cannot_be_divided() -> None:
    assert accumulation(TrainingSettings(micro_batch_size=2, global_batch_size=12), 3) == 2
    with pytest.raises(
        InputError, match="global_batch_size is 8; expected a multiple of micro_batch_size 2 x 3 processes = 6"
    ):
        accumulation(TrainingSettings(micro_batch_size=2, global_batch_size=8), 3)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("optimizer", {"lr": 2.0}, r"lr is 2\.0; expected a number above 0 and below 1"),
        ("optimizer", {"adam_beta2": 1.0}, r"adam_beta2 is 1\.0; expected 0 or more, below 1"),
        ("optimizer", {"adam_eps": -1e-8}, "adam_eps is -1e-08; expected 0 or more"),
        ("training", {"seed": -1}, r"seed is -1; expected a whole number from 0"),
        ("training", {"epochs": float("inf")}, r"epochs is inf; expected a number above 0"),
        ("data", {"almr": 1.5}, r"almr is 1\.5; expected a number from 0 to 1"),
        ("data", {"max_length": 2}, "max_length is 2; expected 8 to 1,048,576"),
        ("data", {"chat_template": "llama4"}, "chat_template is llama4, no file"),
        ("data", {"sources": []}, r"sources is \[\]; expected one file or more"),
        ("training", {"micro_batch_size": 4}, "global_batch_size is 2; expected a multiple of micro_batch_size 4 x 1"),
        (None, {"model": "nowhere"}, r"model is nowhere, which has no config\.json"),
        (None, {"save": ""}, "save is empty"),
    ],
)
def test_wrong_configurations(
    whole: tuple[SftConfig, Path], tmp_path: Path, section: str | None, changes: dict[str, Any], message: str
) -> None:
    base = replace(whole[0], save=str(tmp_path / "run"))

    def run() -> None:
        finetune_sft(replace(base, **({section: replace(getattr(base, section), **changes)} if section else changes)))

    with pytest.raises(InputError, match=message):
        run()
    assert not (tmp_path / "run" / "hf").exists()


def test_a_run_whose_loss_is_not_finite_ends_and_saves_nothing(whole: tuple[SftConfig, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole[0].model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38  # finite, as those of a run that is about to diverge
    tensors["model.embed_tokens.weight" if "lm_head.weight" not in tensors else "lm_head.weight"] *= 1e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = replace(whole[0].run, save_interval=1, eval_interval=None)
    config = replace(whole[0], model=str(model), save=str(tmp_path / "run"), run=run)
    result = run_tool("finetune_sft.py", "--config", write_config(config, tmp_path / "sft.yaml"), check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the loss of step 1 is ")
    assert "Traceback" not in result.stderr
    assert not {"hf", "checkpoint-1"} & set(os.listdir(tmp_path / "run"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["iteration"]) == ("failed", 1)


def test_errors_are_one_line(whole: tuple[SftConfig, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": "a", "output": ""}]')
    data = replace(whole[0].data, sources=[replace(whole[0].data.sources[0], path=str(broken))])
    config = write_config(replace(whole[0], save=str(tmp_path / "run"), data=data), tmp_path / "sft.yaml")
    result = run_tool("finetune_sft.py", "--config", config, check=False)
    assert result.returncode == 2
    assert f"error: {broken}, row 1: message 2 is empty; data.on_error: skip goes on" in result.stderr
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_trained_on_is_not_evaluated_on(chat_model: str, tmp_path: Path, copied: bool) -> None:
    """By content, before anything is loaded; nor where a file of which rows are held out is named twice."""
    config = sft_config(chat_model, tmp_path)
    first = config.data.sources[0]
    again = replace(first, path=str(tmp_path / "again.json"), language="fr")
    if copied:
        shutil.copy(first.path, again.path)
    else:
        os.symlink(first.path, again.path)
    are = f"{again.path} and {first.path} are {'equal' if copied else 'one file'}"
    with pytest.raises(InputError, match=f"data.sources and data.validation have rows in common: {are}; use different"):
        finetune_sft(replace(config, data=replace(config.data, validation=[again])))
    with pytest.raises(InputError, match=f"two of data.sources have rows in common: {are}; name it once"):
        finetune_sft(replace(config, data=replace(config.data, sources=[*config.data.sources, again])))
    assert not Path(config.save).exists()
