"""Every example counts once on any number of processes, and every step has the learning rate that was asked for."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import conversations, dpo_config, preferences, read_metrics, sft_config, write_config
from datasets import Dataset
from tiny_models import run_tool
from trl import DPOConfig as TrlConfig

from megatron_cpt.posttrain.chat import chat
from megatron_cpt.posttrain.dpo import LOSS_OF_FILLERS, DpoConfig, PairTrainer, filler_pair, finetune_dpo, loss_of
from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.posttrain.settings import ChatConfig, OptimizerSettings, RunSettings, TrainingSettings
from megatron_cpt.posttrain.sft import SftConfig, fillers_in, finetune_sft
from megatron_cpt.posttrain.template_files import CHATML
from megatron_cpt.posttrain.templates import IGNORED, load_template
from megatron_cpt.posttrain.trainers import EpochSampler, own_batches, share_of_rate

# Figures that do not depend on how pairs and conversations lie in batches
EXACT = ("loss", "num_tokens", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def figures(folder: Path) -> list[dict[str, float]]:
    """Of each step and evaluation of a run."""
    rows = [row for row in read_metrics(folder) if "train_runtime" not in row]
    return [
        {name: value for name, value in row.items() if name in EXACT or (name.startswith("eval_") and name.endswith(EXACT))}
        for row in rows
    ]


def assert_two_processes_do_what_one_does(config: SftConfig | DpoConfig, folder: Path) -> None:
    finetune: Any = finetune_sft if isinstance(config, SftConfig) else finetune_dpo
    finetune(replace(config, save=str(folder / "one")))
    path = write_config(replace(config, save=str(folder / "two")), folder / "config.yaml")
    run_tool(f"{finetune.__name__}.py", "--config", path, processes=2)
    one, two = figures(folder / "one"), figures(folder / "two")
    assert len(one) == len(two) > 3
    for mine, theirs in zip(two, one, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.endswith("accuracies") and abs(theirs[name.replace("accuracies", "margins")]) < 1e-5:
                continue  # of the model that is the reference: tossed by rounding
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name


@pytest.mark.parametrize("packing", [pytest.param(True, marks=pytest.mark.slow), False])
def test_sft_counts_each_conversation_once(chat_model: str, tmp_path: Path, packing: bool) -> None:
    """Of which two processes have one too few for the last step, and one has one too few to evaluate."""
    config = sft_config(chat_model, tmp_path, packing=packing)
    training = TrainingSettings(epochs=2, micro_batch_size=1, global_batch_size=4)
    # 48 conversations; validation takes 2 x 3 of them, and ALMR 1.0 those of one language, of which 21 stay
    data = replace(config.data, almr=1.0, max_length=48)
    assert len(conversations("zh")) == 24
    optimizer = OptimizerSettings(lr=1e-3, warmup_fraction=0.3)
    config = replace(config, data=data, training=training, optimizer=optimizer, run=RunSettings())
    assert_two_processes_do_what_one_does(config, tmp_path)


def test_dpo_counts_each_pair_once(chat_model: str, tmp_path: Path) -> None:
    """With two at a time: the last step has a batch of one pair, and one of fillers only."""
    training = TrainingSettings(epochs=1, micro_batch_size=2, global_batch_size=8)
    config = dpo_config(chat_model, tmp_path, training=training, run=RunSettings())
    assert len(preferences("zh")) == 24
    config = replace(config, data=replace(config.data, almr=1.0))  # 21 pairs, 3 of each language to evaluate on
    assert_two_processes_do_what_one_does(config, tmp_path)


PAIR = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10], "ref_chosen_logps": -3.0,
        "ref_rejected_logps": -9.0}  # fmt: skip


def pair_trainer(chat_model: str, tmp_path: Path, config: DpoConfig) -> PairTrainer:
    """To train with PAIR, whose reference is known."""
    template = load_template(chat_model, "chatml")
    template.tokenizer.pad_token = template.tokenizer.eos_token
    trainer = PairTrainer(
        model=load_trainable_model(chat_model),
        args=TrlConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.3, report_to=[], **loss_of(config)),
        train_dataset=Dataset.from_list([PAIR]),
        processing_class=template.tokenizer,
    )
    trainer.precompute_ref_logps = True
    return trainer


@pytest.mark.parametrize("kind", sorted(LOSS_OF_FILLERS))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_filler_changes_no_loss(chat_model: str, tmp_path: Path, kind: Any, smoothing: float) -> None:
    """Whatever the loss and the model, neither its value nor its gradient."""
    if smoothing and kind not in ("sigmoid", "robust"):
        pytest.skip("it has no smoothing")
    config = replace(dpo_config(chat_model, tmp_path), beta=0.3, loss_type=kind, label_smoothing=smoothing)
    trainer = pair_trainer(chat_model, tmp_path, config)
    losses, gradients = [], []
    for batch in ([PAIR], [PAIR, filler_pair(PAIR), filler_pair(PAIR)]):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.model.lm_head.weight.grad.clone())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_figures_are_means_of_pairs(chat_model: str, tmp_path: Path) -> None:
    """Of those that were counted since the last line of the log, fillers left out."""
    config = dpo_config(chat_model, tmp_path)
    trainer = pair_trainer(chat_model, tmp_path, config)
    trainer.model.train()
    for batch in ([PAIR], [PAIR, PAIR, filler_pair(PAIR)]):
        trainer.compute_loss(trainer.model, trainer.data_collator(batch))
    trainer.log({})
    figures = trainer.state.log_history[-1]
    assert figures["rewards/accuracies"] in (0.0, 1.0)  # three times the same pair
    margin = figures["rewards/chosen"] - figures["rewards/rejected"]
    assert figures["rewards/margins"] == pytest.approx(margin, abs=1e-5)
    trainer.compute_loss(trainer.model, trainer.data_collator([PAIR]))
    trainer.log({})
    for name in ("rewards/chosen", "rewards/margins", "logps/chosen"):
        assert trainer.state.log_history[-1][name] == pytest.approx(figures[name], rel=1e-4)


def test_fillers_are_found_in_padded_and_in_packed_batches() -> None:
    rows = torch.tensor([[IGNORED, 3, IGNORED], [IGNORED] * 3, [IGNORED, IGNORED, 4], [IGNORED] * 3])
    assert fillers_in({"labels": rows}) == 2
    packed = {"labels": torch.tensor([[IGNORED, 3, IGNORED, IGNORED, IGNORED, 4, IGNORED, IGNORED]])}
    packed["position_ids"] = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]])
    assert fillers_in(packed) == 2


def test_an_epoch_has_every_example_once_and_fillers_at_its_end() -> None:
    sampler = EpochSampler(5, 3, 7)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first[:5]) == [0, 1, 2, 3, 4]
    assert first[5:] == [5, 6, 7]
    assert len(sampler) == 8
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(5, 3, 8)) == list(sampler), "seed and epoch add up, as accelerate's do"


def test_all_processes_evaluate_as_many_batches_of_one_size() -> None:
    examples = Dataset.from_list([{"x": number} for number in range(7)])
    filler = {"x": -1, "y": 0}
    found = []
    for rank in range(3):
        arguments: Any = type("Arguments", (), {"per_device_eval_batch_size": 2, "world_size": 3, "process_index": rank})
        found.append([[row["x"] for row in batch] for batch in own_batches(examples, arguments, filler)])
    assert found == [[[0, 3], [6]], [[1, 4], [-1]], [[2, 5], [-1]]]


@pytest.mark.parametrize(
    ("style", "full"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
def test_every_step_has_a_learning_rate(style: str, full: Any, warmup: int) -> None:
    """The first of four warm-up steps a quarter of it, the fourth all, and none has none."""
    rates = [share_of_rate(style, step, warmup, 10) for step in range(1, 11)]
    assert rates[: max(warmup, 1)] == [step / max(warmup, 1) for step in range(1, max(warmup, 1) + 1)]
    peak = max(warmup, 1)
    assert rates[peak:] == pytest.approx([full((step - peak) / (11 - peak)) for step in range(peak + 1, 11)])
    assert min(rates) > 0
    assert share_of_rate(style, 1, 0, 0) == 1.0  # a run of which all steps are done


@pytest.mark.parametrize("tool", ["sft", "dpo"])
def test_a_tokenizer_without_an_end_of_text_pads_with_the_end_of_a_turn(
    chat_model: str, tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What padding is does not count; the folder that is written can be talked with."""
    model = Path(shutil.copytree(chat_model, tmp_path / "model"))
    (model / "tokenizer_config.json").unlink()
    (model / "chat_template.jinja").write_text(CHATML)
    changes: dict[str, Any] = {"training": TrainingSettings(max_steps=1, micro_batch_size=2, global_batch_size=4)}
    made = {"sft": sft_config, "dpo": dpo_config}[tool]
    config: Any = made(str(model), tmp_path, **changes | ({"packing": False} if tool == "sft" else {}))
    finetune: Any = {"sft": finetune_sft, "dpo": finetune_dpo}[tool]
    result = Path(finetune(replace(config, data=replace(config.data, chat_template=None))))
    known = replace(config, model=chat_model, save=str(tmp_path / "known"))
    finetune(known)
    assert figures(Path(config.save)) == figures(Path(known.save))
    generation, tokens = (json.loads((result / f"{n}_config.json").read_text()) for n in ("generation", "tokenizer"))
    end = load_template(str(result), None).end_of_turn
    assert end in generation["eos_token_id"]
    assert generation["pad_token_id"] == end
    assert tokens["pad_token"] == "<|im_end|>"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    chat(ChatConfig(str(result), max_new_tokens=3))
    assert "[3 tokens" in capfd.readouterr().err
