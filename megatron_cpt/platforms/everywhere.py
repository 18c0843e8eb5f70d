"""What is changed in megatron-core on every platform."""

from __future__ import annotations

import queue


def save_without_queue_server() -> None:
    """megatron-core's checkpoint writer starts a manager process per rank, which imports torch, to hand back its results.

    Ours come back through pipes (checkpoint/background.py), asynchronous saves too, so nothing ever goes through this queue.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    filesystem_async._results_queue = queue.Queue()
