"""Find the ALMR and the learning rate to use, by many short runs over both.

python tools/almr_study.py plan | run | fit | plot | choose --config study.yaml
"""

from megatron_cpt.config.cli import run_subcommands
from megatron_cpt.study.commands import Run, run

if __name__ == "__main__":
    run_subcommands({"run": (run, Run)}, "The study over ALMR and learning rate.")
