"""The loss is the paper's; preferences are learned; runs go on where they were killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import dpo_config, read_metrics
from datasets import load_from_disk
from safetensors.torch import load_file
from trl import DPOConfig as TrlConfig

from megatron_cpt.posttrain.conversations import Message, Preference
from megatron_cpt.posttrain.dpo import DpoConfig, PairTrainer, finetune_dpo, pairs_dataset
from megatron_cpt.posttrain.models import load_trainable_model
from megatron_cpt.posttrain.settings import LoraSettings, RunSettings
from megatron_cpt.posttrain.templates import PairExample, load_template


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of an answer, token by token, without padding."""
    ids = torch.tensor([prompt + answer])
    logits = model(ids).logits[0, :-1].log_softmax(dim=-1)
    return logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def reference_loss(policy: Any, reference: Any, pairs: list[dict[str, Any]], beta: float) -> torch.Tensor:
    """Equation 7 of Rafailov et al. (2023), straightforwardly."""
    losses = []
    for pair in pairs:
        ratios = []
        for side in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                base = log_probability(reference, pair["prompt_ids"], pair[side])
            ratios.append(log_probability(policy, pair["prompt_ids"], pair[side]) - base)
        losses.append(-torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


def make_pairs() -> list[PairExample]:
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 400, (count,), generator=random).tolist()

    origin = Preference((Message("user", "?"),), Message("assistant", "a"), Message("assistant", "b"))
    return [PairExample(ids(3 + i), ids(4 + i % 3), ids(2 + i), origin) for i in range(6)]


@pytest.mark.parametrize("precomputed", [True, False])
def test_the_loss_is_the_papers(chat_model: str, tmp_path: Path, precomputed: bool) -> None:
    """With another model as policy than the reference, and its gradients too."""
    pairs_dataset(make_pairs()).save_to_disk(tmp_path / "pairs")
    dataset = load_from_disk(tmp_path / "pairs")
    policy, reference = load_trainable_model(chat_model), load_trainable_model(chat_model)
    template = load_template(chat_model, "chatml")
    template.tokenizer.pad_token = template.tokenizer.eos_token
    trainer = PairTrainer(
        model=policy,
        ref_model=None if precomputed else reference,
        args=TrlConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, beta=0.3, max_length=None, report_to=[],
            precompute_ref_log_probs=precomputed, per_device_train_batch_size=6, gradient_checkpointing=False,
        ),
        train_dataset=dataset,
        processing_class=template.tokenizer,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    gradient = policy.model.layers[1].mlp.up_proj.weight.grad.clone()
    policy.zero_grad()
    pairs = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in dataset]
    expected = reference_loss(policy, reference, pairs, 0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss.item() - 0.6931) > 0.01
    assert torch.allclose(gradient, policy.model.layers[1].mlp.up_proj.weight.grad, atol=1e-6)


@pytest.fixture(scope="module")
def whole(chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[DpoConfig, Path]:
    config = dpo_config(chat_model, tmp_path_factory.mktemp("dpo"))
    return config, Path(finetune_dpo(config))


def test_preferences_are_learned(whole: tuple[DpoConfig, Path]) -> None:
    config, result = whole
    evaluations = [row for row in read_metrics(Path(config.save)) if any(name.startswith("eval_") for name in row)]
    first, last = ({}, {})
    for row in evaluations:
        (first if row["iteration"] == 0 else last).update(row)
    for language in ("en", "zh"):
        assert first[f"eval_{language}_rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert last[f"eval_{language}_rewards/margins"] > 0.1
        assert last[f"eval_{language}_rewards/accuracies"] == 1.0
    assert json.loads((result / "manifest.json").read_text())["iteration"] == 6
    assert (result / "chat_template.jinja").exists()


def test_a_run_goes_on_where_it_was_ended(whole: tuple[DpoConfig, Path], chat_model: str, tmp_path: Path) -> None:
    """Stopped after four of six steps, as by a signal."""
    import os
    import signal

    from megatron_cpt.posttrain import runner

    config = dpo_config(chat_model, tmp_path)
    original = runner.Stop.on_step_end

    def stopping(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **rest)

    runner.Stop.on_step_end = stopping  # type: ignore[method-assign]
    try:
        assert finetune_dpo(config) == config.save
    finally:
        runner.Stop.on_step_end = original  # type: ignore[method-assign]
    assert json.loads((Path(config.save) / "status.json").read_text()) == {
        "state": "stopped", "iteration": 4, "reason": "SIGTERM",
    }  # fmt: skip
    result = Path(finetune_dpo(config))
    weights, expected = (load_file(path / "model.safetensors") for path in (result, whole[1]))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_adapters_share_the_reference(chat_model: str, tmp_path: Path) -> None:
    """The first loss is that of a policy that is its reference, log 2; nothing is computed beforehand."""
    config = dpo_config(chat_model, tmp_path, lora=LoraSettings(r=4), run=RunSettings())
    finetune_dpo(config)
    rows = read_metrics(Path(config.save))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
