"""From process start to the first batch: python -m bench.first_batch MIXTURE prints JSON."""

import time

BEGAN = time.monotonic()  # of this module: the interpreter's own start is in the wall time of the caller

import json  # noqa: E402
import sys  # noqa: E402

import psutil  # noqa: E402

from megatron_cpt.config.run import DataConfig  # noqa: E402
from megatron_cpt.mixture.file import load_mixture  # noqa: E402
from megatron_cpt.mixture.loader import BatchShape, TrainingData  # noqa: E402
from megatron_cpt.mixture.state import initial_state  # noqa: E402

if __name__ == "__main__":
    imported, before = time.monotonic(), psutil.Process().memory_info().rss
    mixture = load_mixture(sys.argv[1])
    schedule = mixture.schedule(830_000_000)
    order = initial_state(mixture, schedule, 1024).order(mixture, schedule)
    data = TrainingData([corpus.data for corpus in mixture.corpora], order, DataConfig())
    batches = [read() for read in data.microbatches(123_456 * 1024, BatchShape(4, 1024, 7, 32))]
    after = psutil.Process().memory_info().rss
    found = {"seconds": time.monotonic() - imported, "imports": imported - BEGAN, "bytes": after - before}
    print(json.dumps(found | {"samples": sum(len(batch.tokens) for batch in batches if batch.tokens is not None)}))
