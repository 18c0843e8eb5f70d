"""Documents packed into samples compute what they compute alone, and every counted target weighs the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from tiny_models import VARIANTS, make_tiny_llama

from megatron_cpt.checkpoint.save_load import load_checkpoint
from megatron_cpt.config.run import OptimizerConfig, ParallelConfig
from megatron_cpt.convert.config import HfToMegatron
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.mixture.loader import Batch
from megatron_cpt.model.build import build_model, make_transformer_config
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import RankInfo, process_groups
from megatron_cpt.training.step import StepShape, packed_seq_params, run_schedule, summed_loss, train_step

SEQ_LENGTH = 48  # beyond original_max_position_embeddings, so that rope scaling matters
# Where documents begin in the inputs of the samples of a micro-batch, and the inputs' end.
PACKS = {
    "one sample": [0, 7, 8, 9, 30, 48],
    "one token each": list(range(49)),
    "one document": [0, 48],
    "two samples": [0, 20, 21, 48, 50, 95, 96],
    "a sample without a border": [0, 48, 60, 96],
}


class Trainer:
    """The model in megatron-core's DDP, in a process of its own."""

    def __init__(self, model: DistributedDataParallel, ranks: RankInfo) -> None:
        self.model, self.ranks = model, ranks

    def run(self, batches: list[Batch], seq_length: int) -> tuple[float, float, dict[str, torch.Tensor]]:
        """Summed loss, counted targets and the gradient of their quotient."""
        self.model.zero_grad_buffer()
        shape = StepShape(len(batches), len(batches[0].tokens), seq_length, batches[0].cu_seqlens is not None)
        report, _ = run_schedule([self.model], iter(batches), shape, self.ranks, summed_loss)
        assert report is not None
        loss, targets = report.tolist()
        return loss, targets, {name: p.main_grad.double().cpu() for name, p in self.model.named_parameters()}

    def alone(self, batch: Batch) -> tuple[float, float, dict[str, torch.Tensor]]:
        """The same quantities from every document of a micro-batch, run one by one without packing."""
        inputs, targets = batch.tokens[:, :-1].ravel(), batch.tokens[:, 1:].ravel()
        total, counted = 0.0, 0.0
        gradient = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in self.model.named_parameters()}
        for begin, end in pairwise(batch.cu_seqlens):
            tokens = np.append(inputs[begin:end], targets[end - 1])[None]
            mask = batch.loss_mask.ravel()[None, begin:end].copy()
            loss, count, part = self.run([Batch(tokens, mask, None)], int(end - begin))
            total, counted = total + loss, counted + count
            for name in gradient:
                gradient[name] += part[name] * count
        return total, counted, {name: value / counted for name, value in gradient.items()}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("packed")
    hf = make_tiny_llama(folder / "hf", tiny_tokenizer_dir, **VARIANTS["llama3_rope"])
    checkpoint = hf_to_megatron(HfToMegatron(hf, str(folder / "megatron")))
    llama = read_llama_config(hf)
    with process_groups(ParallelConfig(), alone=True) as ranks:
        config = make_transformer_config(llama, ParallelConfig(), torch.float32)
        config.finalize_model_grads_func = finalize_model_grads
        model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            build_model(llama, config, SEQ_LENGTH, current_platform(), ranks),
        )
        load_checkpoint(checkpoint, [model.module])
        yield Trainer(model, ranks)


def make_packed(cu_seqlens: list[int], eod_mask_loss: bool, seed: int = 1) -> Batch:
    """Random tokens as a packed micro-batch."""
    samples = cu_seqlens[-1] // SEQ_LENGTH
    tokens = np.random.default_rng(seed).integers(0, 400, (samples, SEQ_LENGTH + 1))
    mask = np.ones(samples * SEQ_LENGTH, np.float32)
    if eod_mask_loss:
        mask[np.array(cu_seqlens[1:]) - 1] = 0
    return Batch(tokens, mask.reshape(samples, SEQ_LENGTH), np.array(cu_seqlens, np.int32))


def unpacked(batch: Batch) -> Batch:
    return Batch(batch.tokens, batch.loss_mask, None)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all parameters, relative to the largest entry of each one's gradient."""
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


@pytest.mark.parametrize(
    ("pack", "eod_mask_loss"),
    [(pack, mask) for pack in PACKS for mask in (False, True) if not (mask and pack == "one token each")],
)
def test_packed_documents_compute_what_they_compute_alone(trainer: Trainer, pack: str, eod_mask_loss: bool) -> None:
    batch = make_packed(PACKS[pack], eod_mask_loss)
    loss, targets, gradient = trainer.run([batch], SEQ_LENGTH)
    alone, alone_targets, alone_gradient = trainer.alone(batch)
    assert targets == alone_targets == batch.loss_mask.sum()
    assert loss / targets == pytest.approx(alone / alone_targets, rel=1e-5, abs=0)
    assert largest_difference(gradient, alone_gradient) <= 1e-5
    if pack == "one document":
        assert loss == pytest.approx(trainer.run([unpacked(batch)], SEQ_LENGTH)[0], rel=1e-6)
    else:  # attention across documents gives something else
        across, _, across_gradient = trainer.run([unpacked(batch)], SEQ_LENGTH)
        assert abs(across - loss) > 1e-3 * loss
        assert largest_difference(across_gradient, gradient) > 1e-2


