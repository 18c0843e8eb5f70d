"""Check a cluster: its devices, links and file system, and that a small training is what it should be in every layout on it.

torchrun --nproc_per_node 8 tools/check_cluster.py --folder /scratch/me
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.cluster.run:run_checks",
        "megatron_cpt.cluster.config:CheckConfig",
        "Check the machines that the job runs on.",
        joins=True,
        check="megatron_cpt.cluster.run_files:check_cluster_files",
    )
