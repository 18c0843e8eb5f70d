"""Teach a Hugging Face checkpoint to answer: supervised fine-tuning on conversations.

python tools/finetune_sft.py --config sft.yaml            (one process)
torchrun --nproc_per_node 8 tools/finetune_sft.py --config sft.yaml
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.posttrain.sft:finetune_sft",
        "megatron_cpt.posttrain.settings:SftConfig",
        "Supervised fine-tuning of a Hugging Face checkpoint.",
        joins=True,
        check="megatron_cpt.posttrain.run_files:check_tuning",
    )