def test_every_counted_target_of_the_global_batch_weighs_the_same(trainer: Trainer) -> None:
    """Not a mean of the micro-batches' means: one of these counts 43 targets, the other 5."""
    many, few = make_packed(PACKS["one sample"], True), make_packed(PACKS["one document"], False, seed=2)
    few.loss_mask[:, 5:] = 0
    loss, targets, gradient = trainer.run([many, few], SEQ_LENGTH)
    parts = [trainer.run([batch], SEQ_LENGTH) for batch in (many, few)]
    assert [part[1] for part in parts] == [43, 5]
    assert (loss, targets) == (pytest.approx(sum(part[0] for part in parts), rel=1e-6), 48)
    weighted = {name: (parts[0][2][name] * 43 + parts[1][2][name] * 5) / 48 for name in gradient}
    mean_of_means = {name: (parts[0][2][name] + parts[1][2][name]) / 2 for name in gradient}
    assert largest_difference(gradient, weighted) <= 1e-5
    assert largest_difference(gradient, mean_of_means) > 1e-2


def test_without_masks_it_is_the_mean_over_all_targets(trainer: Trainer) -> None:
    batches = [unpacked(make_packed(PACKS["two samples"], False, seed)) for seed in (1, 2)]
    loss, targets, gradient = trainer.run(batches, SEQ_LENGTH)
    module = trainer.model.module
    tokens = torch.from_numpy(np.concatenate([batch.tokens for batch in batches])).to(trainer.ranks.device)
    mean = module(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous()).mean()
    trainer.model.zero_grad_buffer()
    mean.backward()
    expected = {name: parameter.main_grad.double().cpu() for name, parameter in trainer.model.named_parameters()}
    assert (targets, loss / targets) == (4 * SEQ_LENGTH, pytest.approx(mean.item(), rel=1e-6))
    assert largest_difference(gradient, expected) <= 1e-5


def test_a_target_that_does_not_count_changes_nothing(trainer: Trainer) -> None:
    batch = make_packed(PACKS["two samples"], True)
    other = Batch(batch.tokens.copy(), batch.loss_mask, batch.cu_seqlens)
    other.tokens[:, -1] += 1  # the last target of each sample; it is no input
    (loss, _, gradient), (other_loss, _, other_gradient) = (trainer.run([b], SEQ_LENGTH) for b in (batch, other))
    assert loss == other_loss
    assert all(torch.equal(gradient[name], other_gradient[name]) for name in gradient)


def test_a_step_in_which_nothing_counts_changes_nothing(trainer: Trainer) -> None:
    class Optimizer:
        param_groups: tuple[dict[str, float], ...] = ()

        def zero_grad(self) -> None:
            pass

    batch = make_packed(PACKS["one token each"], True)
    shape = StepShape(1, 1, SEQ_LENGTH, packed=True)
    result = train_step([trainer.model], Optimizer(), iter([batch]), shape, 1e-3, OptimizerConfig(), trainer.ranks)
    assert result.skip_reason == "no target of the global batch counts"


@pytest.mark.parametrize("packed", [False, True])
def test_batches_that_are_not_as_said_are_refused(trainer: Trainer, packed: bool) -> None:
    batch = make_packed(PACKS["one sample"], True)
    batch = unpacked(batch) if packed else batch
    with pytest.raises(ValueError, match=f"packed is {packed} but a batch came with"):
        run_schedule([trainer.model], iter([batch]), StepShape(1, 1, SEQ_LENGTH, packed), trainer.ranks, summed_loss)


def test_positions_restart_with_each_document(trainer: Trainer) -> None:
    """The same document twice has the same rotated queries; outputs cannot tell, for they follow position differences."""
    batch = make_packed([0, 24, 48], True)
    inputs = torch.from_numpy(batch.tokens[:, :-1]).to(trainer.ranks.device)
    inputs[:, 24:] = inputs[:, :24]
    module = trainer.model.module
    queries: list[torch.Tensor] = []
    attention = module.decoder.layers[0].self_attention.core_attention
    hook = attention.register_forward_pre_hook(lambda _, arguments: queries.append(arguments[0].detach()))
    packing = packed_seq_params(batch.cu_seqlens, trainer.ranks.device)
    assert packing.max_seqlen_q == packing.max_seqlen_kv == 24
    module(inputs, None, None, packed_seq_params=packing)
    packing.max_seqlen_q = packing.max_seqlen_kv = SEQ_LENGTH  # which megatron-core takes for absolute positions
    module(inputs, None, None, packed_seq_params=packing)
    hook.remove()
    restarting, absolute = ((query[:24] - query[24:]).abs().max() for query in queries)
    assert restarting <= 1e-6
    assert absolute > 1e-2
