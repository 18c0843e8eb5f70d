"""Find the ALMR and the learning rate to use, by many short runs over both.

python tools/almr_study.py plan | run | fit | plot | choose --config study.yaml
"""

from megatron_cpt.config.cli import run_subcommands

if __name__ == "__main__":
    run_subcommands(
        {
            "plan": ("megatron_cpt.study.commands:plan", "megatron_cpt.study.commands:Plan"),
            "run": ("megatron_cpt.study.commands:run", "megatron_cpt.study.commands:Run"),
            "fit": ("megatron_cpt.study.commands:fit_command", "megatron_cpt.study.commands:FitOptions"),
            "plot": ("megatron_cpt.study.commands:plot", "megatron_cpt.study.commands:Plot"),
            "choose": ("megatron_cpt.study.commands:choose_command", "megatron_cpt.study.commands:Choose"),
        },
        "The study over ALMR and learning rate.",
    )
