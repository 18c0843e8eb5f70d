"""Several corpora -> one."""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.corpus.merge:merge_datasets",
        "megatron_cpt.corpus.merge:MergeConfig",
        "Join Megatron corpora, such as the partitions of a job array, into one.",
        check="megatron_cpt.corpus.merge:check_merge_files",
    )
