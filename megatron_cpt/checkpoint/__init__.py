"""Save, load and convert checkpoints.

Only modules that need torch import it; those that import megatron prepare the platform.
"""
