"""Continue the pre-training of a Llama model on a mixture of general and additional-language corpora.

torchrun --nproc_per_node 2 tools/pretrain_cpt.py --config run.yaml --optimizer.lr 1e-5
"""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.config.run import RunConfig
from megatron_cpt.training.pretrain import setup

if __name__ == "__main__":  # the checkpoint writer starts processes: an unguarded main would run again in each
    run_tool(setup, RunConfig, "Continue the pre-training of a Llama model on a mixture of corpora.")
