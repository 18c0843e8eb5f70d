"""Several corpora -> one."""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.data.merge import MergeConfig, merge_datasets

if __name__ == "__main__":
    run_tool(merge_datasets, MergeConfig, "Join Megatron corpora, such as the partitions of a job array, into one.")
