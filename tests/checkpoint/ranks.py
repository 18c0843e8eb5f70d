"""A few processes that hold a small model in some layout, for tests of what all ranks do together.

They are forked from a server that has imported everything and never joined a process group: gloo does not survive a fork.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_cpt.checkpoint.layout import read_hf_files
from megatron_cpt.checkpoint.save_operation import Request, SaveOperation
from megatron_cpt.checkpoint.staging import live_tensors
from megatron_cpt.checkpoint.state import Progress
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.model.build import make_transformer_config, mark_tensor_parallel
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.platforms import prepare_platform


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    chunks: int | None = None  # of an interleaved pipeline, per rank

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Trained:
    """What a run would save."""

    chunks: list[GPTModel]
    optimizer: MegatronOptimizer
    hf: str

    def request(self, root: str, iteration: int) -> Request:
        return Request(
            root, self.chunks, self.optimizer, read_hf_files(self.hf), {"kind": "test"}, Progress(iteration, 8 * iteration)
        )

    def save(self, root: str, iteration: int) -> str:
        attempt = SaveOperation(self.request(root, iteration))
        attempt.finish()
        return attempt.folder


def run_ranks(
    layout: Layout, job: Callable[..., Any], *arguments: Any, timeout: float = 100, check: bool = True
) -> list[Any]:
    """Run `job(rank, *arguments)`, a function of a module, in a group of processes; returns what each returned.

    With check=False a process that died or failed gives None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_cpt.checkpoint.saver", "hypothesis", "pytest"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(folder, layout, rank, job, arguments, 0.9 * timeout))
            for rank in range(layout.world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        outcomes = []
        for rank, process in enumerate(processes):
            path = Path(folder) / f"result{rank}"
            value, error = pickle.loads(path.read_bytes()) if path.exists() else (None, f"exit code {process.exitcode}")
            if error and check:
                raise AssertionError(f"rank {rank}: {error}")
            outcomes.append(value)
        return outcomes


def _run(
    folder: str, layout: Layout, rank: int, job: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
) -> None:
    torch.set_num_threads(1)
    prepare_platform()
    faulthandler.dump_traceback_later(timeout)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), layout.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world_size)
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, virtual_pipeline_model_parallel_size=layout.chunks
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        outcome = (job(rank, *arguments), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    path = Path(folder) / f"result{rank}"
    path.with_suffix(".tmp").write_bytes(pickle.dumps(outcome))
    path.with_suffix(".tmp").rename(path)
    os._exit(0)


def build(hf: str, layout: Layout, step: bool = True) -> Trained:
    """The model chunks of this rank, wrapped and with an optimizer, after one made-up step if asked."""
    platform = prepare_platform()
    llama = read_llama_config(hf)
    parallel = ParallelConfig(tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline)
    config = make_transformer_config(llama, parallel, torch.float32)
    config.virtual_pipeline_model_parallel_size = layout.chunks
    chunks = []
    for stage in range(layout.chunks or 1):
        vp_stage = stage if layout.chunks else None
        model = GPTModel(
            config=config,
            transformer_layer_spec=platform.block_spec(config, vp_stage),
            vocab_size=llama.vocab_size,
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=layout.chunks is None, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=layout.chunks is None, vp_stage=vp_stage),
            share_embeddings_and_output_weights=llama.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        mark_tensor_parallel(model)
        chunks.append(model)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, bucket_size=40_000)
    wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, params_dtype=torch.float32, use_distributed_optimizer=True), wrapped
    )
    trained = Trained(chunks, optimizer, hf)
    if step:
        fake_step(trained, seed=0, weights=True)
    return trained


def fake_step(trained: Trained, seed: int, weights: bool = False) -> None:
    """An optimizer step with random gradients, the same in all data-parallel replicas; first random weights if asked."""
    generator = torch.Generator()
    with torch.no_grad():
        for chunk in trained.chunks:
            for name, param in chunk.named_parameters():
                place = (getattr(chunk, "vp_stage", None) or 0, parallel_state.get_pipeline_model_parallel_rank())
                generator.manual_seed(abs(hash((name, *place, seed))) % 2**31)
                if weights:
                    param.normal_(generator=generator)
                param.main_grad.normal_(generator=generator)
    if weights:
        trained.optimizer.reload_model_params()
    trained.optimizer.step()


def fill(trained: Trained, value: float) -> None:
    """Set everything that a checkpoint holds to one number."""
    with torch.no_grad():
        for tensor in live_tensors(trained.chunks, trained.optimizer):
            tensor.fill_(value)


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, through megatron-core's own reader."""
    return run_ranks(Layout(), _read, folder)[0]


def _read(rank: int, folder: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in dist_checkpointing.load_plain_tensors(folder).items() if torch.is_tensor(x)}
