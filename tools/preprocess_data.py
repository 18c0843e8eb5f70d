"""Corpus files -> PREFIX.bin/.idx/.json."""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.data.preprocess import PreprocessConfig, preprocess

if __name__ == "__main__":
    run_tool(preprocess, PreprocessConfig, "Tokenize text files into a Megatron corpus: PREFIX.bin, .idx and .json.")
