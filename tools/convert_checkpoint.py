"""hf-to-megatron | megatron-to-hf | verify: checkpoints between Hugging Face and Megatron."""

import os

os.environ["MEGATRON_CPT_PLATFORM"] = "cpu"  # conversion needs no GPU, and must not depend on one

from megatron_cpt.config.cli import run_subcommands

if __name__ == "__main__":
    run_subcommands(
        {
            "hf-to-megatron": (
                "megatron_cpt.convert.convert:hf_to_megatron",
                "megatron_cpt.convert.config:HfToMegatron",
                "megatron_cpt.convert.run_files:check_hf_to_megatron",
            ),
            "megatron-to-hf": (
                "megatron_cpt.convert.convert:megatron_to_hf",
                "megatron_cpt.convert.config:MegatronToHf",
                "megatron_cpt.convert.run_files:check_megatron_to_hf",
            ),
            "verify": (
                "megatron_cpt.convert.verify:verify",
                "megatron_cpt.convert.config:Verify",
                "megatron_cpt.convert.run_files:check_verify",
            ),
        },
        "Convert Llama checkpoints between Hugging Face and Megatron, or compare two of them.",
    )
