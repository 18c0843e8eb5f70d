"""HF LlamaConfig <-> megatron-core, and the GPTModel of this rank.

Only `build` imports torch and megatron (and prepares the platform first); architecture, layouts and FLOPs do not.
"""
