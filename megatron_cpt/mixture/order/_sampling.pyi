from typing import Any

import numpy as np
import numpy.typing as npt

class SampleOrder:
    def __init__(
        self,
        nodes: npt.NDArray[Any],
        stages: npt.NDArray[Any],
        base: npt.NDArray[np.int64],
        corpora: npt.NDArray[Any],
        seed: int,
        seq_length: int,
        block_size: int,
        block_origin: int,
    ) -> None: ...
    def locate(
        self, first: int, count: int, threads: int = 1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
