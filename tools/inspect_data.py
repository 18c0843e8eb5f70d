"""What is in a corpus."""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.data.inspection import InspectConfig, inspect_data

if __name__ == "__main__":
    run_tool(inspect_data, InspectConfig, "Show what is in Megatron corpora: counts, languages, documents, integrity.")
