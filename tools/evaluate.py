"""Benchmarks, bits per byte and language of the answers of Hugging Face checkpoints.

python tools/evaluate.py --config evaluate.yaml
"""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.evaluation.config import EvaluateConfig
from megatron_cpt.evaluation.report import evaluate

if __name__ == "__main__":
    run_tool(evaluate, EvaluateConfig, "Evaluate Hugging Face checkpoints.")
