"""Find the ALMR and the learning rate to use, by many short runs over both.

python tools/almr_study.py plan | run | fit | plot | choose --config study.yaml
"""

from megatron_cpt.config.cli import run_subcommands

COMMANDS, SETTINGS, FILES = (f"megatron_cpt.study.{module}:" for module in ("commands", "settings", "run_files"))

if __name__ == "__main__":
    run_subcommands(
        {
            "plan": (COMMANDS + "plan_study", SETTINGS + "PlanOptions", FILES + "check_run_options"),
            "run": (COMMANDS + "run_study", SETTINGS + "RunOptions", FILES + "check_run_options"),
            "fit": (COMMANDS + "fit_command", SETTINGS + "FitOptions", FILES + "check_study"),
            "plot": (COMMANDS + "plot", SETTINGS + "PlotOptions", FILES + "check_study"),
            "choose": (COMMANDS + "choose_command", SETTINGS + "ChooseOptions", FILES + "check_choice"),
        },
        "The study over ALMR and learning rate.",
    )
