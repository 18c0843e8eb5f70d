"""LlamaConfig -> megatron-core's TransformerConfig -> the GPTModel of this rank."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import TrainingConfig
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.platforms import Platform, current_platform
from megatron_cpt.platforms.everywhere import quiet
from megatron_cpt.platforms.process_groups import RankInfo

__all__ = [
    "LayerType",
    "Numerics",
    "TransformerConfig",
    "build_chunks",
    "build_model",
    "make_transformer_config",
    "mark_tensor_parallel",
    "numerics_of",
]


@dataclass(frozen=True)
class Numerics:
    """Settings of TransformerConfig that change how it computes, with its names."""

    fp8: str | None = None
    fp8_recipe: str = "tensorwise"
    deterministic_mode: bool = False
    transformer_impl: str | None = None
    """Whose layers; None: the platform's choice."""


def numerics_of(training: TrainingConfig) -> Numerics:
    """As a run's configuration asks for."""
    return Numerics(training.fp8, training.fp8_recipe, training.deterministic, training.transformer_impl)


def make_transformer_config(
    llama: LlamaConfig, parallel: ParallelConfig, params_dtype: torch.dtype, numerics: Numerics = Numerics()
) -> TransformerConfig:
    """What megatron-core needs to know to build and train this architecture; no dropout anywhere, as in Llama."""
    platform = current_platform()
    transformer_impl = numerics.transformer_impl or platform.transformer_impl(params_dtype)
    with quiet("megatron.core"):  # 0.19 warns of what it has not replaced in its own defaults
        return TransformerConfig(
            num_layers=llama.num_hidden_layers,
            hidden_size=llama.hidden_size,
            ffn_hidden_size=llama.intermediate_size,
            num_attention_heads=llama.num_attention_heads,
            num_query_groups=llama.num_key_value_heads,
            kv_channels=llama.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=llama.rms_norm_eps,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=llama.attention_bias or llama.mlp_bias,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=params_dtype,
            pipeline_dtype=params_dtype,
            bf16=params_dtype == torch.bfloat16,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
            pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
            sequence_parallel=parallel.sequence_parallel,
            context_parallel_size=parallel.context_parallel_size,
            tp_comm_overlap=parallel.tp_comm_overlap,
            # The interleaved schedule sends activations and gradients at the same time. Between two stages each is the
            # other's next and previous, and in one batch of sends and receives megatron-core takes the one for the other.
            overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
            batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
            **recompute(parallel),
            **dataclasses.asdict(numerics) | {"transformer_impl": transformer_impl},
            # Losses are sums; the gradient is divided once, by the targets that count in the whole global batch.
            calculate_per_token_loss=True,
            use_cpu_initialization=True,
            perform_initialization=False,  # the weights always come from a checkpoint
            masked_softmax_fusion=False,  # of the unfused attention, which is not used
            **platform.fusions(params_dtype, transformer_impl),
        )


def recompute(parallel: ParallelConfig) -> dict[str, Any]:
    """What the backward pass computes again, with the defaults that ParallelConfig names."""
    granularity = parallel.recompute_granularity
    if granularity == "full":
        return {
            "recompute_granularity": granularity,
            "recompute_method": parallel.recompute_method or "uniform",
            "recompute_num_layers": parallel.recompute_num_layers or 1,
        }
    if granularity == "selective":
        return {"recompute_granularity": granularity, "recompute_modules": parallel.recompute_modules or ["core_attn"]}
    return {}


def build_chunks(
    llama: LlamaConfig, config: TransformerConfig, seq_length: int, platform: Platform, ranks: RankInfo
) -> list[GPTModel]:
    """The model chunks of this rank: several under the interleaved pipeline schedule, else one."""
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is None:
        return [build_model(llama, config, seq_length, platform, ranks)]
    return [build_model(llama, config, seq_length, platform, ranks, stage) for stage in range(virtual)]


def build_model(
    llama: LlamaConfig,
    config: TransformerConfig,
    seq_length: int,
    platform: Platform,
    ranks: RankInfo,
    vp_stage: int | None = None,
) -> GPTModel:
    """One chunk of the part of the model that this rank owns, with uninitialised weights. Needs megatron's process groups.

    `vp_stage`: which chunk, under the interleaved pipeline schedule.
    """
    last_chunk = None if vp_stage is None else config.virtual_pipeline_model_parallel_size - 1
    spec = platform.block_spec(config, vp_stage)
    leave_out_biases(spec, llama)
    vocab_size = llama.padded_vocab_size(config.tensor_model_parallel_size)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=seq_length,
        pre_process=ranks.is_first_stage and vp_stage in (None, 0),
        post_process=ranks.is_last_stage and vp_stage == last_chunk,
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=llama.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=llama.rope_theta,
    )
    if llama.rope_scaling is not None:
        # GPTModel's own rope_scaling argument knows Llama-3.1's factor only; the checkpoint says all four numbers.
        rope, scaling = model.rotary_pos_emb, llama.rope_scaling
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
    mark_tensor_parallel(model)
    if model.post_process and vocab_size > llama.vocab_size:
        rows = vocab_size // config.tensor_model_parallel_size
        model.output_layer.register_forward_hook(without_padding(llama.vocab_size - ranks.tensor_rank * rows))
    return model.to(ranks.device)


def without_padding(used: int) -> Callable[..., None]:
    """A hook on this rank's output layer that gives the logits from row `used` on no probability, and no gradient."""

    def hook(module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        output[0][..., max(used, 0) :].fill_(float("-inf"))

    return hook


def leave_out_biases(spec: TransformerBlockSubmodules, llama: LlamaConfig) -> None:
    """megatron-core has one setting for the biases of attention and MLP; Llama has one for each."""
    if llama.attention_bias == llama.mlp_bias:
        return
    for layer in spec.layer_specs:
        part = layer.submodules.mlp if llama.attention_bias else layer.submodules.self_attention
        # A ModuleSpec up to megatron-core 0.17, a functools.partial since
        submodules = part.keywords["submodules"] if isinstance(part, functools.partial) else part.submodules
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            linear = getattr(submodules, name, None)
            if linear is not None:
                setattr(submodules, name, without_bias(linear))


@functools.cache
def without_bias(linear: type) -> type:
    """A linear layer that has no bias whatever it is told."""

    def init(self: Any, *args: Any, **options: Any) -> None:
        linear.__init__(self, *args, **options | {"bias": False})  # type: ignore[misc]

    return type(linear.__name__, (linear,), {"__init__": init})


def mark_tensor_parallel(model: GPTModel) -> None:
    """Mark the weights that tensor parallelism splits.

    megatron-core marks them while it initialises them, which we skip; without the marks every rank but the first would
    take them for copies and leave them out of the gradient norm.
    """
    split_dim = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        for kind, dim in split_dim.items():
            if isinstance(module, kind) and weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
