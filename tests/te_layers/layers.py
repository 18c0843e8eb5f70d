"""The processes of test_layers.py: `python layers.py TASKS.json` imports what takes long, once, and forks each task's ranks.

Each rank builds its part of the model from Transformer Engine's layers and from torch's, loads a checkpoint into both,
compares, and saves the former. The first rank writes what was found to the task's `result`; what a task's ranks print, and
their errors, are in its `log`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from forks import free_ports
from stand_in import install

# Where torch's layers have these norms Transformer Engine has them inside of the linear layers behind them.
RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
UNTOUCHED = -7.0  # what parameters hold that nothing has been loaded into


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block Transformer Engine believes that there is one: its layers refuse to be built without."""
    was = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = was


def prepare(folder: str) -> None:
    """Import Transformer Engine from `folder`, megatron-core with it, and the product, which would hide it on a CPU."""
    install(folder)
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    shown = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformer_engine"}
    from megatron_cpt.platforms import prepare_platform

    prepare_platform()
    sys.modules.update(shown)
    import megatron_cpt.checkpoint.save_operation
    import megatron_cpt.model.build
    import megatron_cpt.platforms.process_groups  # noqa: F401


def run_all(tasks: Sequence[dict[str, Any]]) -> None:
    """Run each task in processes of its own."""
    for task, port in zip(tasks, free_ports(), strict=False):
        ranks = [fork(task, rank, port) for rank in range(task["processes"])]
        for pid in ranks:
            os.waitpid(pid, 0)


def fork(task: dict[str, Any], rank: int, port: int) -> int:
    """Start a rank of a task; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= task["environment"]
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        found = main(task)
        if rank == 0:
            Path(task["result"]).write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Compare and save, as the task asks for; what was found."""
    from megatron_cpt.checkpoint.layout import read_hf_files
    from megatron_cpt.checkpoint.save_operation import Request, SaveOperation
    from megatron_cpt.checkpoint.state import Progress
    from megatron_cpt.config.parallel import ParallelConfig
    from megatron_cpt.convert.hf_weights import extra_states, pieces_of
    from megatron_cpt.model.dtypes import dtype_of
    from megatron_cpt.model.llama import read_llama_config
    from megatron_cpt.platforms import current_platform
    from megatron_cpt.platforms.cuda import CudaPlatform
    from megatron_cpt.platforms.process_groups import process_groups

    llama, dtype = read_llama_config(task["hf"]), dtype_of(task["dtype"])
    with process_groups(ParallelConfig(**task["parallel"]), alone=not task["parallel"]) as ranks:
        theirs = loaded(task, "transformer_engine", CudaPlatform(), ranks)
        compared = compare(theirs, loaded(task, "local", current_platform(), ranks))
        SaveOperation(
            Request(task["save"], theirs, None, read_hf_files(task["hf"]), {"kind": "test"}, Progress(1, 1))
        ).finish()
        everything = ranks.all_gather_object((compared, keys_of(theirs)))
    keys = set().union(*(keys for _, keys in everything))
    known = {piece.chunk.key for piece in pieces_of(llama, dtype)} | set(extra_states(llama))
    return {
        "compared": sum(count for count, _ in everything),
        "keys": len(keys),
        "unknown_keys": sorted(keys - known),
        "missing_keys": sorted(known - keys),
        "layers": sorted({type(module).__name__ for chunk in theirs for module in chunk.modules()}),
    }


def loaded(task: dict[str, Any], transformer_impl: str, platform: Any, ranks: Any) -> list[Any]:
    """This rank's model chunks with a platform's layers and the checkpoint's weights."""
    from megatron_cpt.checkpoint.save_load import load_checkpoint
    from megatron_cpt.config.parallel import ParallelConfig
    from megatron_cpt.model.build import Numerics, build_chunks, make_transformer_config
    from megatron_cpt.model.dtypes import dtype_of
    from megatron_cpt.model.llama import read_llama_config

    llama, dtype = read_llama_config(task["hf"]), dtype_of(task["dtype"])
    on_gpu = transformer_impl == "transformer_engine"
    numerics = Numerics(**(task.get("numerics", {}) if on_gpu else {}), transformer_impl=transformer_impl)
    config = make_transformer_config(llama, ParallelConfig(**task["parallel"]), dtype, numerics)
    with as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        chunks = build_chunks(llama, config, 64, platform, ranks)
    with torch.no_grad():
        for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
            parameter.fill_(UNTOUCHED)
    load_checkpoint(task["checkpoint"], chunks)
    return chunks


def compare(theirs: Sequence[Any], ours: Sequence[Any]) -> int:
    """Assert that two models have the same parameters, with the same marks; their number."""
    wanted = {}
    for place, chunk in enumerate(ours):
        for name, parameter in chunk.named_parameters():
            for before, after in RENAMED.items():
                name = name.replace(before, after)
            wanted[place, name] = parameter
    found = {(place, name): one for place, chunk in enumerate(theirs) for name, one in chunk.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
        assert not bool((parameter == UNTOUCHED).all()), name
        for mark in ("tensor_model_parallel", "sequence_parallel"):
            assert getattr(parameter, mark, False) == getattr(wanted[name], mark, False), (name, mark)
    return len(found)


def keys_of(chunks: Sequence[Any]) -> set[str]:
    """What a checkpoint of this rank's model has, by megatron-core's names."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    values = itertools.chain.from_iterable(chunk.sharded_state_dict().values() for chunk in chunks)
    return {value.unique_key if isinstance(value, ShardedObject) else value.key for value in values}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    prepare(given["folder"])
    run_all(given["tasks"])
