"""Save, load and verify checkpoints; read what others wrote without running any of it.

Only modules that need torch import it; those that import megatron prepare the platform.
"""
