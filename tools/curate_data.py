"""Raw corpora -> one language per folder, filtered and without near-duplicates, as JSON lines."""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.curation.curate:curate",
        "megatron_cpt.curation.config:CurateConfig",
        "Identify languages, filter by quality and drop near-duplicates (with datatrove).",
        check="megatron_cpt.curation.curate:check_curate_files",
    )
