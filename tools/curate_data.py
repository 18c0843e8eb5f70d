"""Raw corpora -> one language per folder, filtered and without near-duplicates, as JSON lines."""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.data.curate import CurateConfig, curate

if __name__ == "__main__":
    run_tool(curate, CurateConfig, "Identify languages, filter by quality and drop near-duplicates (with datatrove).")
