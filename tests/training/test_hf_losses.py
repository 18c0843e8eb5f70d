"""A converted model has transformers' loss in every layout; biases and padded vocabularies train like in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import Forks
from layout_cases import FP32, Case
from tiny_models import VARIANTS, read_rows
from tiny_runs import Layout, Runs

from megatron_cpt.checkpoint.hf_files import HfTensors
from megatron_cpt.convert.config import MegatronToHf
from megatron_cpt.convert.convert import megatron_to_hf
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus

CASES = [Case(), Case(tp=2, sp=True), Case(pp=2), Case(tp=2, pp=2)]
SEQ_LENGTH = 64


def transformers_loss(hf: Path, prefix: str) -> float:
    """Mean loss of the corpus' whole samples, whose last target is the first input of the next sample."""
    from transformers import LlamaForCausalLM

    corpus = IndexedCorpus(prefix)
    tokens = torch.cat([torch.tensor(corpus[i].astype("int64")) for i in range(len(corpus))])
    samples = (len(tokens) - 1) // SEQ_LENGTH
    inputs, targets = (tokens[i : i + samples * SEQ_LENGTH].view(samples, SEQ_LENGTH) for i in (0, 1))
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)(inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


@pytest.mark.parametrize("variant", ["tied", "attention_bias", "mlp_bias", "odd_vocabulary"])
def test_losses_are_those_of_transformers_in_every_layout(
    variant: str, tmp_path: Path, tiny_tokenizer_dir: str, forks: Forks
) -> None:
    runs = Runs(tmp_path, tiny_tokenizer_dir, **VARIANTS[variant])
    expected = {name: transformers_loss(tmp_path / "hf", str(tmp_path / f"{name}_valid")) for name in ("en", "zh")}
    single: list[float] = []
    for case in CASES:
        config = runs.configure(str(case), Layout())
        argv = ["--config", config, "--training.train_iters=3", *case.arguments]
        forks.start(argv, tmp_path / f"{case}.log", case.processes).finish()
        rows = read_rows(tmp_path / str(case))
        for name, result in rows[0]["validation"].items():
            assert result["loss"] == pytest.approx(expected[name], rel=1e-5), (case, name)
        losses = [row["loss"] for row in rows if "loss" in row]
        assert losses[0] == pytest.approx(sum(expected.values()) / 2, rel=0.05), "an untrained model finds all text as hard"
        single = single or losses
        assert losses == pytest.approx(single, rel=FP32["loss"], abs=0), case
        back = megatron_to_hf(MegatronToHf(str(tmp_path / str(case)), str(tmp_path / f"{case}-hf")))
        trained, before = HfTensors(back), HfTensors(str(tmp_path / "hf"))
        assert trained.shapes() == before.shapes(), "padding has to stay behind"
        for name in before:
            assert not torch.equal(trained[name], before[name]), f"{name} was not trained"


def test_a_padded_vocabulary_resumes_in_another_layout(tmp_path: Path, tiny_tokenizer_dir: str, forks: Forks) -> None:
    """401 words: 402 rows in two parts, none to spare in one; weights and optimizer states both ways."""
    runs = Runs(tmp_path, tiny_tokenizer_dir, **VARIANTS["odd_vocabulary"])

    def run(case: Case, name: str) -> list[float]:
        argv = ["--config", runs.configure(name, Layout()), "--training.train_iters=4", *case.arguments]
        forks.start(argv, tmp_path / f"{name}.log", case.processes).finish()
        return [row["loss"] for row in read_rows(tmp_path / name) if "loss" in row]

    one, two = Case(), Case(tp=2, sp=True)
    wanted = {one: run(one, "one"), two: run(two, "two")}
    for saved, resumed in ((one, two), (two, one)):
        name = f"{saved}-then-{resumed}"
        runs.interrupted(tmp_path / ("one" if saved == one else "two"), name)
        assert run(resumed, name) == pytest.approx(wanted[saved], rel=FP32["loss"], abs=0)
