"""HF LlamaConfig <-> megatron-core, and the GPTModel of this rank.

Only `build` imports torch and megatron; architecture, layouts and FLOPs do not.
"""
