"""The process groups of a run: megatron-core's parallel_state is touched here and nowhere else."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.config.cli import launched_world_size
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.platforms import prepare_platform


@dataclass(frozen=True)
class RankInfo:
    """Rank and size of this process in each parallel dimension, its device, and what all ranks do together."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    device: torch.device
    model_parallel_group: dist.ProcessGroup | None
    """Gloo group of the ranks that compute the same samples of the same stage (tensor and context parallel); None: alone."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding; reads input tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer; computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reads_tokens(self) -> bool:
        """Its stage has inputs to embed or targets to compare with."""
        return self.is_first_stage or self.is_last_stage

    @property
    def is_rank_zero(self) -> bool:
        """Speaks for the run."""
        return self.rank == 0

    def model_parallel_any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank of `model_parallel_group`: on the host, so that no device is waited for."""
        if self.model_parallel_group is None:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.model_parallel_group)
        return bool(value.item())

    def all_gather_object(self, thing: Any) -> list[Any]:
        """What each rank passed, in the order of ranks, on every rank; all ranks call this."""
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; all ranks call this."""
        told = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    def reduce_from_last_pipeline_stage(self, values: torch.Tensor, *flags: bool) -> tuple[list[float], list[bool]]:
        """Sums over data-parallel replicas of `values` as the last pipeline stages have them; the same on every rank.

        `values` (1-D) counts on the last stage only; tensor-parallel ranks there hold equal copies, so the first speaks;
        context-parallel ranks hold different parts of their samples, so all speak. `flags`: whether each is set on any rank.
        """
        if not (self.is_last_stage and self.tensor_rank == 0):
            values = torch.zeros_like(values)
        told = torch.cat([values, torch.tensor(flags, dtype=values.dtype, device=values.device)])
        dist.all_reduce(told)
        numbers = told.tolist()
        return numbers[: len(values)], [number > 0 for number in numbers[len(values) :]]


def job_store() -> dist.Store:
    """What the processes of the job have found each other through: it also carries messages, without collectives."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def gloo_model_parallel_group() -> dist.ProcessGroup | None:
    """This rank's group of tensor x context parallel ranks, over gloo also where these talk NCCL; None if it is alone."""
    from megatron.core import parallel_state

    own = sorted(dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group()))
    if len(own) == 1:
        return None
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    mine = None
    for ranks in sorted({tuple(ranks) for ranks in everyone}):  # every process has to make every group
        group = dist.new_group(list(ranks), backend="gloo")
        if dist.get_rank() in ranks:
            mine = group
    return mine


def ranks_here(device: torch.device, model_parallel_group: dist.ProcessGroup | None) -> RankInfo:
    """Where this process stands in megatron-core's groups."""
    from megatron.core import parallel_state

    return RankInfo(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        device=device,
        model_parallel_group=model_parallel_group,
    )


def bound_store(environment: Mapping[str, str]) -> dist.Store | None:
    """The first rank's store of the job, listening on the job's address alone: torch's own listens on all of the machine.

    None on other ranks, under torchrun, whose store it is, and where that address is not known to reach all ranks: there
    torch makes the store, or joins it.
    """
    if environment.get("RANK") != "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    world_size = environment.get("WORLD_SIZE", "")
    if not (host and port.isdecimal() and world_size.isdecimal()):
        return None
    local = environment.get("LOCAL_WORLD_SIZE") == world_size or environment.get("SLURM_NNODES") == "1"
    listener = listening_socket(host, int(port), loopback=local or is_loopback(host))
    if listener is None:
        return None
    store = dist.TCPStore(
        host,
        int(port),
        int(world_size),
        True,
        dist.default_pg_timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    return dist.PrefixStore("default_pg", store)  # the name under which the other ranks, by torch's own way, look for it


def listening_socket(host: str, port: int, loopback: bool) -> socket.socket | None:
    """A socket that listens on the address of `host`; None if it is none of this machine's, is taken, or only loopback."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        if is_loopback(str(address[0])) and not loopback:
            continue  # as Debian's /etc/hosts has the machine's own name: other machines have to reach it
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError:
            listener.close()
            continue
        return listener
    return None


def is_loopback(host: str) -> bool:
    """Whether a name or an address reaches this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, seed: int = 1234, alone: bool = False) -> Iterator[RankInfo]:
    """Join the groups that torchrun's environment describes, for the length of the block.

    A group of one if there is no such environment, or if `alone` says to ignore it (a conversion inside a job).
    """
    platform = prepare_platform()
    from megatron.core import parallel_state, tensor_parallel

    device = platform.device(int(os.environ.get("LOCAL_RANK", "0")))
    if alone or "WORLD_SIZE" not in os.environ:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        store = bound_store(os.environ)
        if store is None:
            dist.init_process_group(platform.backend)
        else:
            dist.init_process_group(platform.backend, store=store, rank=0, world_size=launched_world_size())
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield ranks_here(device, gloo_model_parallel_group())
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
