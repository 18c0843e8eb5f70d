"""Compiled from csrc/megatron_index.cpp; absent where there was no C++ compiler."""

import numpy as np

def build_sample_index(
    lengths: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int, threads: int, wide: bool
) -> np.ndarray: ...
def build_blending_index(weights: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]: ...
