"""Importing this makes megatron-core run on this machine: for modules that import megatron, before they do.

Not in the `__init__` of a room: each has modules that must do without torch, which takes seconds to import.
"""

from megatron_cpt.platforms import prepare_platform

prepare_platform()
