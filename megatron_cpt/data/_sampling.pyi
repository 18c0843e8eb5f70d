"""Compiled from csrc/sampling.cpp; absent where there was no C++ compiler."""

import numpy as np

class SampleOrder:
    def __init__(
        self, nodes: list[tuple[int, int, int]], root: int, samples_per_epoch: list[int], seed: int, block_size: int
    ) -> None: ...
    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
