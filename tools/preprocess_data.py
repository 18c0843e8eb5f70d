"""Corpus files -> PREFIX.bin/.idx/.json."""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.corpus.preprocess:preprocess",
        "megatron_cpt.corpus.config:PreprocessConfig",
        "Tokenize text files into a Megatron corpus: PREFIX.bin, .idx and .json.",
        check="megatron_cpt.corpus.preprocess:check_preprocess_files",
    )
