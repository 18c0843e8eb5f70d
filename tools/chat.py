"""Complete text with an HF checkpoint (a conversation in the terminal comes with the post-training stage)."""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.evaluation.generate import GenerateConfig, generate

if __name__ == "__main__":
    run_tool(generate, GenerateConfig, "Complete text with a Hugging Face checkpoint.")
