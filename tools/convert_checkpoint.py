"""hf-to-megatron | megatron-to-hf | verify: checkpoints between Hugging Face and Megatron."""

import os

os.environ["MEGATRON_CPT_PLATFORM"] = "cpu"  # conversion needs no GPU, and must not depend on one

from megatron_cpt.checkpoint import convert, verify
from megatron_cpt.config.cli import run_subcommands

if __name__ == "__main__":
    run_subcommands(
        {
            "hf-to-megatron": (convert.hf_to_megatron, convert.HfToMegatron),
            "megatron-to-hf": (convert.megatron_to_hf, convert.MegatronToHf),
            "verify": (verify.verify, verify.Verify),
        },
        "Convert Llama checkpoints between Hugging Face and Megatron, or compare two of them.",
    )
