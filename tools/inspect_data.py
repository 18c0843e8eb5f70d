"""What is in a corpus or a mixture.

python tools/inspect_data.py data/zh_news
python tools/inspect_data.py mixture.yaml --at 1000000000000
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.mixture.inspect_data:inspect_data",
        "megatron_cpt.mixture.inspect_data:InspectConfig",
        "Show what is in Megatron corpora (counts, documents, integrity) or in a mixture of them (table, samples).",
        positional="input",
        check="megatron_cpt.mixture.inspect_data:check_inspect_files",
    )
