"""Find the ALMR and the learning rate to use, by many short runs over both.

python tools/almr_study.py plan | run | fit | plot | choose --config study.yaml
"""

from megatron_cpt.config.cli import run_subcommands

if __name__ == "__main__":
    run_subcommands(
        {
            "plan": ("megatron_cpt.study.commands:plan", "megatron_cpt.study.settings:Plan"),
            "run": ("megatron_cpt.study.commands:run", "megatron_cpt.study.settings:Run"),
            "fit": ("megatron_cpt.study.commands:fit_command", "megatron_cpt.study.settings:FitOptions"),
            "plot": ("megatron_cpt.study.commands:plot", "megatron_cpt.study.settings:Plot"),
            "choose": ("megatron_cpt.study.commands:choose_command", "megatron_cpt.study.settings:Choose"),
        },
        "The study over ALMR and learning rate.",
    )
