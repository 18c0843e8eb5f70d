"""Whether results of a check of a cluster can be left where they are to be. Imports no torch."""

from __future__ import annotations

import os

from megatron_cpt.cluster.config import CheckConfig
from megatron_cpt.config.require import Requirements
from megatron_cpt.utils.input_files import why_unwritable


def check_cluster_files(config: CheckConfig) -> None:
    """Check the folders that a configuration names, whatever is wrong with it (see config/partial.py).

    Raises:
        InputError: one cannot be written to; InputErrors: several
    """
    with Requirements() as need:
        with need.noted():
            why = why_unwritable(config.folder)
            need(why is None, "folder", config.folder, f"a folder to write to, or a name for a new one ({why})")
        with need.noted():
            if config.report is not None:
                why = "it is a folder" if os.path.isdir(config.report) else why_unwritable(os.path.dirname(config.report))
                need(why is None, "report", config.report or "''", f"the name of a file to write ({why})")
