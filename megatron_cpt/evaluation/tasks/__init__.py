"""Benchmarks that lm-eval lacks, as tasks of it: python -m lm_eval run --include_path THIS_FOLDER has them, too."""
