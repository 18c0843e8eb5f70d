"""Hugging Face folders <-> Megatron checkpoints, larger vocabularies, and whether two checkpoints compute the same."""
