"""Continual pre-training of Llama-3 models on a new language, on megatron-core."""

from megatron_cpt.version import __version__

__all__ = ["__version__"]
