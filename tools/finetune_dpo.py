"""Make the better one of two answers likelier: direct preference optimization of a fine-tuned checkpoint.

python tools/finetune_dpo.py --config dpo.yaml            (one process)
torchrun --nproc_per_node 8 tools/finetune_dpo.py --config dpo.yaml
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.posttrain.dpo:finetune_dpo",
        "megatron_cpt.posttrain.settings:DpoConfig",
        "Direct preference optimization of a Hugging Face checkpoint.",
        joins=True,
        check="megatron_cpt.posttrain.run_files:check_tuning",
    )
