"""HF LlamaConfig <-> megatron-core, and the GPTModel of this rank."""

from megatron_cpt.platforms import prepare_platform

prepare_platform()  # before any module of this room imports megatron
