"""The recipes and accelerate's configurations that come with the project are valid, and fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_models import ROOT

from megatron_cpt.config.cli import read_arguments
from megatron_cpt.posttrain.dpo import DpoConfig
from megatron_cpt.posttrain.run_files import accumulation
from megatron_cpt.posttrain.sft import SftConfig
from megatron_cpt.utils.errors import InputError

EXAMPLES = ROOT / "examples"
ACCELERATE = EXAMPLES / "posttrain" / "accelerate"
CONFIGURATIONS = sorted(ACCELERATE.glob("*.yaml"))


def read_recipe(name: str, *options: str) -> Any:
    """As the tools read it."""
    kind = SftConfig if name.endswith("sft") else DpoConfig
    return read_arguments(kind, ["--config", str(EXAMPLES / f"{name}.yaml"), *options])


def launch_arguments(path: Path, *options: str) -> Any:
    """What `accelerate launch` makes of a configuration."""
    words = ["--config_file", str(path), *options, "tools/finetune_sft.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_them(path: Path) -> None:
    kind, gpus = path.stem.removesuffix("gpu").split("_")
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines) == (int(gpus), int(gpus) // 8)
    assert (config.mixed_precision, config.use_cpu) == ("bf16", False)
    if kind == "fsdp":
        assert config.distributed_type is DistributedType.FSDP
        assert config.fsdp_config == {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_activation_checkpointing": True,
            "fsdp_offload_params": False,
        }
    else:
        assert config.distributed_type is DistributedType.DEEPSPEED
        assert config.deepspeed_config["zero_stage"] == 3
        assert config.deepspeed_config["zero3_init_flag"]
        assert config.deepspeed_config["zero3_save_16bit_model"]


def test_there_are_all_four() -> None:
    names = [path.stem for path in CONFIGURATIONS]
    assert names == ["deepspeed_128gpu", "deepspeed_8gpu", "fsdp_128gpu", "fsdp_8gpu"]


@pytest.mark.parametrize("gpus", [8, 128])
def test_what_accelerate_starts(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes on each machine, with FSDP in their environment."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--main_process_ip", "localhost", "--main_process_port", "0", "--machine_rank", "0"]
    arguments = launch_arguments(ACCELERATE / f"fsdp_{gpus}gpu.yaml", *options)
    assert arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, int(getattr(arguments, "nnodes", None) or 1)) == ("8", gpus // 8)
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }
    assert {name: environment[name].lower() for name in expected} == {k: v.lower() for k, v in expected.items()}


def test_zero_3_leaves_batches_and_clipping_to_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number here that is not the recipe's would be an error of transformers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = launch_arguments(ACCELERATE / "deepspeed_8gpu.yaml")
    assert (arguments.use_deepspeed, arguments.num_processes, arguments.zero_stage) == (True, 8, 3)
    assert arguments.gradient_accumulation_steps is None
    assert arguments.gradient_clipping is None


RUNS = [  # recipe, GPUs, options, micro batches of a GPU in a step
    ("llama3_8b/sft", 8, [], 16),
    ("llama3_8b/sft", 128, [], 1),
    ("llama3_70b/sft", 128, [], 1),
    ("llama3_8b/dpo", 8, [], 8),
    ("llama3_8b/dpo", 64, [], 1),
    ("llama3_8b/dpo", 128, ["--training.micro_batch_size", "1"], 1),
    ("llama3_70b/dpo", 128, [], 1),
    ("llama3_70b/dpo", 64, ["--training.micro_batch_size", "2"], 1),
    ("llama3_70b/dpo", 8, ["--lora.r", "16"], 16),
]


@pytest.mark.parametrize(("name", "gpus", "options", "expected"), RUNS)
def test_batches_fit_the_processes(name: str, gpus: int, options: list[str], expected: int) -> None:
    recipe = read_recipe(name, *options)
    assert accumulation(recipe.training, gpus) == expected
    assert expected * gpus * recipe.training.micro_batch_size == {"sft": 1024, "dpo": 128}[name[-3:]]


def test_the_papers_micro_batch_of_dpo_is_too_much_for_128_gpus() -> None:
    with pytest.raises(InputError, match="128; expected a multiple of micro_batch_size 2 x 128 processes = 256"):
        accumulation(read_recipe("llama3_8b/dpo").training, 128)


@pytest.mark.parametrize("size", ["8b", "70b"])
@pytest.mark.parametrize(("kind", "micro", "batch", "decay"), [("sft", 8, 1024, 0.01), ("dpo", 2, 128, 0.0)])
def test_settings_are_the_papers(size: str, kind: str, micro: int, batch: int, decay: float) -> None:
    recipe = read_recipe(f"llama3_{size}/{kind}")
    assert recipe.training.global_batch_size == batch
    assert recipe.training.micro_batch_size == (1 if (size, kind) == ("70b", "dpo") else micro)
    assert (recipe.training.params_dtype, recipe.training.gradient_checkpointing) == ("bf16", True)
    assert (recipe.optimizer.decay_style, recipe.optimizer.weight_decay) == ("cosine", decay)
    assert recipe.lora is None


def test_dpo_begins_where_sft_ends() -> None:
    for size in ("8b", "70b"):
        sft, dpo = (yaml.safe_load((EXAMPLES / f"llama3_{size}" / f"{kind}.yaml").read_text()) for kind in ("sft", "dpo"))
        assert dpo["model"] == f"{sft['save']}/hf"
