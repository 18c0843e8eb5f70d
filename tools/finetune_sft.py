"""Teach a Hugging Face checkpoint to answer: supervised fine-tuning on conversations.

python tools/finetune_sft.py --config sft.yaml            (one process)
torchrun --nproc_per_node 8 tools/finetune_sft.py --config sft.yaml
"""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.posttrain.sft import SftConfig, finetune_sft

if __name__ == "__main__":
    run_tool(finetune_sft, SftConfig, "Supervised fine-tuning of a Hugging Face checkpoint.")
