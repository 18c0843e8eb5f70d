"""Benchmarks, bits per byte and language of the answers of Hugging Face checkpoints.

python tools/evaluate.py --config evaluate.yaml
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.evaluation.report:evaluate",
        "megatron_cpt.evaluation.config:EvaluateConfig",
        "Evaluate Hugging Face checkpoints.",
        check="megatron_cpt.evaluation.run_files:check_evaluation",
    )
