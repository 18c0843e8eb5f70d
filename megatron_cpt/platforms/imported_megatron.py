"""megatron-core, imported as this machine can: modules that import from megatron import this before.

Importing it changes nothing in torch, and nothing in megatron-core but that a CPU does not compile its small fusions:
`prepare_platform()` does, where a model is run.
"""

from megatron_cpt.platforms import current_platform

with current_platform().importing():
    import megatron.core.dist_checkpointing.exchange_utils
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.dist_checkpointing.strategies.state_dict_saver
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.fusions.fused_bias_swiglu
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer.distrib_optimizer
    import megatron.core.pipeline_parallel
    import megatron.core.rerun_state_machine  # noqa: F401
