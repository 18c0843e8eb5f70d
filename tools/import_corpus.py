"""A manifest for corpora that Megatron-LM wrote.

python tools/import_corpus.py data/zh_text_document --tokenizer Meta-Llama-3-8B --language zh
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.corpus.import_megatron:import_corpora",
        "megatron_cpt.corpus.import_megatron:ImportCorpusConfig",
        "Write the manifest that mixtures need beside .bin/.idx files of Megatron-LM, which stay as they are.",
        positional="input",
        check="megatron_cpt.corpus.import_megatron:check_import_files",
    )
