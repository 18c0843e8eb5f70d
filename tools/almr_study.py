"""Find the ALMR and the learning rate to use, by many short runs over both.

python tools/almr_study.py plan | run | fit | plot | choose --config study.yaml
"""

from megatron_cpt.config.cli import run_subcommands
from megatron_cpt.study.commands import Choose, FitOptions, Plan, Plot, Run, choose_command, fit_command, plan, plot, run

if __name__ == "__main__":
    run_subcommands(
        {
            "plan": (plan, Plan),
            "run": (run, Run),
            "fit": (fit_command, FitOptions),
            "plot": (plot, Plot),
            "choose": (choose_command, Choose),
        },
        "The study over ALMR and learning rate.",
    )
