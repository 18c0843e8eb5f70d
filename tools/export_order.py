"""Which documents each step of a run reads, and in which steps a document was read.

python tools/export_order.py --run runs/llama3-8b/cpt --output order.parquet
python tools/export_order.py --run runs/llama3-8b/cpt --find zh_web:17
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.training.order_export:export_order",
        "megatron_cpt.training.order_export:ExportOrderConfig",
        "Write which documents the steps of a run read, or find in which steps a document was read.",
        check="megatron_cpt.training.order_export:check_export_files",
    )
